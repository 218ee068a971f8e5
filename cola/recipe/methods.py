"""The methods: what each of them trains, its settings with their defaults, and what may be done with what it trained.

A new method is a class here and a line in METHODS, its keys in `arms.LinkSettings`, and how it is attached in
`link/adapters.py`. No torch.
"""

from typing import Any, ClassVar, Literal

from cola.recipe.ideas import ADAMW, BY_GRADIENT, DEFAULT, Init, Optimizer
from cola.recipe.schema import Section

Targets = Literal["all-linear"] | tuple[str, ...]  # every linear layer but the head, or the names of some
Part = Literal["embeddings", "head"]
Placement = Literal["pfeiffer", "houlsby"]
Activation = Literal["relu", "gelu", "silu"]

INIT_BATCHES = 8  # whose gradient a start along it takes, where a recipe does not say


class Settings(Section):
    """What one link trains: a method, and a value of each setting that it has."""

    method: ClassVar[str]  # as recipes and records call it
    is_pair: ClassVar[bool] = False  # a low-rank pair beside frozen weights, so that a chain may have several
    is_whole: ClassVar[bool] = False  # all weights, so what it leaves is a model of its own
    merges: ClassVar[bool] = False  # what it trained can be added to the weights, so that a plain model holds it
    file: ClassVar[str]  # what its weights are saved as

    optimizer: Optimizer = ADAMW

    @property
    def virtual_tokens(self) -> int:
        """Virtual tokens that it puts before each row."""
        return 0

    def record(self) -> dict[str, Any]:
        """The method and its settings as JSON, without those that leave something to the model or have no effect."""
        values = self.model_dump(mode="json").items()
        return {"method": self.method, **{key: value for key, value in values if _UNSAID.get(key) != value}}


_UNSAID = {"init_batches": 0, "encoder_hidden_size": 0, "optimizer": "adamw"}


class Lora(Settings):
    """A low-rank pair: W + alpha / rank B A."""

    method = "lora"
    is_pair = True
    merges = True
    file = "adapter_model.safetensors"

    rank: int = 8
    alpha: float
    dropout: float = 0.0
    target_modules: Targets = "all-linear"
    init: Init = DEFAULT
    init_batches: int = 0  # above 0 where the start looks at the full gradient
    use_rslora: bool = False
    use_dora: bool = False
    loraplus_lr_ratio: float = 1.0

    @property
    def takes_gradient(self) -> bool:
        """Whether its start may look at the full gradient."""
        return self.init.name in BY_GRADIENT or self.init.file is not None


class Full(Settings):
    """All weights but the parts that are frozen."""

    method = "full"
    is_whole = True
    merges = True
    file = "model.safetensors"

    freeze: tuple[Part, ...] = ()


class Adapter(Settings):
    """Bottleneck modules after the sublayers."""

    method = "adapter"
    file = "bottleneck.safetensors"

    bottleneck: int = 64
    placement: Placement = "pfeiffer"
    activation: Activation = "relu"


class VirtualTokens(Settings):
    """Tokens before each row, which are trained. PEFT's own file has what an encoder makes of them; training goes on
    with the encoder, so that is what is saved."""

    file = "encoder.safetensors"

    num_virtual_tokens: int = 20

    @property
    def virtual_tokens(self) -> int:
        return self.num_virtual_tokens


class Prefix(VirtualTokens):
    """Keys and values before the first token."""

    method = "prefix"

    prefix_projection: bool = False
    encoder_hidden_size: int = 0  # 0: the model's own width


class PTuning(VirtualTokens):
    """Virtual tokens from an encoder."""

    method = "p_tuning"

    encoder_hidden_size: int = 0  # 0: the model's own width


class PromptTuning(VirtualTokens):
    """Virtual tokens."""

    method = "prompt_tuning"


KINDS = (Lora, Full, Adapter, Prefix, PTuning, PromptTuning)
METHODS: dict[str, type[Settings]] = {kind.method: kind for kind in KINDS}
METHODS["qlora"] = Lora  # on an NF4 base: `method: lora` and `quantization: nf4` in two words


def settings_of(record: dict[str, Any]) -> Settings:
    """What a link trained, from its record, which says other things of it too."""
    kind = METHODS[record["method"]]
    return kind(**{key: record[key] for key in kind.model_fields if key in record})
