"""Configs that are built in, and what is said of a model that nothing is known of.

Run: pytest tests/plan/test_models.py
"""

import json
from pathlib import Path

import pytest
from conftest import tiny_config

from cola.errors import ModelError, RecipeError
from cola.plan.devices import device_of
from cola.plan.models import built_in, find_planned
from cola.plan.qwen import ANSWER, DAYS, EPOCHS, ROWS, TOKENS, qwen_record
from cola.recipe.schema import Model
from cola.report.numbers import size


@pytest.mark.parametrize("name", list(built_in()))
def test_a_built_in_config_has_the_published_number_of_parameters(name: str) -> None:
    for full in (name, f"{name}-Chat"):
        planned = find_planned(Model(name_or_path=full), network=False)
        assert planned is not None
        assert planned.skeleton.num_parameters() == built_in()[name]["published_parameters"]
        assert not planned.has_weights


def test_a_config_json_is_enough(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    tiny_config().to_json_file(file)
    planned = find_planned(Model(name_or_path=str(file)), network=False)
    assert planned is not None
    assert planned.skeleton.config.num_hidden_layers == tiny_config().num_hidden_layers


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"model_type": "nonesuch"}, "transformers knows no such architecture (model_type 'nonesuch')"),
        ({"model_type": "vit"}, "is no causal language model"),
        ([1], "no JSON object"),
    ],
)
def test_an_unknown_architecture_is_said_in_a_line(tmp_path: Path, content: object, says: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError) as caught:
        find_planned(Model(name_or_path=str(file)), network=False)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_network_a_model_of_the_hub_is_not_asked_for() -> None:
    assert find_planned(Model(name_or_path="some-org/some-model"), network=False) is None


def test_a_device_is_known_by_name_and_memory_by_size() -> None:
    assert device_of("H100").memory == 80 * 10**9
    assert device_of("rtx4090", "16GiB").memory == 16 * 2**30
    assert device_of().here
    for wrong in ({"name": "h10"}, {"memory": "24XB"}, {"memory": "0"}, {"memory": "-1GB"}):
        with pytest.raises(RecipeError):
            device_of(**wrong)


@pytest.fixture(scope="module")
def record() -> dict:
    return qwen_record()


def test_the_familys_table_is_parameters_times_bytes(record: dict) -> None:
    for name, one in record["sizes"].items():
        n = built_in()[f"Qwen/Qwen1.5-{name}"]["published_parameters"]
        assert [one[key] for key in ("float32", "float16", "int8")] == [4 * n, 2 * n, n]
        assert one["int4"] == round(n / 2)
        assert one["int4"] < one["nf4"]


def test_the_page_has_the_tables_numbers(record: dict) -> None:
    page = " ".join((Path(__file__).parents[2] / "docs/plan.md").read_text().split())
    for name, one in record["sizes"].items():
        kept = [size(one[key]) for key in ("float32", "float16", "int8", "int4", "nf4")]
        assert f"| {name} | {one['parameters']:,} | {' | '.join(map(str, kept))} |" in page
    qv, every = record["case"]["q and v"], record["case"]["all linear layers"]
    for one in (qv, every):
        peaks = one["peak_bytes"]
        assert f"{one['trained']:,}, " in page
        assert f"{one['share']:.3%}".replace("%", " %") in page
        assert all(f"{n / 1e9:.1f}" in page for key, n in peaks.items() if key != "1 x 512, checkpointed")
    assert f"{qv['tokens_a_second']:.0f} tokens a second" in page
    assert f"A row's forward and backward pass is {qv['flops_of_a_row'] / 1e12:.1f} TFLOP" in page
    assert f"that is {qv['flops_a_second'] / 1e12:.0f} TFLOP/s" in page
    shares = [f"{qv['share_of_peak'][card]:.0%}".replace("%", " %") for card in ("rtx3090", "rtx4090", "a100-80gb")]
    assert f"{shares[0]} of an RTX 3090's published peak in 16 bits, {shares[1]} of an RTX 4090's" in page
    assert f"{shares[2]} of an A100's" in page


def test_the_seven_billion_case_is_plain_arithmetic(record: dict) -> None:
    layers, width, inner, rank = 32, 4096, 11008, 8
    q_and_v = layers * 2 * rank * (width + width)
    every = layers * rank * (4 * (width + width) + 3 * (width + inner))
    case = record["case"]
    assert case["q and v"]["trained"] == q_and_v
    assert case["all linear layers"]["trained"] == every
    assert case["q and v"]["rows_a_second"] == pytest.approx(ROWS * EPOCHS / (DAYS * 24 * 3600))
    # Forward and back to the inputs of every matrix, but the first layer's; the pairs' own are a hundredth.
    matrices = layers * (4 * width * width + 3 * width * inner)
    least = 4 * matrices * TOKENS + 4 * width * 151936 * ANSWER
    assert least * 0.98 < case["q and v"]["flops_of_a_row"] < 1.06 * least
