"""What cola takes of PEFT, imported without bitsandbytes. The only file that imports peft, but for PEFT's optimizer in
`ideas`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CODES = "bitsandbytes"
_looks: list[Callable[..., Any]] = []  # PEFT's, which remember what they saw


@contextmanager
def codes_unseen() -> Iterator[None]:
    """PEFT finds no bitsandbytes: it would import it wherever it is installed, and with it torch's compiler, a second
    and more, for codes alone. Whatever loads codes has imported it before; then PEFT sees it."""
    if CODES in sys.modules:
        yield
        return
    sys.modules[CODES] = None  # pyright: ignore[reportArgumentType] - how Python says that a package is not there
    try:
        yield
    finally:
        del sys.modules[CODES]
        for look in _looks:
            look.cache_clear()  # pyright: ignore[reportFunctionMemberAccess]


with codes_unseen():
    from peft import (
        LoraConfig,
        PeftModel,
        PrefixTuningConfig,
        PromptEncoderConfig,
        PromptTuningConfig,
        get_peft_model,
        get_peft_model_state_dict,
        inject_adapter_in_model,
    )
    from peft.import_utils import is_bnb_4bit_available, is_bnb_available
    from peft.tuners.lora import LoraLayer

    _looks += [is_bnb_available, is_bnb_4bit_available]

__all__ = [
    "LoraConfig",
    "LoraLayer",
    "PeftModel",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "codes_unseen",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
]
