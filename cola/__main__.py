"""The command `cola`, and `python -m cola`: what a signal does, and what a terminal can show, is settled before
anything heavy is imported."""

import sys

from cola.report.signs import settle_streams
from cola.run.interrupt import stand_by


def main() -> None:
    """Run a command line."""
    settle_streams()
    if sys.argv[1:2] in (["run"], ["ablate"]):
        stand_by()
    from cola.cli.app import app

    app(prog_name="cola")


if __name__ == "__main__":
    main()
