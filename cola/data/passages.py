"""General text, on which forgetting is measured: passages of one length."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from cola.data.encode import Encoder, Example
from cola.data.fields import fill
from cola.data.render import Rendered
from cola.data.sources import open_texts
from cola.errors import DataError
from cola.recipe.data_section import Data, Files
from cola.recipe.schema import SAMPLE

GENERAL = "evaluation.general_text"  # the recipe's key
PASSAGE_TOKENS = 256  # of a general text, that are read at a time


def load_passages(text: str, tokenizer: PreTrainedTokenizerBase, longest: int) -> list[Example]:
    """A general text (a file, or the sample that comes with cola) in passages of so many tokens at most, special ones
    included, in its own order; none of it is left out. Raises DataError if the file is not there, cannot be read, or
    has no text in it."""
    path = Path(__file__).with_name("general.jsonl") if text == SAMPLE else Path(text)
    pool = open_texts(path, GENERAL)
    places = [pool.place(n) for n in range(pool.size or 0)]
    texts = [Rendered(fill("{text}", pool.row(n), place, GENERAL)) for n, place in enumerate(places)]
    data = Data(files=Files(train=str(path)), task="text", text="{text}", max_length=longest, too_long="split")
    passages = [passage for text in Encoder(data, tokenizer).texts(places, texts) for passage in text.examples]
    if not passages:
        raise DataError(f"{GENERAL}: {path.name} holds no text of two tokens or more")
    return passages
