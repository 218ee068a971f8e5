"""What vLLM needs to serve an exported adapter. vLLM itself is never asked: it need not be here."""

from collections.abc import Mapping
from typing import Any

# vllm/config/lora.py, MaxLoRARanks; newer versions take 1 too, which 8 serves in all of them.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def serving(config: Mapping[str, Any]) -> tuple[int | None, str]:
    """The `max_lora_rank` that serves a PEFT LoRA, None where none does; and the same in a sentence.

    vLLM checks `r` alone, and then copies each module's factors into room for `max_lora_rank` of them, so that the
    module of the highest rank decides. It takes alpha / rank from `lora_alpha` and `r` for all modules
    (vllm/lora/peft_helper.py), which is right for what cola exports: one scale for all of them.

    Args:
        config: Of the adapter, as adapter_config.json has it.
    """
    if config["use_dora"]:
        return None, "vLLM loads no DoRA; for it, export --as merged."
    rank = max([config["r"], *config["rank_pattern"].values()])
    room = next((allowed for allowed in RANKS if allowed >= rank), None)
    if room is None:
        return None, (
            f"vLLM has no max_lora_rank for rank {rank} (it takes {', '.join(map(str, RANKS))}); for it, compress by "
            f"--rank {RANKS[-1]}, or export --as merged."
        )
    return room, f"vLLM serves this adapter of rank {rank} with `--enable-lora --max-lora-rank {room}`."
