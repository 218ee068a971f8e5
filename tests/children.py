"""Command lines of cola as processes of their own, which are raced, stopped and killed.

A child starts in a tenth of a second: all it needs has been imported before it is forked.
"""

import functools
import multiprocessing
import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cola import chain
from cola.cli.app import app
from cola.link import forward, train
from cola.link.model import Source
from cola.measure import evaluate
from cola.report import page
from cola.run import ended
from cola.tree.store import Store

processes = multiprocessing.get_context("forkserver")
PRELOADED = ["conftest", "cola.run.run", "cola.report.page", "cola.run.ablate", "cola.run.worker", "children"]
processes.set_forkserver_preload(PRELOADED)

KILLED = -signal.SIGKILL
PASSED = (
    "COLA_CACHE",
    "TRACKIO_DIR",
    "MLFLOW_TRACKING_URI",
)  # a forked child has the environment in which the fork server began


def kill_at_call(number: int, function: Callable[..., Any], half_way: bool = False) -> Callable[..., Any]:
    """The function, but the process is killed at its n-th call, before it or inside what it calls."""
    calls = 0

    def killing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            if half_way:
                [model, base, residual, names, *how] = args
                function(model, base, residual, names[: len(names) // 2], *how)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return killing


def stop_at_call(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but the process gets Ctrl-C before its n-th call."""
    calls = 0

    def stopping(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGINT)
        return function(*args, **kwargs)

    return stopping


def fail_at_call(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose n-th call finds no memory."""
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise torch.OutOfMemoryError("a card is full")
        return function(*args, **kwargs)

    return failing


def otherwise_at_call(number: int, step: Callable[..., Any]) -> Callable[..., Any]:
    """An optimizer's step, whose n-th call leaves one weight a little off."""
    calls = 0

    def stepping(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        done = step(optimizer, *args, **kwargs)
        if calls == number:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].view(-1)[0] += 1e-6
        return done

    # torch looks at whether a class's step is one that it has wrapped itself.
    return functools.update_wrapper(stepping, step)


def command(words: list[str], said: Path, cache: str, drawn: bool = False) -> None:
    """A command line of cola as a process of its own; its page has figures where they are asked for."""
    os.environ["COLA_CACHE"] = cache
    # A W&B service of the tests' own process would outlive this one and hold its run; a user's dies with the command.
    os.environ.pop("WANDB_SERVICE", None)
    torch.set_num_threads(1)
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if not drawn:
        page.figures_of = lambda *_: {}
    app(words)


def ended_at(place: str, number: int, words: list[str], said: Path, passed: dict[str, str], drawn: bool) -> None:
    """The command, killed or stopped at the n-th time that it comes to a place."""
    for name in PASSED:
        os.environ.pop(name, None)
    os.environ.update(passed)
    match place:
        case "fsync":
            os.fsync = kill_at_call(number, os.fsync)
        case "rename":
            Path.rename = kill_at_call(number, Path.rename)
        case "replace":
            Path.replace = kill_at_call(number, Path.replace)
        case "rmtree":
            shutil.rmtree = kill_at_call(number, shutil.rmtree)
        case "knot":
            chain.residual.write = kill_at_call(number, chain.residual.write)
        case "half a knot":
            chain.residual.write = kill_at_call(number, chain.residual.write, half_way=True)
        case "logits":
            killing = kill_at_call(number, forward.logits_at)
            train.logits_at = evaluate.logits_at = killing
        case "AdamW":
            torch.optim.AdamW.step = kill_at_call(number, torch.optim.AdamW.step)
        case "AdamW, stopped":
            torch.optim.AdamW.step = stop_at_call(number, torch.optim.AdamW.step)
        case "AdamW, otherwise":
            torch.optim.AdamW.step = otherwise_at_call(number, torch.optim.AdamW.step)
        case "logits, no memory":
            train.logits_at = fail_at_call(number, forward.logits_at)
        case "attention, stopped":
            attention = nn.functional.scaled_dot_product_attention
            nn.functional.scaled_dot_product_attention = stop_at_call(number, attention)
        case "another base":
            Source.fingerprint = lambda self: "another"
        case "let go":
            ended.let_go = kill_at_call(number, ended.let_go)
        case "score, stopped":
            evaluate.Evaluator.__call__ = stop_at_call(number, evaluate.Evaluator.__call__)
        case "drop":
            Store.drop = kill_at_call(number, Store.drop)
        case "score":
            evaluate.Evaluator.__call__ = kill_at_call(number, evaluate.Evaluator.__call__)
    command(words, said, passed["COLA_CACHE"], drawn)


def launched(n: int) -> list[dict[str, str]]:
    """What a launcher puts into the environments of n processes that are to meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "OMP_NUM_THREADS": "1"}
    return [meet | {"WORLD_SIZE": str(n), "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)]


def start(
    words: list[str],
    said: Path,
    place: str = "nothing",
    number: int = 0,
    drawn: bool = False,
    variables: dict[str, str] | None = None,
) -> Any:
    """Begin a command, which is killed or stopped at the n-th time that it comes to a place; `variables`: of its
    environment."""
    passed = {name: os.environ[name] for name in PASSED if name in os.environ} | (variables or {})
    arguments = (place, number, words, said, passed, drawn)
    process = processes.Process(target=ended_at, args=arguments)
    process.start()
    return process


def end(process: Any) -> int:
    """Wait for a command; its exit code."""
    process.join(120)
    assert process.exitcode is not None, "the command does not come to an end"
    return process.exitcode
