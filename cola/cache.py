"""Where cola keeps what it can make again: tokens, dequantized models, and the store of segments."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$COLA_CACHE`, else `$XDG_CACHE_HOME/cola`, else `~/.cache/cola`."""
    if own := os.environ.get("COLA_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cola"


def store_path(own: str | None = None) -> Path:
    """Where segments are shared: the folder that is named, else `$COLA_STORE`, else `store` in the cache."""
    own = own or os.environ.get("COLA_STORE")
    return Path(own).expanduser().absolute() if own else cache_dir() / "store"
