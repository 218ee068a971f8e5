"""Fuzz the names: a change of environment or files changes a state's name, or leaves its weights as they were.

    python tests/fuzz_names.py 200             200 changes, each in a process of its own; prints what came of them
    python tests/fuzz_names.py 200 --seed 7    others

Every change is made before cola is imported, which nothing here does at its top: a change of variables is one of those
that the installed libraries read (found in their sources), of torch's switches as a sitecustomize would set them, of
the clock, or of a file of the model or the rows whose times are put back. What is trained is a chain of two and all
weights, by chat prompts whose template asks for the date. A change of files is tried twice, with the caches of the
unchanged run and with none: both must give the same.
"""

import argparse
import contextlib
import gc
import hashlib
import importlib
import io
import json
import mmap
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Change = tuple[str, str, str]  # kind, what, value
States = dict[str, str]  # name -> digest of the weights

TEMPLATE = (
    "Today is {{ strftime_now('%d %b %Y') }}."
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
READS = re.compile(
    r"""(?:environ(?:\.get|\.pop|\.setdefault)?[\[(]|getenv\(|_from_env\(\[?)\s*f?["']([A-Z][A-Z0-9_]+)"""
)
# Of torch's and the libraries under it, which read them in C; and of Python and the system.
IN_C = [
    *("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "ATEN_CPU_CAPABILITY"),
    *("TORCH_LINEAR_FLATTEN_3D", "TORCH_MKLDNN_MATMUL_MIN_DIM", "TORCH_MKLDNN_MATMUL_MIN_SIZE", "MKL_CBWR"),
    *("TORCH_BLAS_PREFER_CUBLASLT", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA"),
    *("DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_DYNAMIC", "MKL_DISABLE_FAST_MM", "OMP_DYNAMIC"),
    *("OMP_SCHEDULE", "KMP_DETERMINISTIC_REDUCTION", "OPENBLAS_CORETYPE", "NPY_DISABLE_CPU_FEATURES"),
    *("FBGEMM_ENABLE_INSTRUCTIONS", "PYTORCH_JIT", "TORCHDYNAMO_DISABLE", "TORCH_LOGS", "PYTORCH_ALLOC_CONF"),
]
SYSTEM = [
    *("LANG", "LC_ALL", "TZ", "TERM", "COLUMNS", "NO_COLOR", "PYTHONHASHSEED", "PYTHONOPTIMIZE", "PYTHONUTF8"),
    *("PYTHONIOENCODING", "SOURCE_DATE_EPOCH", "SLURM_PROCID", "SLURM_NTASKS", "PMI_RANK", "OMPI_COMM_WORLD_RANK"),
    *("HF_HUB_DISABLE_TELEMETRY", "HF_ENABLE_PARALLEL_LOADING", "HF_HUB_ENABLE_HF_TRANSFER", "WANDB_SILENT"),
]
VALUES = ["1", "0", "true", "4", "bf16", "fp16", "no", "cpu", "cuda", "avx2", "DEFAULT", "any", "COMPATIBLE"]
PLAUSIBLE = {
    "PYTHONHASHSEED": ["0", "7"],
    "PYTHONOPTIMIZE": ["1"],
    "PYTHONUTF8": ["0"],
    "PYTHONIOENCODING": ["utf-8", "latin-1"],
    "LANG": ["C", "C.UTF-8"],
    "LC_ALL": ["C", "C.UTF-8", "de_DE.UTF-8"],
    "TZ": ["Asia/Tokyo", "UTC"],
    "COLUMNS": ["40"],
    "TORCH_LOGS": ["+dynamo"],
    "PYTORCH_ALLOC_CONF": ["expandable_segments:True"],
    "SOURCE_DATE_EPOCH": ["0"],
    "WORLD_SIZE": ["1", "2"],
}
EARLY = ("PYTHON", "LC_", "LANG", "NPY_", "OPENBLAS_")  # read when Python begins, or numpy, which is forked with us
SWITCHES = [
    "torch.set_default_dtype(torch.float64)",
    "torch.set_default_dtype(torch.bfloat16)",
    "torch.set_default_device('meta')",
    "torch.set_float32_matmul_precision('medium')",
    "torch.set_float32_matmul_precision('high')",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.backends.cudnn.benchmark = True",
    "torch.backends.mkldnn.enabled = False",
    "torch.backends.cuda.enable_flash_sdp(False)",
    "torch.backends.cuda.enable_math_sdp(False)",
    "torch.set_autocast_enabled('cpu', True)",
    "torch.set_flush_denormal(True)",
    "torch.use_deterministic_algorithms(True)",
    "torch.manual_seed(7)",
    "random.seed(7)",
    "numpy.random.seed(7)",
    "os.umask(0o077)",
    "os.environ.__setitem__('TZ', 'Asia/Tokyo'), time.tzset()",
    *(f"chat_template_utils.datetime = day('20{year}-0{year % 9 + 1}-1{year % 7}')" for year in range(25, 31)),
]


# ---------------------------------------------------------------------------------------------------------
# What there is to train


def write_case(folder: Path) -> None:
    """Model, rows and recipe."""
    from conftest import SKY, tiny_model, tiny_tokenizer

    tiny_model().save_pretrained(folder / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    rows = [{"q": f"{n} what colour is the {thing}", "a": SKY[thing]} for n, thing in enumerate(list(SKY) * 6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "fuzz",
        "model": {"name_or_path": str(folder / "model")},
        "data": {
            "files": str(folder / "rows.jsonl"),
            "rows": {"train": 8, "validation": 2, "test": 2},
            "task": "answer",
            "chat": True,
            "prompt": "{q}?",
            "answer": "{a}",
        },
        "training": {"steps": 2, "batch_size": 2, "learning_rate": 0.01},
        "arms": {"chain": {"links": 2, "rank": 2, "dropout": 0.1}, "full": {"method": "full"}},
        "seeds": [0],
        "evaluation": {"general_text": None},
        "tracking": {"wandb": "off"},
        "output": str(folder / "runs"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))


def train(folder: Path, cache: Path, store: Path) -> States:
    """The states of a run with a store of its own, and their weights."""
    os.environ["COLA_CACHE"] = str(cache)
    from rich.console import Console
    from runs import create_run

    from cola.recipe.read import read_recipe
    from cola.report.terminal import Terminal
    from cola.run.run import run

    recipe = read_recipe(folder / "recipe.yaml", [f"store={store}"])
    made = create_run(recipe)
    summary = run(recipe, made, Terminal(Console(file=io.StringIO())))
    for arm in summary.arms.values():
        assert not arm.errors, arm.errors
    weights = [*store.glob("segments/**/model*.safetensors"), *store.glob("segments/**/adapter_model.safetensors")]
    states = {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in weights}
    assert len(states) == 3, states  # two links and all weights
    return states


# ---------------------------------------------------------------------------------------------------------
# Changes


def draw(rng: random.Random, packages: tuple[str, ...] = ("accelerate", "transformers", "torch")) -> Change:
    """One change: half of them of variables, the others of files and of switches."""
    kind = rng.choice(["read", "read", "read", "C", "system", "switch", "switch", "file", "file", "file"])
    if kind == "switch":
        return kind, rng.choice(SWITCHES), ""
    if kind == "file":
        return kind, rng.choice(sorted(FILES)), str(rng.randrange(2**31))
    name = rng.choice({"C": IN_C, "system": SYSTEM}.get(kind) or names_read(rng.choice(packages)))
    return "variable", name, rng.choice(PLAUSIBLE.get(name, VALUES))


known: dict[str, list[str]] = {}


def names_read(package: str) -> list[str]:
    """The variables that a package's Python reads."""
    if package not in known:
        spec = find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations
        files = Path(spec.submodule_search_locations[0]).rglob("*.py")
        found = {name for file in files for name in READS.findall(file.read_text(encoding="utf-8", errors="replace"))}
        # Where files lie, and what pytest and the system are called, is no change of anything.
        found -= {
            "PATH",
            "HOME",
            "USER",
            "LD_LIBRARY_PATH",
            "LD_PRELOAD",
            "PYTEST_CURRENT_TEST",
            "TMPDIR",
            "TEMP",
            "TMP",
        }
        known[package] = sorted(name for name in found if not name.endswith(("_CACHE", "_HOME", "_DIR", "_PATH")))
    return known[package]


def keep_times(edit: Callable[[Path, random.Random], None]) -> Callable[[Path, random.Random], None]:
    """An edit that sets the times of the file back."""

    def edited(path: Path, rng: random.Random) -> None:
        before = path.stat()
        edit(path, rng)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    return edited


def one_weight(raw: bytes | bytearray | mmap.mmap, rng: random.Random) -> tuple[int, int]:
    """Where a weight's leading fraction bits are, and others for them."""
    header = int.from_bytes(raw[:8], "little")
    place = 8 + header + 4 * rng.randrange((len(raw) - 8 - header) // 4) + 2
    return place, raw[place] ^ 0x40


def weight_in_place(path: Path, rng: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    place, value = one_weight(raw, rng)
    raw[place] = value
    path.write_bytes(raw)


def weight_in_another_file(path: Path, rng: random.Random) -> None:
    shutil.copy2(path, path.with_suffix(".new"))
    weight_in_place(path.with_suffix(".new"), rng)
    path.with_suffix(".new").rename(path)


def weight_by_a_map(path: Path, rng: random.Random) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        place, value = one_weight(mapped, rng)
        mapped[place] = value


def key(name: str, *values: Any) -> Callable[[Path, random.Random], None]:
    def edit(path: Path, rng: random.Random) -> None:
        tree = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(tree | {name: rng.choice(values)}, indent=2))

    return edit


def text(old: str, *new: str) -> Callable[[Path, random.Random], None]:
    def edit(path: Path, rng: random.Random) -> None:
        before = path.read_text()
        assert old in before
        path.write_text(before.replace(old, rng.choice(new), 1))

    return edit


def lines(change: Callable[[list[str], random.Random], None]) -> Callable[[Path, random.Random], None]:
    def edit(path: Path, rng: random.Random) -> None:
        rows = path.read_text().splitlines()
        change(rows, rng)
        path.write_text("\n".join(rows) + "\n")

    return edit


def added(*contents: str) -> Callable[[Path, random.Random], None]:
    def edit(path: Path, rng: random.Random) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(rng.choice(contents))

    return edit


WEIGHTS, CONFIG = "model/model.safetensors", "model/config.json"
TOKENS, SAID, ROWS = "model/tokenizer.json", "model/tokenizer_config.json", "rows.jsonl"
FILES: dict[str, tuple[str, Callable[[Path, random.Random], None]]] = {
    "a weight, in place": (WEIGHTS, keep_times(weight_in_place)),
    "a weight, in a file moved over it": (WEIGHTS, weight_in_another_file),
    "a weight, through a map": (WEIGHTS, keep_times(weight_by_a_map)),
    "config: epsilon": (CONFIG, keep_times(key("rms_norm_eps", 1e-5, 1e-3))),
    "config: rope": (CONFIG, key("rope_parameters", *({"rope_type": "default", "rope_theta": t} for t in (10, 500)))),
    "config: dropout": (CONFIG, key("attention_dropout", 0.1, 0.3)),
    "config: activation": (CONFIG, key("hidden_act", "gelu", "relu")),
    "config: dtype": (CONFIG, key("dtype", "bfloat16", "float16")),
    "config: version": (CONFIG, key("transformers_version", "4.0.0")),
    "config: attention": (CONFIG, key("attn_implementation", "eager", "sdpa")),
    "tokenizer: a merge": (TOKENS, lambda path, rng: fewer_merges(path, rng)),
    "tokenizer: prefix": (TOKENS, keep_times(text('"add_prefix_space": false', '"add_prefix_space": true'))),
    "tokenizer: lower": (TOKENS, text('"normalizer": null', '"normalizer": {"type": "Lowercase"}')),
    "tokenizer: end": (SAID, key("eos_token", "<|im_end|>", "<|im_start|>")),
    "tokenizer: special tokens cut": (SAID, key("split_special_tokens", True)),
    "tokenizer: length": (SAID, key("model_max_length", 64, 512)),
    "template: a word": ("model/chat_template.jinja", keep_times(text("Today is", "Todax is", "Today's"))),
    "template: its own date": ("model/chat_template.jinja", text("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024", "1")),
    "template: another": ("model/additional_chat_templates/tool_use.jinja", added("{{ messages }}")),
    "generation: sampling": ("model/generation_config.json", key("temperature", 0.3, 2.0)),
    "generation: ends": ("model/generation_config.json", key("eos_token_id", [0, 2], [2])),
    "beside: a readme": ("model/README.md", added("# A model\n", "# The model\n")),
    "beside: code": ("model/modeling_own.py", added("X = 1\n", "X = 2\n")),
    "beside: training arguments": ("model/training_args.json", added("{}")),
    "rows: a word": (ROWS, keep_times(lines(lambda rows, rng: one_word(rows, rng)))),
    "rows: their order": (ROWS, keep_times(lines(lambda rows, rng: rng.shuffle(rows)))),
    "rows: one more": (ROWS, lines(lambda rows, rng: rows.append('{"q": "is it red", "a": "red"}'))),
    "rows: another field": (ROWS, lines(lambda rows, rng: rows.__setitem__(0, rows[0].replace("}", ', "z": 1}')))),
    "rows: an empty line": (ROWS, lines(lambda rows, rng: rows.insert(rng.randrange(len(rows)), ""))),
    "recipe: a comment": ("recipe.yaml", lambda path, rng: path.write_text("# one\n" + path.read_text())),
    "accelerate's defaults": (
        "hf/accelerate/default_config.yaml",
        lambda path, rng: defaults(path, rng),
    ),
}


def fewer_merges(path: Path, rng: random.Random) -> None:
    tree = json.loads(path.read_text())
    tree["model"]["merges"].pop(rng.randrange(len(tree["model"]["merges"])))
    path.write_text(json.dumps(tree))


def one_word(rows: list[str], rng: random.Random) -> None:
    place = rng.randrange(len(rows))
    rows[place] = rows[place].replace("what", "whut")


def defaults(path: Path, rng: random.Random) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(f"mixed_precision: {rng.choice(['bf16', 'fp16'])}\ngradient_accumulation_steps: 4\nuse_cpu: true\n")
    os.environ["HF_HOME"] = str(path.parent.parent)


def make(change: Change, folder: Path) -> None:
    """Make a change to this process, or to the files of a case."""
    kind, what, value = change
    if kind == "variable":
        os.environ[what] = value
    elif kind == "file":
        place, edit = FILES[what]
        edit(folder / place, random.Random(int(value)))
    else:
        import numpy
        import torch
        from transformers.utils import chat_template_utils

        scope = {"torch": torch, "numpy": numpy, "random": random, "os": os, "time": time, "day": day}
        exec(what, scope | {"chat_template_utils": chat_template_utils})


def day(said: str) -> type:
    """A clock that stands at a day."""
    from datetime import datetime

    return type("Clock", (datetime,), {"now": classmethod(lambda cls, tz=None: cls.fromisoformat(said))})


# ---------------------------------------------------------------------------------------------------------
# What comes of a change


def outcome(change: Change, case: Path, cache: Path, before: States, aside: Path) -> str:
    """Make a change in this process to a copy of the case, train, and say what came of it.

    Args:
        change: What to make.
        case: The unchanged files; they come to lie at the same place again.
        cache: What the unchanged run has cached.
        before: The states of the unchanged run.
        aside: An empty folder.

    Returns:
        `name changed`, `weights the same`, `refused: ...` or `WRONG: ...`.
    """
    from_files = change[0] == "file"
    try:
        make(change, case)
        from cola.errors import ColaError

        try:
            shutil.copytree(cache, aside / "cache")
            after = train(case, aside / "cache", aside / "store")
            if from_files:
                shutil.copytree(
                    cache / "flops", aside / "fresh" / "flops"
                )  # the count takes longest, and is in no name
                if train(case, aside / "fresh", aside / "store2") != after:
                    return "WRONG: the caches hid it"
        except ColaError as error:
            said = str(error)
            return f"refused: {said}" if said and "\n" not in said and len(said) < 400 else f"WRONG: said {said!r}"
    except BaseException:
        return "WRONG: " + " | ".join(traceback.format_exc().splitlines()[-6:])
    differ = [name for name in before.keys() & after.keys() if before[name] != after[name]]
    if differ:
        return f"WRONG: one name, other weights: {differ}"
    return "weights the same" if before.keys() == after.keys() else "name changed"


def imported_by_cola() -> list[str]:
    """The modules of other people's that a run imports."""
    __import__("cola.run.run"), __import__("conftest"), __import__("peft.tuners.lora"), __import__("jinja2.ext")
    __import__("transformers.models.qwen2.modeling_qwen2")
    ours = {path.stem for path in Path(__file__).parent.glob("*.py")} | {"cola", "__main__"}
    return [name for name in sys.modules if name.split(".")[0] not in ours]


def in_a_fork(do: Callable[[], Any]) -> Any:
    """What a function returns in a copy of this process, as JSON; None where that died."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reading)
        with os.fdopen(writing, "w") as pipe:
            try:
                pipe.write(json.dumps(do()))
                pipe.flush()
            finally:
                os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return json.loads(said) if said else None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("changes", type=int)
    parser.add_argument("--seed", type=int, default=21)
    parser.add_argument("--one", help="internal: a change, the case's folder, and what was before, as JSON")
    given = parser.parse_args()
    # All that cola imports is imported once, and cola itself by each copy of this process.
    for name in in_a_fork(imported_by_cola):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import torch

    gc.freeze()  # accelerate collects at every link, and a copy would have to look at, and copy, all that is here
    torch.set_num_threads(1)
    if given.one:
        change, case, cache, before, aside = json.loads(given.one)
        print("\n" + outcome(tuple(change), Path(case), Path(cache), before, Path(aside)))
        return
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        case, kept, cache = root / "case", root / "kept", root / "cache"
        in_a_fork(lambda: write_case(case))
        shutil.copytree(case, kept)
        before = in_a_fork(lambda: train(case, cache, root / "store"))
        assert before == in_a_fork(lambda: train(case, root / "cache2", root / "store2")), "not even unchanged"
        rng, counts, groups = random.Random(given.seed), Counter[str](), Counter[tuple[str, str]]()
        for number in range(given.changes):
            shutil.rmtree(case)
            shutil.copytree(kept, case)
            change, aside = draw(rng), root / f"aside-{number}"
            aside.mkdir()
            if change[0] == "variable" and change[1].startswith(EARLY):
                one = json.dumps([change, str(case), str(cache), before, str(aside)])
                command = [sys.executable, __file__, "1", "--one", one]
                environment = os.environ | {change[1]: change[2]}
                done = subprocess.run(command, capture_output=True, text=True, env=environment)
                came = (done.stdout.splitlines() or [f"WRONG: {done.stderr[-500:]}"])[-1]
            else:
                came = in_a_fork(lambda c=change, a=aside: outcome(c, case, cache, before, a)) or "WRONG: it died"
            shutil.rmtree(aside)
            verdict = came.split(":")[0]
            counts[verdict] += 1
            groups[change[0], verdict] += 1
            print(f"{number:4} {' '.join(change)[:90]:90} {came}", flush=True)
        print(f"seed {given.seed}, {given.changes} changes: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
        for (kind, verdict), n in sorted(groups.items()):
            print(f"  {kind}: {n} {verdict}")
        sys.exit(1 if counts["WRONG"] else 0)


if __name__ == "__main__":
    main()
