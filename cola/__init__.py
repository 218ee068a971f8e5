"""cola: chain of LoRAs, compared honestly. The idea is in `cola/chain.py`."""

import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cola import environment

environment.settle()  # before anything imports torch

# bitsandbytes warns of optional kernels when it is imported, and once per matrix that it rounds the inputs of int8
# products to float16, as it always does.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from cola.cli.notebook import Run

# What is taken from here, imported as it is asked for: `import cola` loads nothing of it (docs/python.md).
DOORS = {
    "load": "cola.cli.notebook",
    "Chain": "cola.chain",
    "run_chain": "cola.chain",
    "Base": "cola.link.base",
    "Factors": "cola.link.ideas.door",
    "Matrix": "cola.link.ideas.door",
    "Trained": "cola.link.ideas.door",
    "Outputs": "cola.link.drift",
    "Link": "cola.recipe.plan",
    "Lora": "cola.recipe.methods",
    "Rules": "cola.recipe.resolved",
}


def __getattr__(name: str) -> Any:
    if name not in DOORS:
        raise AttributeError(f"module 'cola' has no attribute {name!r}")
    return getattr(importlib.import_module(DOORS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *DOORS])


class _Runnable(ModuleType):
    """The room `cola.run` under whose name a recipe is run, too."""

    def __call__(
        self,
        recipe: str | Path,
        overrides: Mapping[str, Any] | None = None,
        run_folder: str | Path | None = None,
        allow_code: bool = False,
    ) -> "Run":
        from cola.cli.notebook import run_recipe

        return run_recipe(recipe, overrides or {}, run_folder, allow_code)


importlib.import_module("cola.run").__class__ = _Runnable
