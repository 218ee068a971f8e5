"""Importing what a command needs. No torch."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_garbage() -> Iterator[None]:
    """Of what is imported here nothing is garbage: none is looked for meanwhile, which takes a sixth of the time, nor
    among all of this later (accelerate looks at every link)."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
