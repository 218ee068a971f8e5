"""`python -m cola` is `cola`."""

from cola.cli import app

app(prog_name="cola")
