"""A run whose workers are tasks of a Ray cluster: real ones, of this machine. Run: pytest tests/run/test_on_ray.py"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from children import launched
from runs import LORA_ONLY, SHORT, Outcome, assert_one_line, cola, outcome

from cola.errors import RecipeError
from cola.run.on_ray import divided
from cola.run.start import Workers, begin

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = ["training.steps=60", "training.batch_size=4", "checkpoint_seconds=0", "keep_full_weights=false"]
FOUR = {"CPU": 4.0, "memory": 1e9}
CARDS = {"CPU": 16.0, "GPU": 4.0, "memory": 1e9}


@dataclass
class Cluster:
    """Nodes of a Ray cluster, each a process of this machine with children."""

    ports: tuple[int, int]  # of the cluster, and for commands from outside
    token: Path  # its own, by which a command may use it; none of the user's is looked at
    nodes: list[subprocess.Popen[bytes]]

    def add(self, *words: str, before: tuple[str, ...] = ()) -> None:
        """Begin a node."""
        ray = [*before, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "COLA_"))}
        environment |= self._allowed | {"RAY_worker_niceness": "0"}  # Ray's 15 gets nothing of a core that is shared
        node = subprocess.Popen(
            [*ray, *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/"
        )
        self.nodes.append(node)

    @property
    def join(self) -> list[str]:
        """How a node of two cores becomes one of the cluster's."""
        return [f"--address=127.0.0.1:{self.ports[0]}", "--num-cpus=2"]

    def workers(self, node: int = 0) -> list[psutil.Process]:
        """Workers of cola's that a node has now."""
        found = []
        for process in psutil.Process(self.nodes[node].pid).children(recursive=True):
            try:
                if process.cmdline()[:1] == ["ray::serve"]:
                    found.append(process)
            except psutil.Error:  # it has ended meanwhile
                continue
        return found

    @property
    def variables(self) -> dict[str, str]:
        """The environment of a command on this cluster."""
        address = {"OMP_NUM_THREADS": "1", "RAY_ADDRESS": f"127.0.0.1:{self.ports[0]}"}
        return {**os.environ, **address, **self._allowed}

    @property
    def _allowed(self) -> dict[str, str]:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}


def end(process: subprocess.Popen[bytes]) -> None:
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    for child in children:
        if child.is_running():
            child.kill()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node with three cores."""
    token = tmp_path_factory.mktemp("ray") / "token"
    token.write_text(uuid.uuid4().hex)
    ports = int(launched(1)[0]["MASTER_PORT"]), int(launched(1)[0]["MASTER_PORT"])
    one = Cluster(ports, token, [])
    words = ["--head", f"--port={ports[0]}", f"--ray-client-server-port={ports[1]}", "--num-cpus=3"]
    one.add(*words, "--include-dashboard=false", "--node-ip-address=127.0.0.1")
    yield one
    for node in one.nodes:
        if node.poll() is None:
            end(node)


def command(recipe: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "cola", "run", str(recipe), *words]


def run_on(cluster: Cluster, recipe: Path, *words: str) -> str:
    """A command on the cluster, which comes to its end; what it said."""
    until_there(cluster)
    done = subprocess.run(
        command(recipe, *words), env=cluster.variables, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def until_there(cluster: Cluster, n_nodes: int = 1) -> None:
    code = f"import ray; ray.init('auto'); exit(len([1 for n in ray.nodes() if n['Alive']]) != {n_nodes})"
    until(lambda: subprocess.run([sys.executable, "-c", code], env=cluster.variables).returncode == 0)


def until(done: Callable[[], bool], seconds: float = 900) -> None:
    last = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < last
        time.sleep(0.2)


def alone(recipe: Path, folder: Path, *words: str) -> Outcome:
    """The same run by one process, with a store of its own."""
    said = cola("run", recipe, *words, f"store={folder}-store", "--run-folder", folder)
    assert said.exit_code == 0, said.output
    return outcome(folder)


def has_states(store: Path) -> bool:
    return any(store.glob("segments/*/*/segment.json"))


@pytest.mark.slow
def test_three_tasks_of_which_one_is_killed_end_with_the_bits_of_one_process(
    cluster: Cluster, recipe_file: Path, tmp_path: Path
) -> None:
    asked = [*LONG, *LORA_ONLY, "seeds=[0,1,2]"]
    until_there(cluster)
    words = command(recipe_file, *asked, "--on", "ray", "--run-folder", str(tmp_path / "run"))
    with (tmp_path / "said.txt").open("w") as said:
        running = subprocess.Popen(words, stdout=said, stderr=said, env=cluster.variables)
        until(lambda: len(cluster.workers()) == 3 and has_states(Path(os.environ["COLA_CACHE"]) / "store"))
        cluster.workers()[0].kill()
        assert running.wait(900) == 0, (tmp_path / "said.txt").read_text()
    text = (tmp_path / "said.txt").read_text()
    assert "workers: 3, threads of each: 1" in text
    assert text.count("has ended, killed, or crashed") == 1
    until(lambda: not cluster.workers())
    assert not outcome(tmp_path / "run").differences(alone(recipe_file, tmp_path / "alone", *asked))


@pytest.mark.slow
def test_a_command_that_is_lost_is_taken_up_by_the_same_command(
    cluster: Cluster, recipe_file: Path, tmp_path: Path
) -> None:
    asked = [*LONG, *LORA_ONLY]
    until_there(cluster)
    words = [*asked, "--on", "ray", "--workers", "1", "--run-folder", str(tmp_path / "run")]
    running = subprocess.Popen(command(recipe_file, *words), env=cluster.variables)
    until(lambda: has_states(Path(os.environ["COLA_CACHE"]) / "store"))
    running.kill()
    running.wait()
    until(lambda: not cluster.workers())  # none outlives its command
    run_on(cluster, recipe_file, *words)
    info = json.loads((tmp_path / "run/arms/lora/seed-0/result.json").read_text())["train_info"]
    assert info["reused_steps"] >= 1
    assert not outcome(tmp_path / "run").differences(alone(recipe_file, tmp_path / "alone", *asked))


@pytest.mark.slow
def test_ctrl_c_keeps_a_checkpoint_and_a_command_from_outside_goes_on(
    cluster: Cluster, recipe_file: Path, tmp_path: Path
) -> None:
    asked = [*LONG, *LORA_ONLY]
    until_there(cluster)
    on = ["--on", f"ray://127.0.0.1:{cluster.ports[1]}"]
    words = command(recipe_file, *asked, *on, "--run-folder", str(tmp_path / "run"))
    running = subprocess.Popen(words, env=cluster.variables)
    until(lambda: has_states(Path(os.environ["COLA_CACHE"]) / "store"))
    running.send_signal(signal.SIGINT)
    assert running.wait(900) == 75
    assert (
        not (tmp_path / "run/arms/lora/seed-0/result.json").exists()
        or '"interrupted"' in (tmp_path / "run/arms/lora/seed-0/result.json").read_text()
    )
    done = subprocess.run(
        [sys.executable, "-m", "cola", "run", "--resume", str(tmp_path / "run"), *on], env=cluster.variables
    )
    assert done.returncode == 0
    assert not outcome(tmp_path / "run").differences(alone(recipe_file, tmp_path / "alone", *asked))


@pytest.mark.slow
def test_a_node_that_dies_costs_no_job(cluster: Cluster, recipe_file: Path, tmp_path: Path) -> None:
    until_there(cluster)
    cluster.add(*cluster.join)
    until_there(cluster, 2)
    asked = [*LONG, *LORA_ONLY, "seeds=[0,1]"]
    with (tmp_path / "said.txt").open("w") as said:
        words = [*asked, "--on", "ray", "--workers", "2", "--run-folder", str(tmp_path / "run")]
        variables = {**cluster.variables, "OMP_NUM_THREADS": "2"}  # three cores are too few for both
        running = subprocess.Popen(command(recipe_file, *words), stdout=said, stderr=said, env=variables)
        until(lambda: bool(cluster.workers(1)) and has_states(Path(os.environ["COLA_CACHE"]) / "store"))
        for process in psutil.Process(cluster.nodes[1].pid).children(recursive=True):
            process.kill()
        assert running.wait(900) == 0
    text = (tmp_path / "said.txt").read_text()
    assert re.search(r"has ended, as its node died; its work \(lora seed [01]\) is taken over", text)
    assert json.loads((tmp_path / "run/summary.json").read_text())["arms"]["lora"]["n_seeds"] == 2


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can keep a node from seeing a folder")
def test_a_node_that_does_not_see_the_folder_is_one_line(cluster: Cluster, recipe_file: Path, tmp_path: Path) -> None:
    until_there(cluster)
    cluster.add(
        *cluster.join, before=("unshare", "-m", "sh", "-c", f'mount -t tmpfs none "{tmp_path}" && exec "$@"', "sh")
    )
    until_there(cluster, 2)
    # Longer than a node is given to see what a slow file system shows late.
    words = [*LONG, *LORA_ONLY, "training.steps=600", "seeds=[0,1]", "--on", "ray", "--workers", "2"]
    variables = {**cluster.variables, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command(recipe_file, *words), env=variables, capture_output=True, text=True, timeout=900)
    end(cluster.nodes[-1])
    assert done.returncode == 2, done.stdout + done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path}")
    assert "does not see this folder" in last


# ---------------------------------------------------------------------------------------------------------
# What cannot be


@pytest.mark.parametrize(
    ("nodes", "asked", "n_cards", "own", "found"),
    [
        ([FOUR], None, 0, None, (1, 4)),
        ([FOUR, FOUR], None, 0, None, (2, 4)),
        ([FOUR, {"CPU": 8.0}], None, 0, None, (3, 4)),
        ([FOUR, {"memory": 1e9}], "3", 0, None, (3, 1)),
        ([FOUR], "2", 0, None, (2, 2)),
        ([FOUR], None, 0, 1, (4, 1)),
        ([CARDS, FOUR], None, 1, None, (4, 4)),
        ([CARDS, CARDS], "2", 1, None, (2, 16)),
        ([CARDS], None, 1, 8, (2, 8)),
    ],
)
def test_a_cluster_is_divided_by_cards_else_by_cores(
    nodes: list[dict[str, float]], asked: str | None, n_cards: int, own: int | None, found: tuple[int, int]
) -> None:
    assert divided(nodes, asked and int(asked), n_cards, own) == found


@pytest.mark.parametrize(
    ("nodes", "asked", "n_cards", "own", "said"),
    [
        ([FOUR], None, 1, None, "no node of the cluster has any"),
        ([CARDS], 5, 1, None, "--workers 5: the cluster has 4 cards"),
        ([FOUR], 5, 0, None, "--workers 5: the cluster has 4 cores"),
        ([FOUR], 2, 0, 3, "OMP_NUM_THREADS=3 leaves room for 1"),
        ([], None, 0, None, "the cluster has 0 cores"),
    ],
)
def test_what_a_cluster_has_not_is_said(
    nodes: list[dict[str, float]], asked: int | None, n_cards: int, own: int | None, said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        divided(nodes, asked, n_cards, own)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--on", "dask"], "--on dask: ray, or a cluster's address"),
        (["--on", "ray", "--workers", "auto"], "--workers auto measures this machine"),
        (["--on", "ray", "--workers", "0"], "--workers 0: a number from 1"),
        (["--on", "ray://127.0.0.1:1"], "nobody answers there"),
        (["--on", "ray://nowhere.invalid:10001"], "nobody answers there"),
        (["--on", "ray://"], "nobody answers there"),
    ],
)
def test_a_place_that_cannot_be_is_one_line_and_leaves_nothing(recipe_file: Path, words: list[str], said: str) -> None:
    told = cola("run", recipe_file, *words)
    assert_one_line(told)
    assert said in told.output
    assert not (recipe_file.parent / "runs").exists()


def test_without_ray_one_line_says_how_to_get_it(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    told = cola("run", recipe_file, "--on", "ray")
    assert_one_line(told)
    assert "chain-of-lora[ray]" in told.output


def test_a_launch_and_a_cluster_are_not_both_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in launched(2)[0].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match="--on gives each process a job of its own"):
        begin(Workers(on="ray"))


@pytest.mark.slow
def test_more_than_the_cluster_has_and_a_base_in_shards_leave_nothing(
    cluster: Cluster, recipe_file: Path, tmp_path: Path
) -> None:
    until_there(cluster)
    for words, said in ((["--workers", "4"], "3 cores"), (["model.shard=true"], "model.shard: true spreads")):
        done = subprocess.run(
            command(recipe_file, *SHORT, *LORA_ONLY, "--on", "ray", *words),
            env=cluster.variables,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert said in done.stderr.splitlines()[-1]
        assert not list((tmp_path / "runs").glob("*"))
