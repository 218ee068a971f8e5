"""An arm as it is trained: every setting of its links, every rule at its knots, and its base. No torch.

What stands nearest counts: a link's own entry, then its arm, then what all arms share, then the default.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from cola.recipe.arms import Arm, KnotRules, LinkSettings, OneLink, Prune
from cola.recipe.ideas import BY_GRADIENT, Handover, Idea, PairRule, ShareRule
from cola.recipe.methods import INIT_BATCHES, METHODS, Lora, Settings
from cola.recipe.schema import Dtype, Model, Quantization, Section, Training


class Rules(Section):
    """What happens at the joint after each link; `arms.KnotRules` says what the words mean.

    Without `max_drift` a knot may move the outputs as far as rounding does in the base's number format.
    """

    merge: Literal["exact", "naive", "no"] = "exact"
    pair: Literal["fresh", "keep"] | PairRule = "fresh"
    merge_fraction: float | ShareRule = 1.0
    optimizer: Literal["fresh", "keep", "zero"] | Prune | Handover = "fresh"
    schedule: Literal["run", "link"] = "run"
    warmup_steps: float = 0.0
    max_drift: float | None = None

    @property
    def hands_on(self) -> bool:
        """Whether the optimizer's state goes on to the next link, or a part of it; one set to zero is a fresh one."""
        return self.optimizer not in ("fresh", "zero")

    @property
    def keeps_pair(self) -> bool:
        """Whether all links train the same pair."""
        return self.pair == "keep"


class BaseFormat(NamedTuple):
    """The format of the weights that an arm starts from; quantization None: they are no codes."""

    dtype: Dtype
    quantization: Quantization | None


@dataclass(frozen=True)
class ResolvedArm:
    """What an arm trains, with nothing left to be worked out; no links: the untrained base."""

    links: tuple[Settings, ...]
    untils: tuple[Idea | None, ...]  # of each link, by what it may end early
    rules: Rules
    base: BaseFormat


def resolve(arm: Arm, link: LinkSettings, knot: KnotRules, model: Model, training: Training) -> ResolvedArm:
    """An arm with what holds for all arms; what is searched has its default (`Recipe.resolved` puts a choice there)."""
    quantization = arm.quantization or model.quantization
    if "qlora" in methods_of(arm, link):
        quantization = "nf4"
    return ResolvedArm(
        links=tuple(_link_settings(entry, arm, link) for entry in arm.entries),
        untils=tuple(_nearest("until", entry, arm, link) for entry in arm.entries),
        rules=_rules(arm.knot, knot, training),
        base=BaseFormat(arm.dtype or model.dtype, None if quantization == "none" else quantization),
    )


def methods_of(arm: Arm, link: LinkSettings) -> list[str]:
    """The methods of an arm's links as the recipe says them."""
    return [_nearest("method", entry, arm, link) or "lora" for entry in arm.entries]


def _nearest(key: str, *sections: Section) -> Any:
    return next((value for section in sections if (value := getattr(section, key)) is not None), None)


def _link_settings(entry: OneLink, arm: Arm, link: LinkSettings) -> Settings:
    sections = (entry, arm, link)
    kind = METHODS[_nearest("method", *sections) or "lora"]
    said = {key: value for key in kind.model_fields if (value := _nearest(key, *sections)) is not None}
    if kind is Lora:
        said["alpha"] = _alpha(sections, said.get("rank", Lora.model_fields["rank"].default))
        if "init" in said and said["init"].name in BY_GRADIENT:
            said.setdefault("init_batches", INIT_BATCHES)
    return kind(**said)


def _alpha(sections: tuple[LinkSettings, ...], rank: int) -> float:
    """An alpha belongs to the rank beside which it stands: a link with a rank of its own does not take over an alpha
    from further out, or a step-down in rank would silently be a step-up in scale. A multiple is safe."""
    own = next((section.alpha for section in sections if section.alpha or section.rank), None)
    alpha = own or next((section.alpha for section in sections if isinstance(section.alpha, str)), "2r")
    return float(alpha[:-1]) * rank if isinstance(alpha, str) else alpha


def _rules(own: KnotRules, shared: KnotRules, training: Training) -> Rules:
    said = {key: value for key in Rules.model_fields if (value := _nearest(key, own, shared)) is not None}
    said.setdefault("schedule", "link" if training.protocol == "grow" else "run")
    if said["schedule"] == "link":
        said.setdefault("warmup_steps", training.warmup_steps)
    return Rules(**said)
