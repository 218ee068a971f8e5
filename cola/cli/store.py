"""cola store ls | verify | prune, and of `cola inspect` what it says of a segment: what runs share. No torch."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import typer

from cola.errors import ColaError, StoreError
from cola.files import digest, store_path
from cola.recipe.arms import LinkSettings
from cola.recipe.methods import METHODS
from cola.report.numbers import duration, size
from cola.report.table import NONE, Cell, Shown, Table
from cola.report.terminal import Terminal
from cola.tree import prune as pruning
from cola.tree.leases import alone
from cola.tree.store import Segment, Store


def open_store(path: Path | None) -> Store:
    """The store that a command names, or the one of this machine. Raises ColaError if there is none."""
    path = store_path(str(path) if path else None)
    if not (path / "format.json").is_file():
        raise ColaError(f"there is no store at {path}; `cola run` makes one, and --store or $COLA_STORE names another")
    return Store(path, Terminal().warn)


def ls(opened: Store) -> None:
    """List the segments and the disk they take."""
    terminal = Terminal()
    used = pruning.references(opened)
    folders = sorted(_with_times(opened.segments()), key=lambda pair: pair[1])
    if rows := [_row(opened, folder, made_at, used) for folder, made_at in folders]:
        columns = ["segment", "kind", "steps", "recipe, arm, seed", "made", "size", "runs"]
        terminal.table(Table(f"{opened.path}", columns, rows))
    measured, damaged = list(opened.measurements()), list((opened.path / "damaged").iterdir())
    terminal.say(
        f"{opened.path}: {len(rows)} segments, {_size(folder for folder, _ in folders)}; {len(measured)} measurements, "
        f"{_size(measured)}; {len(damaged)} set aside as damaged, {_size(damaged)}"
    )
    if gone := [str(run) for run in used if not run.is_dir()]:
        terminal.say(f"run folders that are gone: {', '.join(gone)}")


def verify(opened: Store) -> int:
    """Check every name and checksum; returns how many were damaged."""
    n_checked, n_damaged = pruning.verify(opened)
    Terminal().say(f"{opened.path}: {n_checked} segments and measurements checked, {n_damaged} damaged")
    return n_damaged


def prune(opened: Store, yes: bool) -> None:
    """Free what no run folder that still exists refers to, once the user says so; `yes`: was said."""
    terminal = Terminal()
    with alone(opened.path, terminal.say):
        garbage = _say_garbage(opened, terminal)
        if not garbage:
            return
        if not yes and not sys.stdin.isatty():
            raise ColaError("nothing was removed: there is no terminal to ask at; say --yes")
        if yes or typer.confirm("Remove these?"):
            pruning.prune(opened, garbage)


def _say_garbage(store: Store, terminal: Terminal) -> list[Path]:
    """Say what pruning would free and why; returns it."""
    used, garbage = pruning.references(store), pruning.garbage(store)
    for run in used:
        if not run.is_dir():
            terminal.say(f"run folder {run} is gone; what it alone referred to is let go")
    loose = [path for path in garbage if path.parent.parent.name == "segments"]
    for folder, made_at in _with_times(loose):
        terminal.say("  ".join(map(str, _row(store, folder, made_at, used))))
    kept = sum(run.is_dir() for run in used)
    terminal.say(
        f"{store.path}: {len(loose)} segments and {len(garbage) - len(loose)} measurements and left-overs that no "
        f"kept run refers to, {_size(garbage)}; {kept} run folders are kept"
    )
    return garbage


def _size(paths: Iterable[Path]) -> Cell:
    return size(sum(map(pruning.size_of, paths)))


def _with_times(folders: Iterable[Path]) -> Iterator[tuple[Path, float]]:
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):  # a run that is at work has dropped a checkpoint
            yield folder, folder.stat().st_mtime


def _row(store: Store, folder: Path, made_at: float, used: dict[Path, set[str]]) -> list[Shown]:
    record: dict[str, Any] = store.record(folder)
    made = record.get("made") or {}
    n_runs = sum(folder.name in names for names in used.values())
    return [
        folder.name[:12],
        record.get("kind", "damaged"),
        f"{record['first_step'] + 1}–{record['last_step']}" if record else NONE,
        f"{made['recipe']}, {made['arm']}, {made['seed']}" if made else NONE,
        f"{datetime.fromtimestamp(made_at):%Y-%m-%d %H:%M}",
        _size([folder]),
        str(n_runs),
    ]


def inspect(store: Store, beginning: str, terminal: Terminal) -> None:
    """Print the chain of causes from the base to a segment, every name recomputed and every checksum verified. Raises
    StoreError if there is no such segment, or one of its ancestors has gone."""
    path = [store.find(beginning)]
    root = path[0].record["root"]
    while (parent := path[0].record["causes"]["link"]["parent"]) != digest(root):
        before = store.get(parent)
        if before is None:
            raise StoreError(f"segment {path[0].name} goes on from {parent}, which is not in {store.path} any more")
        path.insert(0, before)
    terminal.say(f"base {digest(root)}")
    terminal.say(f"  SHA-256 of config and weights {root['base']}")
    base = ", ".join([root["dtype"], *([root["quantization"]] if "quantization" in root else [])])
    terminal.say(f"  {base} on {root['device']}, training version {root['training_version']}")
    for segment in path:
        _show(segment, terminal)
    terminal.say(f"all names recomputed, all checksums verified; files in {path[-1].folder}")


def _show(segment: Segment, terminal: Terminal) -> None:
    record, link = segment.record, segment.record["causes"]["link"]
    rates = [rate for rate, _ in record["causes"]["steps"]]
    adam = link["optimizer"]
    clip = "no clipping" if adam["max_grad_norm"] is None else f"clipped at {adam['max_grad_norm']:g}"
    rows = segment.steps()
    made = record["made"]
    commit = made["commit"]["hash"]
    dirty = " and uncommitted changes" if made["commit"]["dirty"] else ""
    lines = [
        f"{segment.kind} {segment.name}, steps {record['first_step'] + 1} to {record['last_step']}, "
        f"link {record['link_number']}",
        f"from {link['parent']}" + (f"; knot: {_settings(link['knot'])}" if link["knot"] else ""),
        f"trains {_trained(link)}, {link['method']}, seed {link['seed']}",
        f"{adam['name']} betas {adam['betas'][0]:g} {adam['betas'][1]:g}, epsilon {adam['epsilon']:g}, weight decay "
        f"{adam['weight_decay']:g}, {clip}; learning rate {rates[0]:g} → {rates[-1]:g}",
        f"rows {', '.join(rows[0]['rows'])} (batch {record['causes']['steps'][0][1][:8]}) and {len(rows) - 1} more "
        f"batches; loss {rows[0]['loss']:.4f} → {rows[-1]['loss']:.4f}; {duration(record['seconds'])} of training",
        f"made by recipe {made['recipe']}, arm {made['arm']}, seed {made['seed']}, on {made['device']}, torch "
        f"{made['packages']['torch']}, cola {made['cola']}" + (f" at {commit[:10]}{dirty}" if commit else ""),
        f"{size(segment.n_bytes)} in " + ", ".join(record["files"]),
    ]
    terminal.say("\n  ".join(lines))


def _trained(link: dict[str, Any]) -> str:
    """What a link trains and how it was drawn, from its causes; what is off is left out."""
    parts = ["all weights"] if METHODS[link["method"]].is_whole else []
    parts.append(_settings({key: link["settings"].get(key) for key in LinkSettings.model_fields}))
    if link["modules"]:
        kinds = ", ".join(sorted({name.rpartition(".")[2] for name in link["modules"]}))
        parts.append(f"on {len(link['modules'])} modules ({kinds})")
    if (init := link["start"]["init"]) != "default":
        parts.append(f"init {init}")
    if (ratio := link["optimizer"]["ratio"]) != 1:
        parts.append(f"B at {ratio:g} times the rate of A")
    return ("a pair of " if METHODS[link["method"]].is_pair else "") + ", ".join(part for part in parts if part)


def _settings(values: dict[str, Any]) -> str:
    """Keys and values in words; what is off is left out."""

    def told(key: str, value: Any) -> str:
        match value:
            case True:
                return key
            case dict():
                return f"{key} ({_settings(value)})"
            case list():
                return f"{key} {', '.join(value)}"
            case int() | float():
                return f"{key} {value:g}"
        return f"{key} {value}"

    return ", ".join(told(key, value) for key, value in values.items() if value not in (None, False, 0, []))
