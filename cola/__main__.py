"""`python -m cola` is `cola`."""

from cola.cli.app import app

app(prog_name="cola")
