"""What sharing a store costs: trainings that sleep, by 1, 2, 4 and 8 processes; and a store of many segments and runs.

    python benchmarks/scale.py [--jobs 64] [--sleep 0.5] [--segments 10000] [--runs 1000] [--to FILE]

Each job does what one of a run does with the store: it is claimed, its segment locked, trained (a sleep), put, and four
measurements are remembered. Overhead is what a job takes beside its sleep. Without `--to` it writes
benchmarks/results/scale.json. It wants a quiet machine; a sleep needs no core, so 8 processes fit on two.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from machine import made

from cola.files import digest
from cola.tree import prune
from cola.tree.leases import claim, in_use, lock
from cola.tree.segments import Causes, state_name
from cola.tree.store import Store

HERE = Path(__file__).parent
PAIR_BYTES = 2_000_000  # of a rank 8 pair of a 135M model, its moments included
MEASURED = ("train", "validation", "test", "general")


def causes_of(number: int) -> Causes:
    """As many names as there are numbers."""
    link: dict[str, Any] = {"parent": digest("base"), "number": number}
    return {"link": link, "steps": [[1e-3, digest(number)]]}


def put(store: Store, number: int, n_bytes: int) -> str:
    """Keep a segment."""

    def write(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(number.to_bytes(8, "little") * (n_bytes // 8))

    segment, _ = store.put("segment", causes_of(number), {"base": "none"}, {"last_step": 1, "first_step": 0}, write)
    return segment.name


def take_jobs(place: Path, n_jobs: int, sleep: float, ready: Any, go: Any) -> None:
    """Do what nobody else does of so many jobs, as a process of `cola run` would."""
    store, left = Store(place, print), list(range(n_jobs))
    ready.release()
    go.wait()
    with in_use(place, print):
        while left:
            for number in list(left):
                name = state_name(causes_of(number))
                with claim(place, digest({"job": name})) as mine:
                    if not mine:
                        continue
                    if not store.has(name):
                        with lock(place, name):
                            time.sleep(sleep)
                            put(store, number, PAIR_BYTES)
                        for what in MEASURED:
                            store.remember({"state": name, "measured": what}, {"scores": [0.5] * 200})
                left.remove(number)


def overhead(n_processes: int, n_jobs: int, sleep: float) -> dict[str, float]:
    """Seconds that a job takes beside its sleep, and how many times as fast as one process it would be without."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ready, go = context.Semaphore(0), context.Event()
        processes = [
            context.Process(target=take_jobs, args=(Path(folder) / "store", n_jobs, sleep, ready, go))
            for _ in range(n_processes)
        ]
        for process in processes:
            process.start()
        for _ in processes:
            ready.acquire()
        started = time.perf_counter()
        go.set()
        for process in processes:
            process.join()
        seconds = time.perf_counter() - started
        assert [process.exitcode for process in processes] == [0] * n_processes
    return {"seconds": seconds, "overhead": seconds * n_processes / n_jobs - sleep, "faster": n_jobs * sleep / seconds}


def many(n_segments: int, n_runs: int) -> dict[str, float]:
    """Seconds that looking at a large store takes."""
    with tempfile.TemporaryDirectory() as folder:
        store, took = Store(Path(folder) / "store", print), dict[str, float]()

        def timed(what: str, action: Callable[[], Any]) -> Any:
            started = time.perf_counter()
            result = action()
            took[what] = time.perf_counter() - started
            return result

        names = timed("put", lambda: [put(store, number, 2000) for number in range(n_segments)])
        each = max(1, n_segments // max(n_runs, 1))
        for number in range(n_runs):
            run = Path(folder) / f"runs/{number}"
            run.mkdir(parents=True)
            mine = names[number * each : (number + 1) * each]
            (run / "segments.json").write_text(json.dumps({"segments": mine, "measured": [], "weights": []}))
            prune.register(store, run)
        timed("references", partial(prune.references, store))
        timed("records", lambda: [store.record(path) for path in store.segments()])
        timed("verify", partial(prune.verify, store))
        timed("garbage", partial(prune.garbage, store))
        timed("find one", lambda: store.get(names[0]))
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=64)
    parser.add_argument("--sleep", type=float, default=0.5)
    parser.add_argument("--segments", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--to", type=Path, default=HERE / "results/scale.json")
    asked = parser.parse_args()
    record: dict[str, Any] = {"made": made(), "asked": {**vars(asked), "to": None}, "workers": {}}
    for n_processes in (1, 2, 4, 8):
        record["workers"][str(n_processes)] = told = overhead(n_processes, asked.jobs, asked.sleep)
        print(f"{n_processes} processes: {told['overhead'] * 1e3:.0f} ms a job, {told['faster']:.2f} times one's sleep")
    record["many"] = many(asked.segments, asked.runs)
    for what, seconds in record["many"].items():
        print(f"{what}: {seconds:.2f} s for {asked.segments} segments and {asked.runs} runs")
    asked.to.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
