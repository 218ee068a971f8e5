"""Random changes to texts, bytes and trees, drawn by hypothesis so that what fails is shrunk; and what a check may say.

The counts: `make test-all` tries 500 recipes and 500 files, the same ones each time. More, and others each time:

    COLA_FUZZ=20 pytest tests/fuzz          # 10,000 recipes and 10,000 files
"""

import os
import time
import traceback
from collections.abc import Callable
from random import Random
from typing import Any

from hypothesis import HealthCheck, settings

from cola.errors import LONGEST, MOST_LINES, ColaError

TIMES = int(os.environ.get("COLA_FUZZ", "1"))
SECONDS = 10.0  # of CPU, that a check may take, on any machine: that it ends is held

# What has broken readers before: limits of formats and machines, other types' spellings, other alphabets.
ODD_TEXTS = [
    "", " ", "\n", "null", "~", "yes", "off", "1e3", "0x10", "1_000", "2024-01-01", "12:30", ".nan", "-.inf", "<<",
    "\0", "\x07", "\x85", "\u2028", "\ufeff", "é", "ﬁ", "🙂", "²", "١", "\u202eabc", "a:b", "a!r", "{", "}", "{}",
    "{a:b}", "{0}", "{{", "%s", "../..", "/", "/dev/null", "~", "~nobody/x", ".", "-1", "=", "a=b", "a.b.c", "<b>&",
    "x" * 300, "x" * 5000, "9" * 400, "9" * 5000, "[" * 200, "epoch", "all-linear", "lora", "base", "2r", "0r",
    "package://", "package://os.path/x", "package://pytest/x.gguf", "some-org/some-model", "rows.jsonl", "sample",
]  # fmt: skip
ODD_NUMBERS = [
    0, 1, -1, 2, 3, 7, 8, 100, 999, 1000, 10**6, 20_000_000, 2**31, 2**32, 2**63, 10**30, -(10**30), 10**300, 0.1, 0.5,
    1.0, 1.5, -0.0, 1e-300, 1e-9, 1e20, 1e300, 1e308, 5e-324, float("inf"), float("-inf"), float("nan"),
]  # fmt: skip


def odd_value(random: Random, depth: int = 0) -> Any:
    """A value that is seldom the right one."""
    kind = random.randrange(9 if depth < 2 else 6)
    if kind == 0:
        return random.choice([None, True, False])
    if kind in (1, 2):
        return random.choice(ODD_NUMBERS)
    if kind in (3, 4):
        return random.choice(ODD_TEXTS)
    if kind == 5:
        return random.randrange(-5, 50)
    if kind == 6:
        return {random.choice(ODD_TEXTS): odd_value(random, depth + 1) for _ in range(random.randrange(3))}
    if kind == 7:
        return [odd_value(random, depth + 1)] * random.choice([2, 50])
    return [odd_value(random, depth + 1) for _ in range(random.randrange(4))]


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of each value below the root."""
    below = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in below for found in [(*path, key), *places(value, (*path, key))]]


def change_tree(random: Random, tree: Any, names: list[str]) -> None:
    """Change one value or key of a tree in place.

    Args:
        names: Keys that the tree may have elsewhere.
    """
    found = places(tree)
    if not found:
        return
    *above, last = random.choice(found)
    node = tree
    for key in above:
        node = node[key]
    match random.randrange(6):
        case 0:
            del node[last]
        case 1 if isinstance(node, dict):
            node[random.choice([*names, *ODD_TEXTS])] = node.pop(last)
        case 2 if isinstance(node, dict):
            node[random.choice([*names, *ODD_TEXTS])] = odd_value(random)
        case 3 if isinstance(node[last], list) and node[last]:
            node[last] = node[last] * 2
        case _:
            node[last] = odd_value(random)


def change_bytes(random: Random, data: bytes, snippets: list[bytes]) -> bytes:
    """Change a few bytes, cut, double or put something between."""
    for _ in range(random.choice([1, 1, 2, 5])):
        at = random.randrange(len(data) + 1)
        end = min(len(data), at + random.choice([1, 2, 8, 50]))
        match random.randrange(6):
            case 0:
                data = data[:at]
            case 1:
                data = data[:at] + bytes(random.randrange(256) for _ in range(end - at)) + data[end:]
            case 2:
                data = data[:at] + data[end:]
            case 3:
                data = data[:at] + data[at:end] * random.choice([2, 20]) + data[end:]
            case _:
                data = data[:at] + random.choice(snippets) + data[at:]
    return data


def one_clear_line(check: Callable[[], object]) -> None:
    """Run a check that may refuse its input in a few clear lines, and does not take long.

    Raises:
        AssertionError: it did something else.
    """
    began, said = time.process_time(), None
    try:
        check()
    except ColaError as error:
        said = str(error)
    except Exception as error:
        raise AssertionError("".join(traceback.format_exception(error)[-6:])) from error
    if said is not None:
        assert said.strip(), "an error without a word"
        assert len(said) <= LONGEST, f"{len(said)} characters: {said[:500]}"
        assert len(said.splitlines()) <= MOST_LINES, said
    assert time.process_time() - began < SECONDS, f"{time.process_time() - began:.1f} s"


def counted(number: int) -> Callable[[Callable], Callable]:
    """The settings of a fuzz test of so many examples in CI; larger counts draw others each time."""
    return settings(
        max_examples=number * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
