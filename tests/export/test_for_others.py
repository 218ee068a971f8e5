"""What others read beside the weights: PEFT's result schema, the hub's scores, vLLM's rank, digests of tensors.
Run: pytest tests/export/test_for_others.py"""

import json
import re
import shutil
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from runs import assert_one_line, cola, unsealed, wide_cola
from safetensors.torch import load_file, save_file

from cola.errors import ModelError
from cola.export import tensors
from cola.export.outcome import outcomes
from cola.export.vllm import serving

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]


def copied(run: Path, to: Path, *ignored: str) -> Path:
    return Path(shutil.copytree(run, to, ignore=shutil.ignore_patterns("exports", *ignored)))


# ---------------------------------------------------------------------------------------------------------
# PEFT's method_comparison

# The keys of MetaMathQA/results/*.json as of 2026-09, that of its last entry of metrics last.
SCHEMA = {
    "run_info": "created_at total_time experiment_name peft_branch peft_worktree_is_dirty train_config peft_config "
    "error_msg",
    "train_config": "model_id dtype max_seq_length batch_size batch_size_eval max_steps eval_steps compile use_gc "
    "query_template seed grad_norm_clip optimizer_type optimizer_kwargs lr_scheduler use_amp autocast_adapter_dtype "
    "generation_kwargs attn_implementation init_kv_cache_prefix",
    "train_info": "accelerator_memory_reserved_avg accelerator_memory_max accelerator_memory_reserved_99th train_time "
    "file_size num_trainable_params num_total_params status metrics",
    "meta_info": "model_info dataset_info package_info system_info pytorch_info",
    "system_info": "system release version machine processor accelerator",
}
LAST = {"step", "test accuracy", "train loss", "train samples", "train total tokens", "forgetting"}
LOOK = {"step", "valid accuracy", "train loss", "train samples", "train time", "eval time", "tokens / sec"}
LOOK |= {"mem allocated avg", "mem reserved avg", "elapsed time"}


def at(said: Any, path: str) -> list[Any]:
    """What lies under a dotted path, in every item of the lists on the way."""
    found = [said]
    for key in path.split("."):
        found = [value[key] for value in found if key in value]
        found = [one for value in found for one in (value if isinstance(value, list) else [value])]
    return found


def test_results_are_in_pefts_schema_with_the_runs_own_numbers(many_arms: Path, tmp_path: Path) -> None:
    done = cola("export", many_arms, "--as", "results", "--to", tmp_path / "results")
    assert done.exit_code == 0, done.output
    assert "left out: base, which trains nothing" in done.output
    said = {path.name.split("--")[0]: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}
    assert said.keys() == {path.name for path in (many_arms / "arms").iterdir()} - {"base"}
    page = (ROOT / "docs/export.md").read_text()
    for arm, one in said.items():
        result = json.loads((many_arms / f"arms/{arm}/seed-0/result.json").read_text())
        parts = one | one["run_info"] | one["meta_info"]
        for part, keys in SCHEMA.items():
            assert set(keys.split()) == parts[part].keys(), (arm, part)
            assert not [key for key in keys.split() if not re.search(rf"\b{key}\b", page)], part
        *looks, last = one["train_info"]["metrics"]
        assert all(look.keys() == LOOK | {"valid loss"} for look in looks)
        assert last.keys() == LAST | {"test loss"}
        assert one["run_info"]["experiment_name"] == f"{arm}/{many_arms.name}-seed0"
        assert last["test accuracy"] == result["evaluation"]["test"]["score"]
        rows = [json.loads(line) for line in (many_arms / f"arms/{arm}/seed-0/metrics.jsonl").read_text().splitlines()]
        steps = [row for row in rows if row["kind"] == "step"]
        assert (last["step"], last["train samples"]) == (18, 18 * 4)
        assert last["train total tokens"] == result["train_info"]["tokens"] == sum(row["tokens"] for row in steps)
        assert last["train loss"] == fmean(row["loss"] for row in steps[12:])  # since the look before, at step 12
        assert [look["valid accuracy"] for look in looks] == [
            look["score"] for look in result["train_info"]["evaluations"]
        ]
        assert one["cola"]["evaluation"] == result["evaluation"]
        unknown = one["cola"]["not_known"]
        assert {"train_info.accelerator_memory_max", "train_info.metrics.eval time"} <= set(unknown)
        assert all(value is None for path in unknown for value in at(one, path)[:1]), arm
    configs = {arm: one["run_info"]["peft_config"] for arm, one in said.items()}
    assert configs["full"] is None
    assert configs["bottleneck"]["peft_type"] is None
    assert (configs["prefix"]["peft_type"], configs["prefix"]["num_virtual_tokens"]) == ("PREFIX_TUNING", 4)
    assert (configs["chain3"]["peft_type"], configs["chain3"]["r"], len(said["chain3"]["cola"]["links"])) == (
        "LORA",
        4,
        3,
    )
    assert (configs["dora"]["use_dora"], configs["pissa2"]["init_lora_weights"]) == (True, None)
    assert said["nf4"]["run_info"]["train_config"]["dtype"] == "int4"
    size = {arm: one["train_info"]["file_size"] for arm, one in said.items()}
    assert size["lora"] == (many_arms / "arms/lora/seed-0/knots/link-1/adapter_model.safetensors").stat().st_size
    assert (size["chain3"], size["kept"]) == (3 * size["lora"], size["lora"])  # three pairs, or one that went on


def test_results_need_neither_weights_nor_base_and_name_what_is_missing(many_arms: Path, tmp_path: Path) -> None:
    run = unsealed(copied(many_arms, tmp_path / "run", "*.safetensors"))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"]["name_or_path"] = str(tmp_path / "gone")
    recipe["tracking"]["wandb"] = "off"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run / "arms/lora/seed-0/result.json").unlink()
    (run / "arms/chain3/seed-0/metrics.jsonl").unlink()
    done = wide_cola("export", run, "--as", "results")
    assert done.exit_code == 0, done.output
    assert "no result of lora seed 0 (not run)" in done.output
    one = json.loads((run / "exports/results/chain3--run-seed0.json").read_text())
    assert one["train_info"]["file_size"] is one["train_info"]["metrics"][-1]["train loss"] is None
    assert {"train_info.file_size", "train_info.metrics.train loss"} <= set(one["cola"]["not_known"])


# ---------------------------------------------------------------------------------------------------------
# The hub


def with_hub_data(run: Path, to: Path, **rows: int) -> Path:
    """A run as if its rows had come from the hub."""
    run = unsealed(copied(run, to))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"] |= {"files": None, "rows": {"train": 24, **rows}}
    recipe["data"]["hub"] = {"name": "some/benchmark", "config": "main", "revision": "0123abcd" * 5}
    recipe["tracking"]["wandb"] = "off"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return run


def test_a_cards_model_index_has_the_test_scores_and_a_benchmark_gets_a_file_of_its_own(
    many_arms: Path, tmp_path: Path
) -> None:
    run = with_hub_data(many_arms, tmp_path / "run")
    done = cola("export", run, "--arm", "lora", "--to", tmp_path / "out", "--benchmark", "main_task")
    assert done.exit_code == 0, done.output
    test = json.loads((run / "arms/lora/seed-0/result.json").read_text())["evaluation"]["test"]
    loss, score = ModelCard.load(tmp_path / "out/README.md").data.eval_results
    assert (loss.metric_type, loss.metric_value) == ("loss", test["loss"])
    assert (score.metric_type, score.metric_value) == ("exact_match", test["score"])
    assert (score.dataset_type, score.dataset_config, score.dataset_split) == ("some/benchmark", "main", "test")
    [file] = (tmp_path / "out/.eval_results").iterdir()
    [entry] = yaml.safe_load(file.read_text())
    assert entry["dataset"] == {"id": "some/benchmark", "task_id": "main_task", "revision": "0123abcd" * 5}
    assert entry["value"] == test["score"]
    assert "exact match of 16 rows of test, as a fraction" in entry["notes"]


def test_scores_that_are_no_benchmarks_are_refused_and_those_of_another_function_left_out(
    many_arms: Path, tmp_path: Path
) -> None:
    sampled = with_hub_data(many_arms, tmp_path / "run", test=16)
    for run, options, says in (
        (many_arms, (), "only a data set of the hub (data.hub) can be a benchmark there"),
        (sampled, (), "16 rows of some/benchmark [test] were drawn (data.rows.test)"),
        (with_hub_data(many_arms, tmp_path / "whole"), ("--rank", 2), "not of its compression or its codes"),
    ):
        told = wide_cola("export", run, "--arm", "lora", "--benchmark", "x", "--to", tmp_path / "out", *options)
        assert_one_line(told)
        assert says in told.output
    assert cola("export", many_arms, "--arm", "lora", "--rank", 2, "--to", tmp_path / "out").exit_code == 0
    assert "model-index" not in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--as", "results", "--rank", 2], "--rank is about a model; it has no effect with --as results"),
        (["--as", "results", "--arm", "base"], "base trains nothing, and PEFT's tables call what has no PEFT config"),
        (["--as", "merged"], "an arm must be named by --arm; only --as results takes all of them"),
    ],
)
def test_what_results_are_not_about_gets_one_line(many_arms: Path, words: list[object], says: str) -> None:
    told = wide_cola("export", many_arms, *words)
    assert_one_line(told)
    assert says in told.output


# ---------------------------------------------------------------------------------------------------------
# vLLM


@pytest.mark.parametrize(
    ("rank", "pattern", "dora", "room", "says"),
    [
        (1, {}, False, 8, "--max-lora-rank 8"),
        (8, {}, False, 8, "--max-lora-rank 8"),
        (9, {"q_proj": 17}, False, 32, "rank 17"),  # vLLM looks at r, and fails at the larger module
        (257, {}, False, 320, "--max-lora-rank 320"),
        (513, {}, False, None, "no max_lora_rank for rank 513"),
        (8, {}, True, None, "no DoRA"),
    ],
)
def test_the_rank_that_vllm_needs_is_the_smallest_it_has_for_the_largest_module(
    rank: int, pattern: dict[str, int], dora: bool, room: int | None, says: str
) -> None:
    found, sentence = serving({"r": rank, "rank_pattern": pattern, "use_dora": dora})
    assert found == room
    assert says in sentence


def test_an_adapter_says_what_vllm_needs_and_has_one_scale_for_all_modules(many_arms: Path, tmp_path: Path) -> None:
    done = cola("export", many_arms, "--arm", "stepdown", "--to", tmp_path / "out")
    sentence = "vLLM serves this adapter of rank 11 with `--enable-lora --max-lora-rank 16`."
    assert sentence in done.output
    assert sentence in (tmp_path / "out/README.md").read_text()
    assert json.loads((tmp_path / "out/cola.json").read_text())["vllm"] == {"max_lora_rank": 16}
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["alpha_pattern"].keys() == config["rank_pattern"].keys() != set()
    scales = {config["alpha_pattern"][name] / config["rank_pattern"][name] for name in config["rank_pattern"]}
    assert scales == {config["lora_alpha"] / config["r"]}


# ---------------------------------------------------------------------------------------------------------
# A digest of each tensor


def bits(tensor: torch.Tensor) -> str:
    return sha256(tensor.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


@pytest.mark.parametrize(("arm", "targets"), [("chain3", 14), ("bf16", 14), ("nf4", 14), ("full", 27)])
def test_targets_alone_differ_from_the_base_and_their_digests_can_be_made_again(
    many_arms: Path, warm_folder: Path, tmp_path: Path, arm: str, targets: int
) -> None:
    done = wide_cola("export", many_arms, "--arm", arm, "--as", "merged", "--to", tmp_path / "out")
    assert done.exit_code == 0, done.output
    said = json.loads((tmp_path / "out/tensors.json").read_text())
    assert said["counts"] == {"differ": targets, "equal": 27 - targets, "only_in_base": 0, "only_in_export": 0}
    assert f"{targets} of 27 tensors differ from the base's and no other than targets" in done.output
    base, ours = (load_file(folder / "model.safetensors") for folder in (warm_folder, tmp_path / "out"))
    assert {name: bits(tensor) for name, tensor in ours.items() if name in said["equal"]} == said["equal"]
    for name, digests in said["differ"].items():
        assert digests["export"] == bits(ours[name])
        assert digests["target"]
        if arm != "nf4":  # there it is of what the codes stand for
            assert digests["base"] == bits(base[name].to(ours[name].dtype))


def test_a_tensor_that_nothing_trains_and_differs_is_refused(many_arms: Path, tmp_path: Path) -> None:
    assert cola("export", many_arms, "--arm", "lora", "--as", "merged", "--to", tmp_path / "out").exit_code == 0
    (tmp_path / "out/tensors.json").unlink()
    [outcome] = outcomes(many_arms, "lora")
    weights = load_file(tmp_path / "out/model.safetensors")
    weights["model.norm.weight"][3] = weights["model.norm.weight"][3].nextafter(torch.tensor(9.0))
    save_file(weights, tmp_path / "out/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors .* though nothing trains them, the first is model\.norm\.weight"):
        tensors.compare(outcome, outcome.residual(), tmp_path / "out")
    assert not (tmp_path / "out/tensors.json").exists()
