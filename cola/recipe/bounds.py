"""The kinds of values in a recipe and the bounds of each. No torch."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from cola.errors import quoted

SPLITS = ("train", "validation", "test")
SAMPLE = "sample"  # as a general text: the one that comes with cola
TRIAL_SEEDS = 1000  # where seeds begin that a search takes for itself: far from those that people score

# What is larger was not meant, or would end in a list, a matrix or a wait that no machine bears. Each is checked before
# anything of that size is made; whether this machine has room for the model and its pairs is checked on the model.
MOST_STEPS = 1_000_000  # optimizer steps of an arm: twelve days at a second each
MOST_EPOCHS = 10_000
MOST_LINKS = 500
MOST_ROWS = 10_000_000  # of a split, or of a batch
MOST_GENERATED = 1_000_000  # rows of a generator, see `sources.Pool.order`
MOST_TOKENS = 10_000_000  # of a row, or of one forward pass
WIDEST = 65_536  # a rank, an inner width, or virtual tokens: wider than any matrix of a model that is in use
MOST_ARMS = 500
MOST_TRAININGS = 10_000  # of all arms and seeds, trials among them
LONGEST_PATH = 1_000
MOST_TRIED = 1_000  # combinations of an arm's search


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"a whole number is expected, not {str(value).lower()}")
    return value


def _path(name: str) -> str:
    """A path that a file system can be asked about."""
    if "\0" in name or len(name) > LONGEST_PATH:
        raise ValueError(f"a path has no NUL and {LONGEST_PATH} characters at most")
    try:
        Path(name).expanduser().exists()
    except RuntimeError:
        raise ValueError(f"{quoted(name)}: there is no user of that name") from None
    except OSError as error:
        raise ValueError(f"{quoted(name)}: {error.strerror}") from None
    return name


def _whole_or_fraction(steps: float) -> float:
    if steps >= 1 and steps != int(steps):
        raise ValueError("warmup_steps is a whole number, or a fraction below 1")
    return steps


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


LocalPath = Annotated[str, AfterValidator(_path)]
Whole = Annotated[int, BeforeValidator(_no_truth)]
Steps = Annotated[Whole, Field(gt=0, le=MOST_STEPS)]
Epochs = Annotated[float, Field(gt=0, le=MOST_EPOCHS)]
RowCount = Annotated[Whole, Field(gt=0, le=MOST_ROWS)]
Tokens = Annotated[Whole, Field(gt=0, le=MOST_TOKENS)]
Width = Annotated[Whole, Field(gt=0, le=WIDEST)]
Seed = Annotated[Whole, Field(ge=0, lt=2**32)]
LinkCount = Annotated[Whole, Field(ge=0, le=MOST_LINKS)]
WarmUp = Annotated[float, Field(ge=0, le=MOST_STEPS), AfterValidator(_whole_or_fraction)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
OneOrMore = BeforeValidator(_listed)  # of a list of texts: a text alone is a list of one
Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["nf4", "int8"]


def optional(description: str, **bounds: Any) -> Any:
    """A key that may be left out: None, until what holds without it is known."""
    return Field(default=None, description=description, **bounds)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def is_remote(name: str) -> bool:
    """Whether a model name is a hub id or a package file rather than a path that exists or must exist here."""
    if name.startswith("package://"):
        return True
    if Path(name).expanduser().exists() or name.endswith(".gguf") or name.startswith((".", "/", "~")):
        return False
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None
