"""Workers begin fast: they are forked from a server that has imported what they need. No torch in this process."""

import multiprocessing
from multiprocessing import forkserver


def warm_up() -> None:
    """Begin the server, which imports while this process does the same. It computes nothing, so that it has no threads
    when it is forked."""
    multiprocessing.set_forkserver_preload(["cola.run.worker"])
    forkserver.ensure_running()
