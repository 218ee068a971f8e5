"""Kill cola again and again, let it go on, and compare what comes of it with an undisturbed run, to the bit.

    python tests/kills.py 1000                 so many kills; prints how far it is, and a table at the end
    python tests/kills.py 1000 --seed 7        others
    python tests/kills.py 1000 --to FILE       writes what came of them as JSON too

A round is one study in an empty store: `cola run` of a tiny model, killed some times and gone on with, by one process
or by two workers; then `cola report`, `cola export` and `cola store prune`, killed likewise. Each command is in the end
left in peace, and then everything must be what it is without kills: adapters, weights, scores, ledgers, spectra, the
summary and the exports, but for times and provenance; checksums and manifests; and of files nothing may be there but
what an undisturbed study leaves and docs/segments.md names. Commands are forked from a process that has imported all,
so a kill costs what the work between two of them takes.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from children import KILLED, PASSED, PRELOADED, end, processes
from conftest import PROSE, SKY, recipe_of, tiny_model, tiny_tokenizer
from deaths import CALLS, MOMENTS, TIME, Death, live
from left import left_behind, same_numbers
from runs import CHOICE, write_recipe

from cola.tree.made import provenance

processes.set_forkserver_preload([*PRELOADED, "deaths", "cola.export.export", "cola.cli.show", "cola.cli.store"])

VARIANTS = {
    "chains": ["link.dropout=0.1", "evaluation.every=2", *CHOICE],
    "answers": ["evaluation.checkpoint=best", "evaluation.every=1", "training.learning_rate=3e-2"],
    "search": ["training.learning_rate={search: [1e-3, 1e-2]}", "arms.full.learning_rate=null", *CHOICE],
    "forgetful": ["keep_full_weights=false", "arms.lora=null", "comparison.primary=null", *CHOICE],
    "wandb": ["tracking.wandb=offline", "arms.full=null", *CHOICE],
}
OTHER = ["training.learning_rate=5e-3", "arms.full=null", "arms.chain3=null", "comparison.primary=null", *CHOICE]
IN_A_ROUND = 12  # kills of `cola run` at most, before it is left in peace
OF_THE_REST = 2  # likewise of each later command
PRUNED = 0.2  # of the kills of `cola run` are followed by a prune, before it goes on
LONGEST = 0.9  # of what an undisturbed command takes, a kill comes at the latest


@dataclass
class Came:
    """What came of the kills so far."""

    kills: list[dict[str, Any]] = field(default_factory=list)
    missed: Counter[str] = field(default_factory=Counter)  # deaths that waited for a call that did not come
    faults: list[str] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)
    rounds: Counter[str] = field(default_factory=Counter)


class Ground:
    """Where rounds take place: the tiny model, its rows, and of each variant an undisturbed study."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tiny_model().save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")
        things = list(SKY)
        rows = [
            {
                "id": number,
                "question": f"{'maybe ' * (number % 5)}{number} what colour is the {things[number % 4]}",
                "answer": SKY[things[number % 4]],
                "label": number % 4,
            }
            for number in range(60)
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "prose.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PROSE))
        text = recipe_of(folder / "model", folder / "rows.jsonl", folder / "prose.jsonl", folder / "runs")
        self.recipe = write_recipe(folder / "recipe", text)
        self.undisturbed: dict[str, Study] = {}
        self.other = Study(self, OTHER, folder / "other")
        self.other.finish("run")

    def study(self, variant: str) -> "Study":
        """The undisturbed one."""
        if variant not in self.undisturbed:
            study = Study(self, VARIANTS[variant], self.folder / "undisturbed" / variant)
            for name in study.commands:
                if name == "prune":
                    self.litter(study.store)
                study.finish(name)
            self.undisturbed[variant] = study
        return self.undisturbed[variant]

    def litter(self, store: Path) -> None:
        """Put into a store what none of its runs refers to: what another study has made, and is whole."""
        for kind in ("segments", "measured"):
            for path in (self.other.store / kind).glob("*/*"):
                to = store / kind / path.parent.name / path.name
                if not to.exists():
                    to.parent.mkdir(exist_ok=True)
                    shutil.copytree(path, to) if path.is_dir() else shutil.copyfile(path, to)


class Study:
    """A run in a store of its own, and the commands that follow it."""

    def __init__(self, ground: Ground, overrides: list[str], folder: Path) -> None:
        self.folder, self.said = folder, folder.with_suffix(".txt")
        (folder / "tmp").mkdir(parents=True)
        store, run = ["--store", str(self.store)], str(self.run)
        study = [str(ground.recipe), *overrides, f"store={self.store}", f"output={folder / 'runs'}"]
        self.commands = {
            "run": ["run", *study, "--run-folder", run],
            "report": ["report", run],
            "export": ["export", run, "--arm", "chain3", "--to", str(folder / "adapter")],
            "prune": ["store", "prune", "--yes", *store],
            "store verify": ["store", "verify", *store],
            "verify": ["verify", run],
        }
        self.seconds: dict[str, float] = {}
        self.counts: dict[str, dict[str, int]] = {}

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def start(self, name: str, death: Death | None = None, n_workers: int = 1, counts: Path | None = None) -> int:
        """Have a command go to its end, or to its death; the exit code."""
        words = [*self.commands[name], *(["--workers", "2"] if n_workers > 1 and name == "run" else [])]
        passed = {key: os.environ[key] for key in PASSED if key in os.environ}
        passed |= {
            "COLA_CACHE": str(self.folder / "cache"),
            "TMPDIR": str(self.folder / "tmp"),
            "NETRC": "/nonexistent",
        }
        passed["OMP_NUM_THREADS"] = "1"
        process = processes.Process(target=live, args=(words, self.said, passed, False, death, counts))
        process.start()
        return end(process)

    def finish(self, name: str) -> None:
        """Have a command go to its end, undisturbed, and know what that takes."""
        began, counts = time.monotonic(), self.folder / "counts.json"
        code = self.start(name, counts=counts)
        if code:
            raise SystemExit(f"cola {name} does not come to its end without kills: {code}\n{self.said.read_text()}")
        self.seconds[name] = time.monotonic() - began
        self.counts[name] = json.loads(counts.read_text())
        counts.unlink()

    @cached_property
    def numbers(self) -> dict[str, Any]:
        """All that a study must give to the bit."""
        return same_numbers(self.run, self.folder / "adapter")


def alone() -> None:
    """Wait until no worker is left of a command that was killed: it has read the end of its pipe, and ends."""
    server = forkserver._forkserver._forkserver_pid
    while Path(f"/proc/{server}/task/{server}/children").read_text().split():
        time.sleep(0.02)


class Round:
    """A study that is killed."""

    def __init__(self, ground: Ground, variant: str, number: int, rng: random.Random, came: Came) -> None:
        self.ground, self.rng, self.came, self.whole = ground, rng, came, ground.study(variant)
        self.name = f"{number} {variant}"
        self.study = Study(ground, VARIANTS[variant], ground.folder / "killed" / str(number))
        self.n_workers = 1 if variant == "wandb" else rng.choice([1, 2])

    def go(self, most: int) -> None:
        """Kill each command some times, `most` times in all; then see what has come of it."""
        before, faults = len(self.came.kills), len(self.came.faults)
        self.until_done("run", min(IN_A_ROUND, most))
        for name in ("report", "export", "prune"):
            if len(self.came.faults) > faults:
                return
            if name == "prune":
                self.ground.litter(self.study.store)
            self.until_done(name, min(OF_THE_REST, most - (len(self.came.kills) - before)))
        self.check("store verify", "verify")

    def until_done(self, name: str, most: int) -> None:
        """A command, killed at most so many times and gone on with; at last it is left in peace."""
        for _ in range(most):
            death = self.death(name)
            code = self.study.start(name, death, self.n_workers)
            if name == "export" and (self.study.folder / "adapter").exists():
                code = 0  # it was killed on its way out
            killed = death.note.exists()
            if killed:
                told = {**json.loads(death.note.read_text()), "command": name, "round": self.name}
                self.came.kills.append(told)
                death.note.unlink()
            else:
                self.came.missed[death.kind] += 1
            if code == 0:
                return
            if code != KILLED or not killed:
                self.fault(f"cola {name} ends with {code}")
                return
            if name == "run" and self.rng.random() < PRUNED and (self.study.store / "format.json").is_file():
                alone()
                self.until_done("prune", 0)
        if code := self.study.start(name, None, self.n_workers):
            self.fault(f"cola {name} ends with {code}, though it was not killed")

    def death(self, name: str) -> Death:
        """One at random: of the run mostly early, since what was kept before is not done again."""
        kinds = [*MOMENTS, *CALLS, TIME, TIME, TIME] if name == "run" else [*CALLS, TIME, TIME]
        counts = self.whole.counts[name]
        kind = self.rng.choice([kind for kind in kinds if kind == TIME or counts.get(kind)])
        share = self.rng.random() * self.rng.choice([1, 0.3, 0.1] if name == "run" else [1])
        who = self.rng.choice([0, 1, 2]) if self.n_workers > 1 and name == "run" else 0
        after = share * LONGEST * self.whole.seconds[name] if kind == TIME else 1 + int(share * counts[kind])
        return Death(kind, after, who, self.study.folder / "death.json")

    def check(self, *verify: str) -> None:
        """Say what is not as it would be without kills."""
        alone()
        for name in verify:
            if code := self.study.start(name):
                self.fault(f"cola {name} ends with {code}")
        said = self.study.said.read_text()
        if "Traceback" in said:
            self.fault("a traceback was printed")
        if "damaged" in said.replace(" 0 damaged", "").replace("0 set aside as damaged", ""):
            self.fault("something was damaged")
        differing = [name for name in self.whole.numbers | self.study.numbers if self.differs(name)]
        if differing:
            self.fault(f"not the bits of an undisturbed run: {', '.join(differing[:5])} ({len(differing)} in all)")
        named, others = left_behind(self.study.folder, self.whole.folder)
        self.came.left.update(named)
        if others:
            self.fault(f"no page names what is left: {', '.join(sorted(others)[:5])} ({len(others)} in all)")

    def differs(self, name: str) -> bool:
        return self.whole.numbers.get(name) != self.study.numbers.get(name)

    def fault(self, what: str) -> None:
        self.came.faults.append(f"round {self.name}: {what}; {self.study.said}")


def kill(
    n_kills: int,
    seed: int,
    folder: Path,
    variants: list[str],
    say: Callable[[Came, str], None] = lambda _, line: print(line),
) -> Came:
    """So many kills, round after round of all variants; what came of them."""
    ground, rng, came = Ground(folder), random.Random(seed), Came()
    for variant in variants:
        ground.study(variant)
    while len(came.kills) < n_kills:
        number = sum(came.rounds.values()) + 1
        variant = variants[(number - 1) % len(variants)]
        before, began = len(came.faults), time.monotonic()
        one = Round(ground, variant, number, rng, came)
        one.go(n_kills - len(came.kills))
        came.rounds[variant] += 1
        say(
            came,
            f"{len(came.kills)} of {n_kills} kills; round {number}, {variant}, workers {one.n_workers}, "
            f"{time.monotonic() - began:.0f} s: {'; '.join(came.faults[before:]) or 'the same'}",
        )
        if len(came.faults) == before:
            shutil.rmtree(one.study.folder)
    return came


def table(came: Came) -> str:
    """What came of all kills, in words and numbers."""
    lines = [f"{len(came.kills)} kills in {sum(came.rounds.values())} rounds ({counted(came.rounds)})"]
    for title, key in (("of", "command"), ("at", "kind"), ("while at", "stage")):
        lines.append(f"{title}: {counted(Counter(kill[key] for kill in came.kills))}")
    lines.append(f"of workers: {sum(kill['who'] > 0 for kill in came.kills)}")
    lines.append(f"deaths whose call did not come: {sum(came.missed.values())}")
    lines.append(f"left behind, in rounds: {counted(came.left) or 'nothing'}")
    return "\n".join([*lines, f"faults: {len(came.faults) or 'none'}", *came.faults])


def counted(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counter.most_common())


def record(came: Came, seed: int, seconds: float) -> dict[str, Any]:
    """The same for a file."""
    made = {key: value for key, value in provenance().items() if key != "all_packages"}
    return {
        "made": {**made, "seed": seed, "seconds": round(seconds)},
        "kills": len(came.kills),
        "rounds": dict(came.rounds),
        "by": {
            key: dict(Counter(str(kill[key]) for kill in came.kills)) for key in ("command", "kind", "stage", "who")
        },
        "missed": sum(came.missed.values()),
        "left": dict(came.left),
        "faults": came.faults,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", type=Path, help="a JSON file")
    parser.add_argument("--keep", type=Path, help="where to work; default: a new folder, removed if all is well")
    asked = parser.parse_args()
    folder = asked.keep or Path(tempfile.mkdtemp(prefix="kills-"))
    began = time.monotonic()

    def say(came: Came, line: str) -> None:
        print(line, flush=True)
        if asked.to is not None:  # as far as it has come, since it may be stopped
            asked.to.write_text(json.dumps(record(came, asked.seed, time.monotonic() - began), indent=1) + "\n")

    came = kill(asked.kills, asked.seed, folder, list(VARIANTS), say)
    print(table(came))
    if asked.keep is None and not came.faults:
        shutil.rmtree(folder)
    return 1 if came.faults else 0


if __name__ == "__main__":
    sys.exit(main())
