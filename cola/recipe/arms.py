"""Arms: the links of each, and the rules at the knots between them. No torch."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, GetJsonSchemaHandler, ValidationError, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from cola.errors import quoted
from cola.recipe.ideas import SHARE, Handover, Init, Optimizer, PairRule, ShareRule, Until
from cola.recipe.methods import Activation, Part, Placement
from cola.recipe.schema import (
    MOST_LINKS,
    Dtype,
    Epochs,
    Fraction,
    LinkCount,
    OneOrMore,
    Positive,
    Quantization,
    Rate,
    Search,
    Section,
    Share,
    Steps,
    WarmUp,
    Width,
    optional,
)

MULTIPLE = r"[0-9]{1,6}(\.[0-9]{1,20})?r"  # of the rank, as an alpha


class LinkSettings(Section):
    """What one link trains. Set under `link` for all arms, under an arm for it, or under `links` for one link."""

    method: Literal["lora", "qlora", "full", "adapter", "prefix", "p_tuning", "prompt_tuning"] | None = optional(
        "`lora`: a low-rank pair beside frozen weights; `qlora`: the same on an NF4 base; `full`: all weights; "
        "`adapter`: bottleneck modules after the sublayers; `prefix`: keys and values before the first token; "
        "`p_tuning`: virtual tokens from an encoder; `prompt_tuning`: virtual tokens. Default: `lora`."
    )
    rank: Width | None = optional("lora: rank of the pair. Default: 8.")
    alpha: Positive | Annotated[str, Field(pattern=f"^{MULTIPLE}$")] | None = optional(
        "lora: the update is scaled by alpha / rank. A number, or a multiple of the rank (`0.5r`). Default: `2r`."
    )
    dropout: Fraction | None = optional("lora: dropout on the pair's input. Default: 0.")
    target_modules: list[str] | str | None = optional(
        "lora: names of the linear layers that get a pair (`[q_proj, v_proj]`), or `all-linear`: every linear layer "
        "but the output head. Default: `all-linear`."
    )
    init: Init | None = optional(
        "lora: first draw of the pair. `default`: PEFT's (A Kaiming-uniform, B zero); `gaussian`: A with standard "
        "deviation 1 / rank; `pissa`: the weight's top singular vectors, taken out of the frozen weight; `orthogonal`: "
        "rows of A orthogonal to those of all earlier links; `gradient`: rows of A are the top right singular vectors "
        "of the full gradient; `{lora_ga: {gamma: 16, version: peft}}`: A and B from its first and next singular "
        "vectors, taken out of the frozen weight. None of these changes the function. `{lora_one: {gamma: 128}}` does: "
        "A and B are a step along the gradient. Or a function of your own: `./my_idea.py:name`."
    )
    init_batches: Steps | None = optional(
        "lora: batches, the link's first, whose full gradient the start is given. Default: 8 for `gradient`, "
        "`lora_one` and `lora_ga`; for a start of your own none, so that it is given no gradient."
    )
    use_rslora: bool | None = optional("lora: scale by alpha / sqrt(rank) (rsLoRA). Default: `false`.")
    use_dora: bool | None = optional("lora: train the length of each row of the weight too (DoRA). Default: `false`.")
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None = optional(
        "lora: learning rate of B as a multiple of A's (LoRA+). Default: 1."
    )
    freeze: Annotated[list[Part], OneOrMore] | None = optional(
        "full: what stays as it is; a head that shares its matrix with the embeddings is frozen with them. Default: "
        "nothing."
    )
    bottleneck: Width | None = optional("adapter: inner width. Default: 64.")
    placement: Placement | None = optional(
        "adapter: `pfeiffer`: after each MLP; `houlsby`: after each attention too. Default: `pfeiffer`."
    )
    activation: Activation | None = optional("adapter: the nonlinearity. Default: `relu`.")
    num_virtual_tokens: Width | None = optional(
        "prefix, p_tuning, prompt_tuning: virtual tokens before each row. Default: 20."
    )
    prefix_projection: bool | None = optional("prefix: learn it through a two-layer network. Default: `false`.")
    encoder_hidden_size: Width | None = optional(
        "prefix with projection, p_tuning: width of the encoder. Default: the model's."
    )
    optimizer: Optimizer | None = optional(
        "What takes the steps: `adamw`. For full: `galore`: AdamW in a subspace of each matrix's gradient, `{galore: "
        "{rank: 8, refresh: 200, scale: 0.25}}`; `apollo`: the gradient, each row as long as Adam would make it by a "
        "random sketch, `{apollo: {rank: 8, refresh: 200, scale: 1}}`. For lora: `lora_muon`: Muon's step of the "
        "product, whose rate is of another kind; `reflora`: AdamW along the gradients of the balanced pair, `{reflora: "
        "{warmup: 0}}`; `riemannian`: AdamW on gradients preconditioned by the other factor, `{riemannian: {damping: "
        "0.01}}`; `lora_rite`: adaptive steps that no factorization of the update changes, `{lora_rite: {clip: 1}}`. "
        "Or a function of your own: `./my_idea.py:name`. Default: `adamw`."
    )
    until: Until | None = optional(
        "lora: a rule by which a link may end before its steps are made, and the next one begins: `{update_stops: "
        "{tolerance: 0.01, every: 10}}`: once the norm of its update has changed by less than that share of itself "
        "over so many steps (AROMA); or a function of your own: `./my_idea.py:name`. The last link makes all the steps "
        "that are left. Goes with `knot.schedule: run`. Default: none."
    )
    learning_rate: Rate | None = optional("Peak learning rate. Default: training.learning_rate.")

    @field_validator("alpha", mode="before")
    @classmethod
    def _number_or_multiple(cls, value: Any) -> Any:
        if isinstance(value, str) and re.fullmatch(MULTIPLE, value) is None:
            raise ValueError(f"alpha is a number, or a multiple of the rank such as 2r; got {quoted(value)}")
        return value

    @field_validator("target_modules")
    @classmethod
    def _names(cls, value: Any) -> Any:
        names = [value] if isinstance(value, str) else value
        if names == []:
            raise ValueError("name at least one module, or all-linear")
        return "all-linear" if names == ["all-linear"] else names


class OneLink(LinkSettings):
    """One link of a list of links."""

    steps: Steps | None = optional("Optimizer steps of this link. Default: an even share.")
    epochs: Epochs | None = optional("The same in epochs.")

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give a link's length as epochs or as steps, one of them")
        if isinstance(self.learning_rate, Search):
            raise ValueError("search a learning rate for the whole arm, not for one link")
        return self


class Prune(Section):
    """Part of AdamW's moments is cleared at a knot, the same entries of both; its step count goes on (ReLoRA)."""

    prune_magnitude: Share | None = optional(
        "Share of each tensor's entries that is cleared, those of the smallest first moment."
    )
    prune_random: Share | None = optional("Share of each tensor's entries that is cleared, drawn from the link's seed.")

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if (self.prune_magnitude is None) == (self.prune_random is None):
            raise ValueError("give prune_magnitude or prune_random, one of them")
        return self

    @property
    def share(self) -> float:
        """The share of the entries that is cleared."""
        return self.prune_magnitude or self.prune_random or 0.0  # one of them is above 0, see `_one_rule`


class KnotRules(Section):
    """The joint after each link. Set under `knot` for all arms, or under an arm for it."""

    merge: Literal["exact", "naive", "no"] | None = optional(
        "`exact`: added in float32 to the untouched base and rounded once; `naive`: added in place, in the weights' "
        "own format (what most tools do); `no`: kept frozen beside the weights, where the next pair joins it. A "
        "quantized base keeps every pair beside its codes. Default: `exact`."
    )
    pair: Literal["fresh", "keep"] | PairRule | None = optional(
        "`fresh`: each link trains a pair of its own; `keep`: all links train the same one, so that a knot is a reset "
        "of the optimizer or the schedule and nothing else; `keep_a`: each pair is merged, and the next begins with "
        "its A and with B zero; or a function of your own: `./my_idea.py:name`. Default: `fresh`."
    )
    merge_fraction: Annotated[float, Field(gt=0, le=1)] | ShareRule | None = optional(
        "Share of a pair that a knot between two links keeps; the rest is let go, so that the outputs move (PLoRA, "
        "LoRASC). A number, or a function of your own that says it of each knot or of each matrix: "
        "`./my_idea.py:name`. The last link is kept whole. Default: 1."
    )
    optimizer: Literal["fresh", "keep", "zero"] | Prune | Handover | None = optional(
        "AdamW at the beginning of the next link. `fresh`: a new one; `zero`: moments and step count set to zero, "
        "which comes to the same; `keep`: as it is; `{prune_magnitude: 0.9}` or `{prune_random: 0.9}`: a part of the "
        "moments cleared; `reproject`: what the moments say of the directions of the new pair (LoFT's algebra); or a "
        "function of your own: `./my_idea.py:name`. Default: `fresh`."
    )
    schedule: Literal["run", "link"] | None = optional(
        "`run`: one schedule of the learning rate over all steps, knots inside it; `link`: restarted at every knot. "
        "Default: `run` with protocol `fixed`, `link` with `grow`."
    )
    warmup_steps: WarmUp | None = optional(
        "Warm-up after each knot; below 1: a fraction of the link's steps. Under `schedule: run` the schedule's rate "
        "is reached in a line from 0. Default: none under `run`, training.warmup_steps under `link`."
    )
    max_drift: Positive | None = optional(
        "Largest change of a logit across a knot, relative to the largest logit, before it is an error. Default: 1e-4 "
        "in float32, 0.02 in float16, 0.1 in bfloat16; no limit for `merge: naive`."
    )

    @field_validator("merge_fraction", mode="before")
    @classmethod
    def _number_or_rule(cls, value: Any) -> Any:
        return SHARE.read(value) if isinstance(value, str | dict) else value

    @field_validator("merge", mode="before")
    @classmethod
    def _yes_or_no(cls, value: Any) -> Any:
        return {True: "exact", False: "no"}[value] if isinstance(value, bool) else value


class Arm(LinkSettings):
    """One thing that is compared: a number of links, each trained, then tied into the weights."""

    links: LinkCount | Annotated[list[OneLink], Field(max_length=MOST_LINKS)] = Field(
        default=1,
        description="Number of equal links (0: the untrained base, 1: plain LoRA, 3: a chain), or a list of links.",
    )
    knot: KnotRules = Field(default_factory=KnotRules, description="This arm's own rules at its knots.")
    dtype: Dtype | None = optional("Number format of this arm's base. Default: model.dtype.")
    quantization: Quantization | Literal["none"] | None = optional(
        "Quantization of this arm's base. Default: model.quantization."
    )
    search: dict[str, Search] | None = optional(
        "Keys of the arm whose value is chosen on validation: `{rank: [4, 8]}`; all combinations are tried. `rank: "
        "{search: [4, 8]}` says the same."
    )

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """An arm as a recipe writes one: with a search in place of a value, as `_gather_searches` reads it."""
        schema = handler(core_schema)
        keys = handler.resolve_ref_schema(schema)["properties"]
        search = next(one for one in keys["learning_rate"]["anyOf"] if "$ref" in one)
        for key in SEARCHABLE:
            if search not in keys[key]["anyOf"]:
                keys[key]["anyOf"].append(search)
        keys["search"] = {**keys["search"], "anyOf": [{"type": "object"}, {"type": "null"}]}
        return schema

    @model_validator(mode="before")
    @classmethod
    def _gather_searches(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        inline = {k: v for k, v in value.items() if k in SEARCHABLE and isinstance(v, dict) and "search" in v}
        apart = value.get("search") or {}
        if not isinstance(apart, dict) or not (inline or apart):
            return value
        apart = {k: {"search": v} if isinstance(v, list) else v for k, v in apart.items()}
        return {k: v for k, v in value.items() if k not in inline} | {"search": apart | inline}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for key, search in (self.search or {}).items():
            if key not in SEARCHABLE:
                raise ValueError(f"search: {quoted(key)} cannot be searched; these can: {', '.join(SEARCHABLE)}")
            if getattr(self, key) is not None and key in self.model_fields_set:
                raise ValueError(f"search: {key} has a value of its own too; leave one of the two out")
            for value in search.search:
                try:
                    tried = Arm.model_validate({key: value})
                except ValidationError as error:
                    reason = error.errors()[0]["msg"].removeprefix("Value error, ")
                    raise ValueError(f"search: {key} cannot be {quoted(value)}: {reason}") from None
                if tried.links in (0, []):
                    raise ValueError("search: links counts from 1, since without links nothing is trained")
        if len({tuple(search.seeds or ()) for search in (self.search or {}).values()}) > 1:
            raise ValueError("search: all keys of an arm are searched over the same seeds")
        if self.links == 0 or self.links == []:
            given = {k for k in self.model_fields_set if getattr(self, k) not in (None, KnotRules())}
            if extra := sorted(given - {"links", "dtype", "quantization"}):
                raise ValueError(f"an arm without links trains nothing, so {extra[0]!r} has no effect: remove it")
        return self

    @property
    def entries(self) -> list[OneLink]:
        """What each link says itself: nothing, where the arm says how many there are."""
        return self.links if isinstance(self.links, list) else [OneLink()] * self.links

    @property
    def n_links(self) -> int:
        return len(self.entries)


SEARCHABLE = ("links", *(key for key in LinkSettings.model_fields if key != "method"))
