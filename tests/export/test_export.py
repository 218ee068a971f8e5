"""What an arm leaves for other tools, loaded by those tools alone. Run: pytest tests/export/test_export.py"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from children import stop_at_call
from conftest import run_once
from huggingface_hub import ModelCard
from peft import PeftModel
from runs import cola, unsealed
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from cola.export.outcome import outcomes
from cola.files import pip_install
from cola.link import adapters

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CODES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}

# ---------------------------------------------------------------------------------------------------------
# Plain transformers and PEFT


def exported(run: Path, arm: str, form: str = "adapter", *options: object, to: Path | None = None) -> Path:
    """An export by the command line; without options it is made once."""
    folder = to or run / "exports" / f"{arm}-seed0-{form}"
    if not folder.exists():
        where = ["--to", to] if to else []
        done = cola("export", run, "--arm", arm, "--as", form, *options, *where)
        assert done.exit_code == 0, done.output
    return folder


def plain(folder: Path, codes: str | None = None) -> PreTrainedModel:
    """A model by transformers alone, its linear layers as bitsandbytes' codes if wanted."""
    quantized = {}
    if codes:
        quantized = {"quantization_config": BitsAndBytesConfig(**CODES[codes]), "device_map": {"": "cpu"}}
    return as_trained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **quantized))


def as_trained(model: Any) -> Any:
    """Without what bitsandbytes does on CPUs at scoring time only: it rounds the scales of NF4 codes to bfloat16 where
    the CPU has instructions for it, and the activations to 8 bits beside int8 codes."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.train() if getattr(model, "is_loaded_in_8bit", False) else model.eval()  # nothing here has dropout


def with_adapter(base: Path, adapter: Path, codes: str | None = None) -> PreTrainedModel:
    model = PeftModel.from_pretrained(plain(base, codes), str(adapter))
    return model.train() if codes == "int8" else model.eval()  # pyright: ignore[reportReturnType]


def rows_of(run: Path) -> list[dict[str, Any]]:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    return [json.loads(line) for line in Path(recipe["data"]["files"]["test"]).read_text().splitlines()]


def reported(run: Path, arm: str, seed: int = 0, split: str = "test") -> list[dict[str, Any]]:
    lines = (run / f"arms/{arm}/seed-{seed}/scores/{split}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@torch.no_grad()
def losses(model: Any, folder: Path, run: Path, arm: str) -> list[float]:
    """-log p of the answer and the end token after the prompt, from text, one unpadded row at a time."""
    tokenizer, rows = AutoTokenizer.from_pretrained(folder), rows_of(run)
    found = []
    for score in reported(run, arm):
        row = rows[int(score["id"].rpartition(":")[2]) - 1]
        prompt = f"{row['question']}?"
        n_prompt = len(tokenizer(prompt).input_ids)
        ids = [*tokenizer(f"{prompt} {row['answer']}").input_ids, tokenizer.eos_token_id]
        log_p = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        # Virtual tokens of a prompt-tuned model stand before the row.
        log_p = log_p[-len(ids) :]
        found.append(-sum(log_p[t - 1, ids[t]].item() for t in range(n_prompt, len(ids))))
    return found


def run_losses(run: Path, arm: str) -> list[float]:
    return [score["nats"] for score in reported(run, arm)]


INPUTS = torch.randint(3, 300, (3, 17), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=INPUTS).logits.float()


def relative(ours: Tensor, reference: Tensor) -> float:
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def own_model(run: Path, arm: str) -> PreTrainedModel:
    return outcomes(run, arm)[0].load(CPU)


# ---------------------------------------------------------------------------------------------------------
# Adapter

QUANTIZED = {"nf4": "nf4", "int8": "int8"}
RANKS = {"lora": 4, "chain3": 12, "part3": 12, "kept": 4, "dora": 4, "pissa2": 16, "nf4": 8, "int8": 8, "prefix": None}


@pytest.mark.parametrize("arm", [*RANKS, "stepdown"])
def test_plain_peft_gives_the_runs_logits_and_losses_from_the_exported_adapter(
    many_arms: Path, warm_folder: Path, arm: str
) -> None:
    folder, codes = exported(many_arms, arm), QUANTIZED.get(arm)
    model = with_adapter(warm_folder, folder, codes)
    assert losses(model, warm_folder, many_arms, arm) == pytest.approx(run_losses(many_arms, arm), rel=2e-5)
    assert relative(logits(model), logits(own_model(many_arms, arm))) < 1e-5
    assert relative(logits(model), logits(plain(warm_folder, codes))) > 1e-2
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(warm_folder)
    if arm != "prefix":
        assert config["peft_type"] == "LORA"
    if RANKS.get(arm):
        assert config["r"] == RANKS[arm]
        assert config["rank_pattern"] == {}


def test_links_of_other_ranks_on_other_modules_are_one_adapter_of_their_sums(many_arms: Path) -> None:
    folder = exported(many_arms, "stepdown")
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    ranks = {key.split(".")[-3]: len(value) for key, value in tensors.items() if "lora_A" in key}
    assert ranks == {"q_proj": 11, "down_proj": 11} | dict.fromkeys(
        ("k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), 9
    )
    assert config["r"] == 9
    assert set(config["rank_pattern"].values()) == {11}
    assert len(config["rank_pattern"]) == len(config["alpha_pattern"]) == 4  # two modules in two layers


@torch.no_grad()
def test_the_adapter_merged_by_peft_is_the_merged_checkpoint(many_arms: Path, warm_folder: Path) -> None:
    by_peft: Any = with_adapter(warm_folder, exported(many_arms, "stepdown"))
    ours = plain(exported(many_arms, "stepdown", "merged")).state_dict()
    for name, weight in by_peft.merge_and_unload().state_dict().items():
        assert torch.allclose(ours[name], weight, rtol=0, atol=1e-6), name


# ---------------------------------------------------------------------------------------------------------
# Merged

MERGED = ["lora", "chain3", "stepdown", "part3", "kept", "dora2", "pissa2", "full", "nf4", "int8"]


@pytest.mark.parametrize("arm", MERGED)
def test_plain_transformers_gives_the_runs_losses_from_the_merged_folder_alone(many_arms: Path, arm: str) -> None:
    folder = exported(many_arms, arm, "merged")
    model = plain(folder)
    assert losses(model, folder, many_arms, arm) == pytest.approx(run_losses(many_arms, arm), rel=1e-4)
    assert relative(logits(model), logits(own_model(many_arms, arm))) < 1e-5
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def sum_of_links(run: Path, arm: str, name: str, absolute: bool = False) -> Tensor:
    """Σ s B A of one matrix in float64, from the knots that the run has kept; or of what its terms are in size."""
    total = torch.zeros((), dtype=torch.float64)
    for folder in sorted((run / f"arms/{arm}/seed-0/knots").iterdir()):
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        key = f"base_model.model.{name}.lora_"
        if f"{key}A.weight" in tensors:
            scale = config["alpha_pattern"].get(name, config["lora_alpha"]) / config["rank_pattern"].get(
                name, config["r"]
            )
            B_OR, A_RI = tensors[f"{key}B.weight"].double(), tensors[f"{key}A.weight"].double()
            total = total + scale * (B_OR.abs() @ A_RI.abs() if absolute else B_OR @ A_RI)
    return total


def steps_apart(a: Tensor, b: Tensor) -> Tensor:
    """How many representable numbers lie between two tensors of one dtype."""
    whole = {2: torch.int16, 4: torch.int32}[a.element_size()]

    def place(x: Tensor) -> Tensor:
        bits = x.contiguous().view(whole).long()
        return torch.where(bits < 0, -(bits + 2 ** (8 * x.element_size() - 1)), bits)  # sign and magnitude

    return (place(a) - place(b)).abs()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("arm", ["chain3", "stepdown", "bf16"])
def test_every_merged_weight_is_the_sum_in_float64_rounded_once(
    many_arms: Path, warm_folder: Path, tmp_path: Path, arm: str, dtype: str
) -> None:
    folder = exported(many_arms, arm, "merged", "--dtype", dtype, to=tmp_path / "merged")
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    base, ours = (load_file(path / "model.safetensors") for path in (warm_folder, folder))
    assert base.keys() == ours.keys()
    exact = n_learned = 0
    for key, weight in base.items():
        learned = sum_of_links(many_arms, arm, key.removesuffix(".weight"))
        expected = (weight.double() + learned).to(getattr(torch, dtype))
        assert ours[key].dtype == expected.dtype
        if not learned.ndim:
            assert torch.equal(ours[key], expected), key
            continue
        n_learned += expected.numel()
        exact += int((ours[key] == expected).sum())
        if dtype == "float32":  # a last place of the terms may be many of the sum: a few of them, for 12 terms
            size = weight.double().abs() + sum_of_links(many_arms, arm, key.removesuffix(".weight"), absolute=True)
            assert ((ours[key].double() - weight.double() - learned).abs() <= 2**-21 * size).all(), key
        else:
            assert steps_apart(ours[key], expected).max() <= 1, key
    assert n_learned
    assert exact / n_learned > (0.5 if dtype == "float32" else 0.999)


def test_one_link_is_pefts_own_merge_to_the_last_place(many_arms: Path, warm_folder: Path) -> None:
    knot = many_arms / "arms/lora/seed-0/knots/link-1"
    by_peft: Any = with_adapter(warm_folder, knot)
    expected = by_peft.merge_and_unload().state_dict()
    ours = load_file(exported(many_arms, "lora", "merged") / "model.safetensors")
    assert ours.keys() == expected.keys()
    for name, weight in ours.items():
        apart = steps_apart(weight, expected[name])
        same_size = (weight - expected[name]).abs() <= 2**-23 * expected[name].abs().max()
        assert ((apart <= 1) | same_size).all(), name
        assert (apart <= 1).float().mean() > 0.99, name


def test_generation_config_and_tokenizer_are_the_bases_own(many_arms: Path, warm_folder: Path) -> None:
    folder = exported(many_arms, "chain3", "merged")
    assert (folder / "generation_config.json").read_text() == (warm_folder / "generation_config.json").read_text()
    assert GenerationConfig.from_pretrained(folder).temperature == 0.6
    ours, base = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(warm_folder)
    assert ours.backend_tokenizer.to_str() == base.backend_tokenizer.to_str()
    assert (ours.chat_template, ours.special_tokens_map) == (base.chat_template, base.special_tokens_map)


@pytest.fixture(scope="module")
def gpt2_run(tmp_path_factory: pytest.TempPathFactory, colours: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Conv1D weights, a tied head, no generation config, shards, two seeds."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    sizes = {"vocab_size": 403, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    model = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(folder / "base", max_shard_size="50KB")
    tokenizer.save_pretrained(folder / "base")
    (folder / "base/generation_config.json").unlink()
    return run_once(
        folder,
        f"""
name: gpt2
model: {{name_or_path: {folder / "base"}}}
data:
  files: {colours}
  rows: {{train: 16, validation: 8, test: 8}}
  task: answer
  prompt: "{{question}}?"
  answer: "{{answer}}"
training: {{epochs: 2, batch_size: 4, learning_rate: 1e-2}}
arms:
  chain2: {{links: [{{rank: 4}}, {{rank: 2, target_modules: [c_attn, c_fc]}}]}}
seeds: [0, 1]
tracking: {{wandb: off}}
output: {folder}
""",
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["adapter", "merged", "knots"])
def test_a_transposed_weight_and_a_tied_head_come_through(gpt2_run: Path, tmp_path: Path, form: str) -> None:
    base = gpt2_run.parent / "base"
    assert len(list(base.glob("model-*.safetensors"))) > 1
    folder = exported(gpt2_run, "chain2", form, "--seed", 0, to=tmp_path / form)
    if form == "merged":
        model = plain(folder)
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        with safe_open(folder / "model.safetensors", framework="pt") as opened:
            assert "lm_head.weight" not in opened.keys()  # noqa: SIM118 - it is no mapping
        assert not (folder / "generation_config.json").exists()  # the base has none
        assert model.generation_config.eos_token_id == 0  # so that decoding ends where the base's does
    elif form == "adapter":
        model = with_adapter(base, folder)
        assert json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"]
    else:
        model = plain(base)
        for link in ("link-1", "link-2"):
            model = PeftModel.from_pretrained(model, str(folder / link)).merge_and_unload()
    assert losses(model, base, gpt2_run, "chain2") == pytest.approx(run_losses(gpt2_run, "chain2"), rel=5e-5)


# ---------------------------------------------------------------------------------------------------------
# Knots, and a checkpoint between two of them


@pytest.mark.parametrize(
    ("arm", "links"), [("chain3", 3), ("stepdown", 3), ("part3", 3), ("dora2", 2), ("pissa2", 2), ("kept", 1)]
)
def test_knots_merged_one_after_another_by_peft_are_the_merged_checkpoint(
    many_arms: Path, warm_folder: Path, arm: str, links: int
) -> None:
    folder = exported(many_arms, arm, "knots")
    found = sorted(path.name for path in folder.glob("link-*"))
    assert len(found) == links
    model: Any = plain(warm_folder)
    for name in found:
        model = PeftModel.from_pretrained(model, str(folder / name)).merge_and_unload()
    ours = plain(exported(many_arms, arm, "merged")).state_dict()
    for name, weight in model.state_dict().items():
        assert torch.allclose(weight, ours[name], rtol=0, atol=2e-6), name


def test_the_code_on_the_card_of_the_knots_runs_and_gives_the_model(
    many_arms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported(many_arms, "chain3", "knots")
    monkeypatch.chdir(folder.parent)
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    made: dict[str, Any] = {}
    exec(code, made)
    assert relative(logits(made["model"]), logits(own_model(many_arms, "chain3"))) < 1e-5


@pytest.fixture(scope="module")
def best_run(tmp_path_factory: pytest.TempPathFactory, warm_folder: Path, colours: Path) -> Path:
    """Scored inside a link: none ends where validation is looked at, and the last one's rate spoils what is learned."""
    folder = tmp_path_factory.mktemp("best")
    return run_once(
        folder,
        f"""
name: best
model: {{name_or_path: {warm_folder}}}
data:
  files: {colours}
  rows: {{train: 24, validation: 8, test: 16}}
  task: answer
  prompt: "row {{id}}"
  answer: "{{answer}}"
training: {{epochs: 8, batch_size: 8, learning_rate: 3e-2, schedule: constant}}
link: {{rank: 16}}
evaluation: {{checkpoint: best, every: 5}}
arms:
  chain3: {{links: [{{}}, {{}}, {{learning_rate: 0.3}}]}}
seeds: [0]
tracking: {{wandb: off}}
output: {folder}
""",
    )


@pytest.mark.slow
def test_a_checkpoint_inside_a_link_is_exported_as_it_was_scored(best_run: Path, warm_folder: Path) -> None:
    info = json.loads((best_run / "arms/chain3/seed-0/result.json").read_text())["train_info"]
    ends = [link["last_step"] for link in info["links"]]
    assert info["scored_step"] not in ends
    assert info["scored_step"] < ends[-1]
    scored = own_model(best_run, "chain3")
    for model in (
        with_adapter(warm_folder, exported(best_run, "chain3")),
        plain(exported(best_run, "chain3", "merged")),
    ):
        assert relative(logits(model), logits(scored)) < 1e-5
    done = cola("eval", exported(best_run, "chain3"), "--data", best_run, "--out", best_run / "eval")
    assert done.exit_code == 0, done.output
    [evaluation] = json.loads((best_run / "eval/eval.json").read_text()).values()
    loss = json.loads((best_run / "arms/chain3/seed-0/result.json").read_text())["evaluation"]["test"]["loss"]
    assert evaluation["test"]["loss"] == pytest.approx(loss, rel=1e-5)
    knots = exported(best_run, "chain3", "knots")
    assert len(list(knots.glob("link-*"))) == 1 + sum(end <= info["scored_step"] for end in ends)


# ---------------------------------------------------------------------------------------------------------
# Compression


def dense(folder: Path) -> dict[str, Tensor]:
    """Each module's update in float64, from an adapter's files."""
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    updates = {}
    for key, A_RI in tensors.items():
        if "lora_A" in key:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            scale = config["alpha_pattern"].get(name, config["lora_alpha"]) / len(A_RI)
            updates[name] = scale * tensors[key.replace("lora_A", "lora_B")].double() @ A_RI.double()
    return updates


@pytest.mark.parametrize("arm", ["chain3", "stepdown"])
def test_compression_is_the_best_there_is_and_says_what_it_keeps(many_arms: Path, tmp_path: Path, arm: str) -> None:
    whole = dense(exported(many_arms, arm))
    folder = exported(many_arms, arm, "adapter", "--rank", 3, to=tmp_path / "r3")
    note = json.loads((folder / "cola.json").read_text())["compression"]
    small = dense(folder)
    assert small.keys() == whole.keys() == note["energy"].keys()
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 3
    for name, update in whole.items():
        values = torch.linalg.svdvals(update)
        # Eckart-Young: no matrix of rank 3 is nearer.
        error = (update - small[name]).norm().item()
        assert error == pytest.approx(values[3:].norm().item(), rel=1e-5)
        assert torch.linalg.svdvals(small[name])[3] < 1e-6 * values[0]
        kept = (values[:3].square().sum() / values.square().sum()).item()
        assert note["energy"][name] == pytest.approx(kept, rel=1e-6)
        assert kept < 0.999


@pytest.mark.slow
def test_what_compression_prints_is_what_cola_eval_finds(many_arms: Path, tmp_path: Path) -> None:
    done = cola("export", many_arms, "--arm", "chain3", "--rank", 2, "--to", tmp_path / "r2")
    assert done.exit_code == 0, done.output
    note = json.loads((tmp_path / "r2/cola.json").read_text())["compression"]
    shares, whole = note["energy"], dense(exported(many_arms, "chain3"))
    total = sum(update.square().sum().item() for update in whole.values())
    kept = sum(shares[name] * update.square().sum().item() for name, update in whole.items()) / total
    least = min(shares, key=shares.__getitem__)
    before, after = note["validation_before"], note["validation_after"]
    line = (
        f"Compressed to rank 2: {kept:.2%} of the update's energy is kept (least: {shares[least]:.2%}, {least}); "
        f"validation loss {before['loss']:.4f} → {after['loss']:.4f}, score {before['score']:.4f} → "
        f"{after['score']:.4f}."
    )
    assert line in done.output
    assert line in (tmp_path / "r2/README.md").read_text()
    result = json.loads((many_arms / "arms/chain3/seed-0/result.json").read_text())
    assert before == result["evaluation"]["validation"]
    scored = cola("eval", tmp_path / "r2", "--data", many_arms, "--split", "validation", "--out", tmp_path / "eval")
    assert scored.exit_code == 0, scored.output
    [evaluation] = json.loads((tmp_path / "eval/eval.json").read_text()).values()
    assert evaluation["validation"]["loss"] == pytest.approx(after["loss"], rel=1e-5)
    assert evaluation["validation"]["score"] == after["score"]


def test_the_chains_own_rank_keeps_everything_and_may_be_merged(
    many_arms: Path, warm_folder: Path, tmp_path: Path
) -> None:
    folder = exported(many_arms, "chain3", "merged", "--rank", 64, to=tmp_path / "all")
    note = json.loads((folder / "cola.json").read_text())["compression"]
    assert set(note["energy"].values()) == {1.0}
    assert note["validation_after"]["loss"] == pytest.approx(note["validation_before"]["loss"], rel=1e-5)
    assert relative(logits(plain(folder)), logits(own_model(many_arms, "chain3"))) < 1e-5


# ---------------------------------------------------------------------------------------------------------
# Quantized


@pytest.mark.slow
@pytest.mark.parametrize(("arm", "codes"), [("chain3", "nf4"), ("chain3", "int8"), ("full", "nf4"), ("nf4", "nf4")])
def test_a_quantized_export_holds_bitsandbytes_codes_of_the_merged_dense_weights(
    many_arms: Path, warm_folder: Path, tmp_path: Path, arm: str, codes: str
) -> None:
    done = cola(
        "export", many_arms, "--arm", arm, "--as", "merged", "--quantization", codes, "--to", tmp_path / "codes"
    )
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "codes/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitsandbytes"
    loaded = as_trained(AutoModelForCausalLM.from_pretrained(tmp_path / "codes"))  # it says itself what it is
    dense_model = plain(warm_folder)
    if arm == "full":
        dense_model = plain(many_arms / "arms/full/seed-0/model")
    else:
        with torch.no_grad():
            for name, module in dense_model.named_modules():
                if (learned := sum_of_links(many_arms, arm, name)).ndim:
                    module.weight.copy_((module.weight.double() + learned).float())
    dense_model.save_pretrained(tmp_path / "dense")
    reference = plain(tmp_path / "dense", codes)
    ours, theirs = loaded.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    coded = [name for name in ours if name.endswith("proj.weight")]
    assert {ours[name].dtype for name in coded} == {{"nf4": torch.uint8, "int8": torch.int8}[codes]}
    assert len(coded) == 14
    for name in coded:  # a weight on the edge of two codes may fall to either side by its last place
        assert (ours[name] != theirs[name]).float().mean() < 2e-3, name
    assert relative(logits(loaded), logits(reference)) < 0.02
    note = json.loads((tmp_path / "codes/cola.json").read_text())["quantized"]
    assert note["validation_after"] != note["validation_before"]
    after = note["validation_after"]["loss"]
    assert f"→ {after:.4f}" in done.output
    assert f"→ {after:.4f}" in (tmp_path / "codes/README.md").read_text()
    scored = cola("eval", tmp_path / "codes", "--data", many_arms, "--split", "validation", "--out", tmp_path / "eval")
    assert scored.exit_code == 0, scored.output
    [evaluation] = json.loads((tmp_path / "eval/eval.json").read_text()).values()
    assert evaluation["validation"]["loss"] == pytest.approx(after, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------
# The card


@pytest.mark.parametrize(
    ("arm", "form", "library"),
    [
        ("chain3", "adapter", "peft"),
        ("prefix", "adapter", "peft"),
        ("nf4", "adapter", "peft"),
        ("full", "merged", "transformers"),
        ("stepdown", "merged", "transformers"),
        ("chain3", "knots", "peft"),
    ],
)
def test_the_card_says_what_it_is_and_how_it_was_made(
    many_arms: Path, warm_folder: Path, arm: str, form: str, library: str
) -> None:
    folder = exported(many_arms, arm, form)
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == library
    assert "chain-of-lora" in card.data.tags
    assert card.data.base_model is None  # a folder of this disk is no model of the hub
    text = card.text
    note = json.loads((folder / "cola.json").read_text())
    provenance = json.loads((many_arms / "provenance.json").read_text())
    assert str(warm_folder) in text
    assert note["base"]["sha256"] == provenance["model"]["sha256"]
    assert note["base"]["sha256"][:16] in text
    result = json.loads((many_arms / f"arms/{arm}/seed-0/result.json").read_text())
    assert note["run"]["evaluation"] == result["evaluation"]
    for split in ("train", "validation", "test"):
        numbers = result["evaluation"][split]
        assert f"| {split} | {numbers['loss']:.4f} | {numbers['score']:.4f} | {numbers['n']} |" in text
    assert f"| gap | {result['evaluation']['gap_loss']:+.4f} | {result['evaluation']['gap_acc']:+.4f} |" in text
    for number, link in enumerate(result["train_info"]["links"], 1):
        assert f"| {number}, {link['method']} | {link['first_step'] + 1}–{link['last_step']} |" in text
    assert (many_arms / "recipe.yaml").read_text() in text
    assert f"cola {note['cola']}" in text
    assert f"torch {torch.__version__}" in text


def test_a_prompt_with_backticks_and_html_cannot_leave_the_cards_code_block(many_arms: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    unsealed(shutil.copytree(many_arms, run, ignore=shutil.ignore_patterns("exports")))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["tracking"]["wandb"] = "off"  # which YAML 1.1 reads as a no
    recipe["data"]["prompt"] = "```\n</details><script>alert(1)</script>\n````\n{question}?\n"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, default_style="|", sort_keys=False))
    text = (exported(run, "lora") / "README.md").read_text()
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if re.fullmatch(r"`{3,}yaml", line))
    fence = lines[start].removesuffix("yaml")
    # By CommonMark a block ends at the first line of at least as many backticks, indented by up to three spaces.
    end = next(
        i for i, line in enumerate(lines[start + 1 :], start + 1) if re.fullmatch(rf" {{0,3}}{fence}`*\s*", line)
    )
    inside = "\n".join(lines[start + 1 : end])
    assert yaml.safe_load(inside)["data"]["prompt"] == recipe["data"]["prompt"]
    assert inside.strip() == (run / "recipe.yaml").read_text().strip()
    assert "<script>" not in "\n".join(lines[:start] + lines[end:])


def test_an_export_can_be_read_by_others_and_shows_its_parts(many_arms: Path) -> None:
    for folder in (exported(many_arms, "chain3"), exported(many_arms, "chain3", "knots")):
        written = (many_arms / "provenance.json").stat().st_mode & 0o444
        for path in folder.rglob("*"):
            assert path.is_dir() or path.stat().st_mode & 0o444 == written, path
        assert folder.stat().st_mode & 0o444 == written


# ---------------------------------------------------------------------------------------------------------
# Bad input


def refused(*words: object) -> str:
    """The one line that a refused command says on stderr."""
    done = cola(*words)
    assert done.exit_code == 2, done.output
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--arm", "chian3"], "has no arm 'chian3'; did you mean chain3?"),
        (["--arm", "chain3", "--seed", 4], "has no seed 4; it has 0"),
        (["--arm", "base"], "arm base trains nothing, so there is nothing to export"),
        (["--arm", "full"], "full fine-tuning is no adapter; export it --as merged"),
        (["--arm", "full", "--as", "knots"], "arm full has no knots: full leaves no low-rank pair"),
        (["--arm", "prefix", "--as", "knots"], "arm prefix has no knots: prefix leaves no low-rank pair"),
        (["--arm", "prefix", "--as", "merged"], "prefix cannot be merged into the weights, nor quantized"),
        (["--arm", "prefix", "--as", "merged", "--quantization", "nf4"], "nor quantized; export it --as adapter"),
        (["--arm", "bottleneck"], "no other tool loads bottleneck adapters; cola eval scores the run"),
        (["--arm", "chain3", "--dtype", "bfloat16"], "--dtype belongs to --as merged"),
        (["--arm", "chain3", "--quantization", "nf4"], "--quantization belongs to --as merged"),
        (["--arm", "chain3", "--as", "knots", "--rank", 2], "--rank compresses the chain as a whole"),
        (["--arm", "full", "--as", "merged", "--rank", 2], "arm full has no knots"),
        (["--arm", "dora2"], "DoRA scales whole rows of the weight"),
        (["--arm", "dora", "--rank", 2], "DoRA scales whole rows of the weight"),
    ],
)
def test_what_an_arm_does_not_have_gets_one_line_and_leaves_nothing(
    many_arms: Path, tmp_path: Path, words: list[object], says: str
) -> None:
    assert says in refused("export", many_arms, *words, "--to", tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_exists_is_kept(many_arms: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert f"{tmp_path} exists and is kept as it is" in refused("export", many_arms, "--arm", "lora", "--to", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_one_of_several_seeds_must_be_named(gpt2_run: Path) -> None:
    assert "has the seeds 0, 1; name one by --seed" in refused("export", gpt2_run, "--arm", "chain2")


def test_a_run_that_is_none_or_not_finished_is_named(many_arms: Path, tmp_path: Path) -> None:
    assert "is no run folder: it has no recipe.yaml" in refused("export", tmp_path, "--arm", "lora")
    run = tmp_path / "run"
    unsealed(shutil.copytree(many_arms, run, ignore=shutil.ignore_patterns("exports")))
    (run / "arms/lora/seed-0/result.json").unlink()
    line = refused("export", run, "--arm", "lora")
    assert f"no result of lora seed 0 (not run); go on with it by `cola run --resume {run}`" in line
    failed = json.loads((run / "arms/chain3/seed-0/result.json").read_text()) | {"status": "failed"}
    failed["run_info"]["error"] = "step 2: the loss is nan"
    (run / "arms/chain3/seed-0/result.json").write_text(json.dumps(failed))
    assert "no result of chain3 seed 0 (failed)" in refused("export", run, "--arm", "chain3")
    shutil.rmtree(run / "arms/stepdown/seed-0/knots/link-2")
    line = refused("export", run, "--arm", "stepdown")
    assert "link-2 is not there: the run's folder was not copied as a whole" in line
    shutil.rmtree(run / "arms/full/seed-0/model")
    assert "were not kept; run the recipe with keep_full_weights: true" in refused(
        "export", run, "--arm", "full", "--as", "merged"
    )
    (run / "arms/dora/seed-0/knots/link-1/adapter_model.safetensors").write_bytes(b"cut off")
    assert "dora/seed-0/knots/link-1 is damaged (" in refused("export", run, "--arm", "dora")


def test_a_base_that_is_another_one_now_is_refused(many_arms: Path, warm_folder: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    unsealed(shutil.copytree(many_arms, run, ignore=shutil.ignore_patterns("exports")))
    shutil.copytree(warm_folder, other)
    config = json.loads((other / "config.json").read_text()) | {"rms_norm_eps": 1e-5}
    (other / "config.json").write_text(json.dumps(config))
    text = (run / "recipe.yaml").read_text().replace(str(warm_folder), str(other))
    (run / "recipe.yaml").write_text(text)
    for command in (["export", run, "--arm", "lora"], ["eval", run, "--data", run]):
        assert f"{other} is not the base of {run}: its fingerprint is" in refused(*command)
    shutil.rmtree(other)
    assert f"{other}: no such folder" in refused("export", run, "--arm", "lora")


def test_a_push_without_a_network_is_one_line_and_the_export_is_kept(many_arms: Path, tmp_path: Path) -> None:
    done = cola("export", many_arms, "--arm", "lora", "--to", tmp_path / "out", "--push", "me/mine", "--private")
    assert done.exit_code == 2
    [line] = done.stderr.strip().splitlines()
    assert "--push me/mine: the hub did not take it (OfflineModeIsEnabled" in line
    assert f"`hf upload me/mine {tmp_path / 'out'}`" in line
    assert 'PeftModel.from_pretrained(base, "me/mine")' in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_ctrl_c_in_the_middle_leaves_no_half_folder(
    many_arms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    if form == "adapter":  # the signal comes when the weights are there and the rest is not
        config = adapters.LoraConfig
        monkeypatch.setattr(config, "save_pretrained", stop_at_call(1, config.save_pretrained))
    else:
        monkeypatch.setattr(
            PreTrainedTokenizerFast, "save_pretrained", stop_at_call(1, PreTrainedTokenizerFast.save_pretrained)
        )
    done = cola("export", many_arms, "--arm", "chain3", "--as", form, "--to", tmp_path / "out")
    assert done.exit_code == 130
    assert done.stderr.strip() == "interrupted"
    assert not list(tmp_path.iterdir())


def without_bitsandbytes(folder: Path) -> dict[str, str]:
    """The environment of a Python that has everything but bitsandbytes."""
    for place in filter(None, sys.path):
        for path in Path(place).iterdir() if "site-packages" in place else ():
            if not path.name.startswith("bitsandbytes"):
                (folder / path.name).symlink_to(path)
    root = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{folder}"}


@pytest.mark.slow
def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    many_arms: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = ["--to", str(tmp_path / "out")]
    commands = [
        ["export", str(many_arms), "--arm", "chain3", "--as", "merged", "--quantization", "nf4", *out],
        ["export", str(many_arms), "--arm", "nf4", "--as", "merged", *out],
        ["eval", str(many_arms), "--arm", "nf4", "--data", str(many_arms)],
    ]
    # One Python for all of them, which imports for seconds; each line of its output is what a command came to.
    code = (
        "import json, sys; from typer.testing import CliRunner; from cola.cli.app import app\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    done = CliRunner().invoke(app, words)\n"
        "    print(json.dumps([done.exit_code, done.stderr]))"
    )
    # -S: without the folder of installed packages, which PYTHONPATH replaces.
    ran = subprocess.run(
        [sys.executable, "-S", "-c", code, json.dumps(commands)],
        capture_output=True,
        text=True,
        env=without_bitsandbytes(tmp_path_factory.mktemp("packages")),
    )
    assert ran.returncode == 0, ran.stderr
    for words, line in zip(commands, ran.stdout.splitlines(), strict=True):
        exit_code, stderr = json.loads(line)
        assert exit_code == 2, (words, stderr)
        [said] = stderr.strip().splitlines()
        assert "nf4 needs the package bitsandbytes: " + pip_install("'chain-of-lora[quantized]'") in said, words
    assert not list(tmp_path.iterdir())
