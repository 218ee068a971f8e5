"""Tiny random models of many architectures, each taken the whole way: trained, scored, exported, loaded by other tools.

python tests/architectures.py      tries them all and writes docs/architectures.json, from which docs/generate.py makes
                                   the table of docs/architectures.md
"""

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf
from accelerate import Accelerator
from conftest import SIZES, tiny_tokenizer

from cola.chain import Chain, retie, run_chain
from cola.data.batches import collate, training_row
from cola.data.encode import Example
from cola.errors import ColaError
from cola.export import tensors
from cola.link import adapter_files, adapters
from cola.link.base import Base
from cola.link.drift import Outputs
from cola.link.find import find_model
from cola.link.forward import logits_at
from cola.link.model import Source
from cola.link.residual import stacked
from cola.link.train import tune
from cola.measure.evaluate import Evaluator, Ways
from cola.measure.selfcheck import Subject, self_check
from cola.recipe import recipe
from cola.recipe.methods import settings_of
from cola.recipe.plan import Link
from cola.recipe.resolved import Rules

RESULTS = Path(__file__).parent.parent / "docs/architectures.json"
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 0, "eos_token_id": 0}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA3N = {
    "head_dim": 8,
    "vocab_size_per_layer_input": 403,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 1,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "num_hidden_layers": 3,
    "laurel_rank": 4,
    "intermediate_size": 48,
    "activation_sparsity_pattern": [0.0] * 3,
    "sliding_window": 8,
}


def of(kind: str, **settings: Any) -> hf.PreTrainedModel:
    """A causal language model of a kind, in the common sizes but for what is said."""
    sizes = {key: value for key, value in (SIZES | settings).items() if value is not None}
    return getattr(hf, f"{kind}ForCausalLM")(getattr(hf, f"{kind}Config")(**sizes))


def gemma3_that_sees() -> hf.PreTrainedModel:
    text = hf.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=8).to_dict()
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 400, "boi_token_index": 401, "eoi_token_index": 402}
    return hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(text_config=text, vision_config=VISION, **tokens))


MODELS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "Llama": partial(of, "Llama", tie_word_embeddings=True),
    "Qwen2": partial(of, "Qwen2"),
    "Qwen3": partial(of, "Qwen3", head_dim=8),
    "Mistral": partial(of, "Mistral", sliding_window=8),
    "Gemma 2": partial(of, "Gemma2", head_dim=8, sliding_window=8),
    "Gemma 3, text": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=8)),
    "Gemma 3, with vision": gemma3_that_sees,
    "Gemma 3n, text": lambda: hf.Gemma3nForCausalLM(hf.Gemma3nTextConfig(**(SIZES | GEMMA3N))),
    "Phi-3": partial(of, "Phi3"),
    "GPT-2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=403, initializer_range=0.2, **GPT2)),
    "GPT-NeoX": partial(of, "GPTNeoX", num_key_value_heads=None),
    "OPT": partial(of, "OPT", **OPT),
    "Mixtral": partial(of, "Mixtral", **MOE),
    "Qwen3-MoE": partial(of, "Qwen3Moe", head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "Mamba": partial(of, "Mamba", state_size=8, intermediate_size=None),
    "LFM2": partial(of, "Lfm2", layer_types=["conv", "full_attention"]),
    "Jamba": partial(
        of, "Jamba", mamba_d_state=8, use_mamba_kernels=False, num_experts=2, attn_layer_period=2, attn_layer_offset=1
    ),
    "Falcon-H1": partial(of, "FalconH1", mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
}
ARMS: dict[str, list[dict[str, Any]]] = {
    "base": [],
    "LoRA": [{"method": "lora"}],
    "chain of 2": [{"method": "lora"}, {"method": "lora"}],
    "full": [{"method": "full"}],
}
PAIR = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "target_modules": "all-linear"}
ADAMW = {"betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 0.01, "max_grad_norm": 1.0}
IDS = torch.randint(3, 400, (3, 12), generator=torch.Generator().manual_seed(0))


def make(name: str) -> hf.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name]().eval().requires_grad_(False)


def rows_of(task: str, tokenizer: hf.PreTrainedTokenizerBase) -> list[Example]:
    """Two rows of different lengths; choices of different lengths."""
    rows = []
    for n in range(2):
        prompt, answers = IDS[n, : 5 + n].tolist(), [[50], [60, 61], [70, 71, 72]]
        if task == "answer":
            answers = [[80, 81, 0]]
        elif task == "text":
            answers = [IDS[n, 5 + n :].tolist()]
        texts = [str(tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]
        rows.append(Example(f"{task}-{n}", prompt, answers, 0, texts, None))
    return rows


def links_of(arm: str) -> list[Link]:
    links = [settings_of(link | PAIR if link["method"] == "lora" else link) for link in ARMS[arm]]
    place = {"knot": None, "learning_rates": (1e-2,)}
    return [Link(settings=settings, first_step=n, seed=n, **place) for n, settings in enumerate(links)]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def probe(model: hf.PreTrainedModel) -> Outputs:
    batch = collate([("row", ids[:6].tolist(), ids[6:].tolist()) for ids in IDS])
    with torch.no_grad():
        return Outputs(logits_at(model.eval(), batch.input_ids_BT, batch.predicts_BT), batch.targets_N)


def trained(source: Source, arm: str, rows: Sequence[Example]) -> Chain:
    """The arm after one step a link."""
    model = source.load("float32", torch.device("cpu"))
    chain = Chain(model, Base(model, source.files), Rules())

    def tune_link(chain: Chain, link: Link) -> None:
        tune(chain.model, link, [[collate(list(map(training_row, rows)))]], Accelerator(), lambda *_: None, **ADAMW)

    for knot in run_chain(chain, links_of(arm), tune_link, probe, lambda *_: {}):
        knot.drift.check(1e-4)
    return chain


def check_loaded(expected: torch.Tensor, model: torch.nn.Module) -> None:
    found = logits(model)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3), (found - expected).abs().max()


def check_scores(model: hf.PreTrainedModel, plain: hf.PreTrainedModel, tokenizer: hf.PreTrainedTokenizerBase) -> None:
    """cola's scores of a model are those of plain passes of the same model as transformers loads it."""
    for task in ("answer", "multiple_choice", "text"):
        rows = rows_of(task, tokenizer)
        evaluator = Evaluator(task, tokenizer, [], 4096, nullcontext, 4)
        ways = Ways(**self_check(Subject("tiny", model, evaluator, rows))["ways"])
        scores = evaluator.asking(ways)(model, rows)
        for row, score in zip(rows, scores, strict=True):
            nats = []
            for answer in row.answers:
                with torch.no_grad():
                    table = plain(torch.tensor([row.prompt + answer])).logits[0].float().log_softmax(-1)
                at = range(len(row.prompt) - 1, len(row.prompt) + len(answer) - 1)
                nats.append(-sum(table[place, token].item() for place, token in zip(at, answer, strict=True)))
            assert abs(score.nats - nats[0]) < 1e-3 * max(1, nats[0]), (task, score.nats, nats[0])
            if task == "multiple_choice":
                assert score.prediction == min(range(3), key=nats.__getitem__)
            if task == "answer":
                ids = torch.tensor([row.prompt])
                said = plain.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=0, pad_token_id=0)
                assert score.prediction == tokenizer.decode(said[0, len(row.prompt) :], skip_special_tokens=True)


def examined(name: str, arm: str, folder: Path, tokenizer: hf.PreTrainedTokenizerBase) -> str:
    """`yes` where an arm of an architecture goes the whole way, else the line that cola gives.

    Raises:
        AssertionError: two ways that should give the same numbers do not.
    """
    base = folder / "base"
    if not base.is_dir():
        make(name).save_pretrained(base)
        tokenizer.save_pretrained(base)
    try:
        source = find_model(recipe.Model(name_or_path=str(base)))
        for link in links_of(arm):
            adapters.attach(source.skeleton(), link.settings, 0)  # as a run does before anything is trained
        chain = trained(source, arm, rows_of("answer", tokenizer))
    except ColaError as error:
        return str(error)
    expected = logits(chain.model)
    load = hf.AutoModelForCausalLM.from_pretrained
    if arm == "full":
        adapter_files.save(folder / "full", chain.model, links_of(arm)[0].settings, str(base), source.skeleton())
        plain = load(folder / "full")
    elif arm == "base":
        plain = load(base)
    else:
        adapter_files.save_pair(folder / arm, stacked(chain.learned), str(base), source.skeleton())
        check_loaded(expected, peft.PeftModel.from_pretrained(load(base), folder / arm))
        merged = Chain(model := source.load("float32", torch.device("cpu")), Base(model, source.files), chain.rules)
        retie(merged, chain.learned)
        merged.model.save_pretrained(folder / f"{arm}-merged")
        written = Source("merged", folder / f"{arm}-merged", False)
        found = tensors.compared(tensors.stored(source), tensors.stored(written))
        # Layers that take keys and values from others never call their own projections: those learn nothing.
        moved = {name for link in chain.learned for name, pair in link.items() if pair.B_OR.any()}
        assert found.differ.keys() == {f"{name}.weight" for name in moved}
        assert not found.only_in_base + found.only_in_export
        plain = load(folder / f"{arm}-merged")
    check_loaded(expected, plain)
    if arm != "base":
        assert not torch.allclose(expected, logits(load(base)), rtol=1e-3, atol=1e-3)
    check_scores(chain.model, plain.eval(), tokenizer)
    return "yes"


def main() -> int:

    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    found: dict[str, dict[str, str]] = {}
    for name in sys.argv[1:] or MODELS:
        found[name] = {}
        with tempfile.TemporaryDirectory() as folder:
            for arm in ARMS:
                try:
                    found[name][arm] = examined(name, arm, Path(folder), tiny_tokenizer())
                except Exception as error:
                    found[name][arm] = f"fault: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                print(name, "|", arm, "|", found[name][arm], flush=True)
    faults = [line for arms in found.values() for line in arms.values() if line.startswith("fault")]
    if not sys.argv[1:]:
        versions = {"transformers": hf.__version__, "peft": peft.__version__, "torch": torch.__version__}
        RESULTS.write_text(json.dumps({"versions": versions, "architectures": found}, indent=1) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
