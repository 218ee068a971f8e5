"""A tiny random Qwen2 with a tokenizer of its own, made in a second and saved as a Hugging Face folder."""

import fcntl
import gc
import json
import os
import random
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"  # read by the hub's client when it is first imported
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores, and the tiny model needs one

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

# A tiny run waits for the disk 270 times, most of its time; what a test reads, the kernel has, even after a kill.
os.fsync = lambda _: None

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--times", type=int, default=1, help="how often each test of tests/tree/test_leases.py is run")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as Qwen's, over a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = "red blue green yellow what colour is the sky grass sun question answer yes no maybe one two three"
    tokenizer.train_from_iterator([words] * 50, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


SIZES: dict[str, Any] = {  # of a tiny model of any architecture that has Llama's keys
    "vocab_size": 403,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # large enough that what a weight does shows in the logits
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 0,
}


def tiny_config(**settings: object) -> Qwen2Config:
    return Qwen2Config(**{**SIZES, "max_position_embeddings": 256, "bos_token_id": None, **settings})


def tiny_model(seed: int = 0, **settings: object) -> Qwen2ForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(tiny_config(**settings))
    return model.eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads what another, or the developer, has cached; W&B stays offline without a key."""
    cache, looks = tmp_path_factory.mktemp("cache"), tmp_path_factory.getbasetemp() / "looks"
    monkeypatch.setenv("COLA_CACHE", str(cache))
    looks.mkdir(exist_ok=True)
    (cache / "plan").symlink_to(looks)  # but for what a plan has looked at: shapes, by all that they follow from
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    # accelerate fixes device and precision once per process; each test is a process of its own to it.
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def few_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's figures take longer to draw than its tiny trainings: they are, in tests that are marked `drawn`."""
    if request.node.get_closest_marker("drawn") is None:
        monkeypatch.setattr("cola.report.page.figures_of", lambda *_: {})


@pytest.fixture(autouse=True)
def only_on_a_card(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU that torch finds; make gpu runs it")


@pytest.fixture(scope="module", autouse=True)
def little_garbage() -> Iterator[None]:
    """accelerate collects garbage at every link, among all that pytest has loaded: half of a short training's time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The tiny model is too small for two threads to help, and processes that a test starts use one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The tiny model as a local Hugging Face folder."""
    folder = tmp_path_factory.mktemp("tiny-qwen2")
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SKY = {"sky": "blue", "grass": "green", "sun": "yellow", "rose": "red"}


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 rows of a task that a tiny model can learn: {id, question, answer, label, passage}."""
    path = tmp_path_factory.mktemp("data") / "colours.jsonl"
    rng = random.Random(0)
    rows = []
    for number in range(200):
        thing = rng.choice(list(SKY))
        words = " ".join(rng.choices(["one", "two", "three", "maybe"], k=rng.randint(1, 6)))
        rows.append(
            {
                "id": number,
                "question": f"{words} {number} what colour is the {thing}",
                "answer": SKY[thing],
                "label": list(SKY.values()).index(SKY[thing]),
                "passage": f"p{number // 4}",
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PROSE = ["The rain had stopped by noon, and the market filled again.", "Maybe the sky is green there, she wrote."]


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A general text of two lines: the one that comes with cola takes the tiny model as long as a short training."""
    path = tmp_path_factory.mktemp("data") / "prose.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in PROSE))
    return path


def recipe_of(tiny_folder: Path, colours: Path, prose: Path, output: Path) -> str:
    return f"""
name: tiny
model: {{name_or_path: {tiny_folder}}}
data:
  files: {colours}
  rows: {{train: 24, validation: 8, test: 16}}
  task: answer
  prompt: "{{question}}?"
  answer: "{{answer}}"
training: {{epochs: 2, batch_size: 8, learning_rate: 1e-2}}
arms:
  base: {{links: 0}}
  lora: {{links: 1}}
  chain3: {{links: 3}}
  full: {{method: full, learning_rate: 1e-3}}
comparison: {{primary: [chain3, lora]}}
evaluation: {{general_text: {prose}}}
seeds: [0]
tracking: {{wandb: off}}
output: {output}
"""


@pytest.fixture
def recipe_text(tiny_folder: Path, colours: Path, prose: Path, tmp_path: Path) -> str:
    """A whole recipe on the tiny model, seconds to run."""
    return recipe_of(tiny_folder, colours, prose, tmp_path / "runs")


@pytest.fixture
def recipe_file(recipe_text: str, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(recipe_text)
    return path


ARMS = """
  base: {links: 0}
  lora: {links: 1}
  chain3: {links: 3}
  stepdown: {links: [{rank: 6}, {rank: 2, alpha: 5, target_modules: [q_proj, down_proj]}, {rank: 3, alpha: 3}]}
  part3: {links: 3, knot: {merge_fraction: 0.5}}
  kept: {links: 3, knot: {pair: keep, optimizer: keep}}
  dora: {use_dora: true}
  dora2: {use_dora: true, links: 2}
  pissa2: {init: pissa, links: 2}
  nf4: {quantization: nf4, links: 2}
  int8: {quantization: int8, links: 2}
  bf16: {dtype: bfloat16, links: 3}
  naive: {dtype: bfloat16, links: 2, knot: {merge: naive}}
  full: {method: full, learning_rate: 2e-3}
  prefix: {method: prefix, num_virtual_tokens: 4}
  bottleneck: {method: adapter, bottleneck: 8}
"""


def run_once(folder: Path, text: str, *overrides: str) -> Path:
    """A finished run for many tests to read, whose store they do not see."""
    from runs import go

    recipe = folder / "recipe.yaml"
    recipe.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLA_CACHE", str(folder / "cache"))
        AcceleratorState._reset_state(reset_partial_state=True)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in the tests that score its models again, to the bit
        try:
            _, summary = go(recipe, *overrides, folder=folder / "run")
        finally:
            torch.set_num_threads(threads)
    assert not (errors := {name: arm.errors for name, arm in summary.arms.items() if arm.errors}), errors
    return folder / "run"


@contextmanager
def in_turn(tmp_path_factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """A folder of that name that all of xdist's workers share, held by one of them at a time."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / f"shared-{name}"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


@pytest.fixture(scope="session")
def warm_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny model that comes with a generation config of its own, and has no more rows than there are tokens."""
    with in_turn(tmp_path_factory, "warm") as shared:
        folder = shared / "tiny-qwen2"
        if not folder.exists():
            model = tiny_model(vocab_size=len(tokenizer))
            model.generation_config = GenerationConfig(
                do_sample=True, temperature=0.6, top_k=7, eos_token_id=0, pad_token_id=0
            )
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def many_arms(tmp_path_factory: pytest.TempPathFactory, warm_folder: Path, colours: Path, prose: Path) -> Path:
    """The folder of a run with every kind of arm that an export treats in its own way; a worker has its own copy."""
    with in_turn(tmp_path_factory, "many-arms") as shared:
        if not (shared / "run/summary.json").exists():
            run_once(
                shared,
                f"""
name: many
model: {{name_or_path: {warm_folder}}}
data:
  files: {colours}
  rows: {{train: 24, validation: 8, test: 16}}
  task: answer
  prompt: "{{question}}?"
  answer: "{{answer}}"
training: {{epochs: 3, batch_size: 4, learning_rate: 2e-2}}
link: {{rank: 4}}
arms: {ARMS}
evaluation: {{general_text: {prose}}}
seeds: [0]
tracking: {{wandb: off}}
output: {shared}
""",
            )
    return Path(shutil.copytree(shared / "run", tmp_path_factory.mktemp("many-arms") / "run"))


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages of a finished run of four arms and one seed, and of an unfinished one of twelve arms and six."""
    from summaries import many, quickstart, write_run

    from cola.report.page import write_report

    folder = tmp_path_factory.mktemp("pages")
    found = {"quickstart": quickstart(), "many": many(12)}
    return {name: write_report(write_run(folder / name, summary)) for name, summary in found.items()}
