"""Where and with what a benchmark was run, and how far contenders that do the same work may lie apart."""

from typing import Any

from cola.tree.made import provenance

TOLERANCE = 1e-4  # of a loss, nats per target token


def made() -> dict[str, Any]:
    """Where and with what a benchmark was run."""
    return {key: value for key, value in provenance().items() if key != "all_packages"}
