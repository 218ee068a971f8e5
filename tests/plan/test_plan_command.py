"""What `cola plan` says of a recipe, against the run of it.

Run: pytest tests/plan/test_plan_command.py
"""

import json
from pathlib import Path

import pytest
from runs import cola, go, result

from cola.plan import calibrate as calibration
from cola.plan.calibrate import product_seconds, read_calibration
from cola.plan.devices import device_of
from cola.plan.fit import fit_of
from cola.plan.forecast import Forecast
from cola.plan.models import find_planned
from cola.plan.rows import rows_of
from cola.recipe.read import read_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def planned(recipe: Path, *words: str) -> dict:
    told = cola("plan", recipe, *words, "--as", "json")
    assert told.exit_code in (0, 1), told.output
    return json.loads(told.stdout)


def refused(*words: object) -> str:
    told = cola("plan", *words)
    assert told.exit_code == 2, told.output
    assert "Traceback" not in told.output
    return told.stderr


def test_the_plan_has_the_parameters_flops_and_steps_of_the_run(recipe_file: Path) -> None:
    before = planned(recipe_file)
    folder, _ = go(recipe_file)
    for arm, one in before["arms"].items():
        info = result(folder, arm)["train_info"]
        assert one["total_parameters"] == info["num_total_params"]
        assert one["trainable_parameters"] == info["num_trainable_params"]
        assert one["flops"] == pytest.approx(info["flops"], rel=1e-12)
        assert sum(link["steps"] for link in one["links"]) == info["steps"]
    assert before["totals"]["steps"] < before["totals"]["asked_steps"]  # LoRA and the chain begin alike
    after = planned(recipe_file)["totals"]
    assert after["found_steps"] == after["steps"] == before["totals"]["steps"]
    assert after["flops"] == 0


def test_what_arms_share_is_counted_once_without_rows_or_weights(recipe_file: Path) -> None:
    told = planned(recipe_file, "model.name_or_path=Qwen/Qwen1.5-0.5B", "data.rows.train=24")
    assert told["arms"]["full"]["trainable_parameters"] == 463_987_712
    assert told["rows"].startswith("assumed: every row has 512 tokens")
    assert told["totals"]["steps"] == 3 * 6 - 2  # the chain's first link is LoRA's beginning
    assert told["totals"]["found_steps"] is None


def test_parts_of_the_memory_add_up_to_the_peak(recipe_file: Path) -> None:
    for arm in planned(recipe_file)["arms"].values():
        memory = arm["memory_bytes"]
        resident = sum(memory["training"][p] for p in ("weights", "quantization", "pairs", "residual", "optimizer"))
        moments = sum(memory["training"].values()), resident + memory["knot"], resident + memory["evaluation"]
        assert memory["peak"] == memory["libraries"] + max(*moments, memory["loading"])


def test_each_link_has_the_pairs_of_those_before_it(recipe_file: Path) -> None:
    first, second, third = planned(recipe_file)["arms"]["chain3"]["links"]
    pairs = first["memory_bytes"]["training"]["pairs"]
    assert pairs == 4 * first["trainable_parameters"]
    residuals = [link["memory_bytes"]["training"]["residual"] for link in (first, second, third)]
    assert residuals == [0, pairs, 2 * pairs]


@pytest.mark.slow
def test_checkpointing_and_small_passes_take_less(recipe_file: Path) -> None:
    long = "evaluation.batch_tokens=64"

    def activations(*words: str) -> float:
        told = planned(recipe_file, long, *words)
        return told["arms"]["lora"]["memory_bytes"]["training"]["activations"]

    plain = activations()
    assert activations("training.gradient_checkpointing=true") < plain
    assert activations("training.micro_batch_tokens=32") < plain


@pytest.mark.slow
def test_the_smallest_change_is_one_by_which_it_fits(recipe_file: Path) -> None:
    words = ["model.name_or_path=Qwen/Qwen1.5-0.5B", "arms.full=null", "arms.chain3=null", "comparison.primary=null"]
    told = planned(recipe_file, *words, "--device", "rtx4090", "--device-memory", "7GB")
    fit = told["fits"]["lora"]
    assert not fit["fits"]
    assert fit["change"]
    again = planned(recipe_file, *words, *fit["change"], "--device", "rtx4090", "--device-memory", "7GB")["fits"][
        "lora"
    ]
    assert again["fits"]
    assert again["peak_bytes"] == fit["then"]


@pytest.mark.slow
def test_no_change_is_named_where_none_would_do(recipe_file: Path) -> None:
    told = cola("plan", recipe_file, "model.name_or_path=Qwen/Qwen1.5-7B", "--device-memory", "1GB", "--device", "t4")
    assert told.exit_code == 1
    assert "lora: does not fit" in told.output
    assert "nor with one row a pass" in told.output


@pytest.mark.slow
def test_full_fine_tuning_that_does_not_fit_is_told_what_would(recipe_file: Path) -> None:
    told = planned(recipe_file, "model.name_or_path=Qwen/Qwen1.5-1.8B", "--device", "rtx4090")
    assert not told["fits"]["full"]["fits"]
    assert any("method" in word for word in told["fits"]["full"]["change"])


@pytest.mark.slow
def test_every_kind_of_arm_is_planned(recipe_file: Path) -> None:
    pytest.importorskip("bitsandbytes")
    arms = (
        "arms={base: {links: 0}, nf4: {quantization: nf4, links: 2}, int8: {quantization: int8},"
        "bf16: {dtype: bfloat16},"
        "dora: {use_dora: true},"
        "prefix: {method: prefix, num_virtual_tokens: 4}, wide: {links: [{rank: 6}, {rank: 2}]},"
        "bottleneck: {method: adapter, bottleneck: 8}, beside: {links: 2, knot: {merge: 'no'}}}"
    )
    told = planned(recipe_file, arms, "comparison.primary=null")["arms"]
    nf4 = told["nf4"]["memory_bytes"]["training"]
    assert nf4["quantization"] > 0
    assert nf4["residual"] == 2 * nf4["pairs"]  # as the chain keeps it, and stacked beside the codes
    assert told["beside"]["memory_bytes"]["training"]["residual"] == nf4["residual"]
    assert [link["trainable_parameters"] for link in told["wide"]["links"]] == sorted(
        (link["trainable_parameters"] for link in told["wide"]["links"]), reverse=True
    )


def test_times_are_known_once_the_machine_is_calibrated(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SECONDS", 0.001)
    assert planned(recipe_file)["arms"]["lora"]["training_seconds"] is None
    told = planned(recipe_file, "--calibrate")
    assert told["times"].startswith("calibrated on")
    assert all(arm["training_seconds"] > 0 for name, arm in told["arms"].items() if name != "base")
    assert told["totals"]["seconds"] > 0
    known = read_calibration()
    assert known.measured
    product = next(iter(known.products))
    m, k, n, dtype = product.split(",")
    shape = int(m), int(k), int(n), dtype
    assert product_seconds(known.products, shape) == known.products[product]
    assert product_seconds(known.products, (10**6, int(k), int(n), dtype)) > known.products[product]


def test_the_table_says_what_fits_and_where_numbers_are_from(recipe_file: Path) -> None:
    told = cola("plan", recipe_file)
    assert told.exit_code == 0, told.output
    for words in (
        "tiny: work of one seed",
        "tiny: memory on this machine's CPU",
        "lora: fits",
        "the recipe's own rows",
    ):
        assert words in told.output
    assert "--calibrate measures" in told.output


def test_bad_input_is_one_clear_line(recipe_file: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd.json"
    odd.write_text('{"model_type": "nonesuch"}')
    assert "known are here, cpu" in refused(recipe_file, "--device", "h10")
    assert "such as 24GB" in refused(recipe_file, "--device-memory", "much")
    assert "model_type 'nonesuch'" in refused(recipe_file, f"model.name_or_path={odd}")
    assert "built in" in refused(recipe_file, "model.name_or_path=some-org/some-model")
    assert "no such file" in refused(recipe_file, "model.name_or_path=gone.json")
    assert "another" in refused(recipe_file, "--calibrate", "--device", "h100")
    assert "takes no recipe" in refused(recipe_file, "--table", "qwen")
    assert "name a recipe" in refused()
    assert "one of qwen" in refused("--table", "llama")
    assert "no effect" in refused(recipe_file, "training.decay_steps=0.5")


def test_a_searched_recipe_is_planned_with_its_trials(recipe_file: Path) -> None:
    told = planned(recipe_file, "training.learning_rate={search: [1e-2, 3e-3]}", "arms.full.learning_rate=null")
    assert told["totals"]["trials"] == 6
    assert told["totals"]["runs"] == 4


def test_matched_budgets_are_planned(recipe_file: Path) -> None:
    told = planned(recipe_file, "training.match=flops")
    lora, full = (sum(link["steps"] for link in told["arms"][arm]["links"]) for arm in ("lora", "full"))
    assert full <= lora
    assert told["arms"]["full"]["flops"] <= told["arms"]["lora"]["flops"]


def test_a_fit_knows_the_room(recipe_file: Path) -> None:
    recipe = read_recipe(recipe_file, [])
    found = find_planned(recipe.model, network=False)
    assert found is not None
    forecast = Forecast(recipe, found, rows_of(recipe, found), device_of("h100"))
    memory = forecast.memory("lora")
    assert fit_of(forecast, "lora", memory).fits
    assert memory.libraries == memory.loading == 0  # of a GPU's memory the process takes nothing
