"""What a run folder has of the store: edited, moved, deleted, the store's is whole or made anew.

Run: pytest tests/run/test_hand_out.py
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from children import processes
from runs import SHORT, go, result
from runs import wide_cola as cola
from safetensors.torch import load_file, save_file
from test_store import keep, opened, weights_in

from cola.tree import leases, prune
from cola.tree.store import hand_out

pytestmark = pytest.mark.usefixtures("one_thread")

OTHERS = ["arms.prefix={method: prefix, num_virtual_tokens: 2}", "arms.bottleneck={method: adapter, bottleneck: 2}"]
NOBODY = 65534


def handed_out(run: Path) -> list[Path]:
    """Every file that the arms' folders have of the store."""
    folders = [*run.glob("arms/*/seed-0/knots/*"), *run.glob("arms/*/seed-0/model"), *run.glob("arms/*/seed-0/adapter")]
    return [path for folder in folders for path in folder.iterdir()]


def zeroed(path: Path) -> None:
    """The file written over in place, its weights set to zero: what a user's script may do."""
    path.chmod(0o644)  # by force, where it is read-only
    if path.suffix == ".safetensors":
        save_file({key: torch.zeros_like(value) for key, value in load_file(path).items()}, path.with_suffix(".new"))
        path.write_bytes(path.with_suffix(".new").read_bytes())
        path.with_suffix(".new").unlink()
    else:
        path.write_text("{}")


def moved(path: Path) -> None:
    path.rename(path.with_name(f"mine-{path.name}"))


def deleted(path: Path) -> None:
    path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("act", [zeroed, moved, deleted])
def test_whatever_is_done_to_what_a_run_folder_holds_the_next_run_has_the_same_results(
    recipe_file: Path, act: Callable[[Path], None]
) -> None:
    first, _ = go(recipe_file, *SHORT, *OTHERS)
    store, said = opened(Path(os.environ["COLA_CACHE"]) / "store")
    whole = weights_in(store)
    files = handed_out(first.path)
    assert {path.parent.name for path in files} == {"link-1", "link-2", "link-3", "model", "adapter"}
    full = first.path / "arms/full/seed-0/model/model.safetensors"
    state = result(first, "full")["train_info"]["scored_state"]
    assert full.samefile(store.folder(state) / "model.safetensors")
    for path in files:
        assert path == full or path.stat().st_nlink == 1
        act(path)
    # Only what is shared can be hurt, and only by force; that is found, said, and trained again.
    assert {name for name in whole if store.get(name) is None} == ({state} if act is zeroed else set())
    assert len(said) == (act is zeroed)
    second, summary = go(recipe_file, *SHORT, *OTHERS)
    assert all(arm.states == {0: "ok"} for arm in summary.arms.values())
    for arm in summary.arms:
        assert result(second, arm)["evaluation"] == result(first, arm)["evaluation"]
    assert weights_in(store) == whole
    for path in handed_out(second.path):
        if path.suffix == ".safetensors" and path.parent.name.startswith("link-"):
            assert path.read_bytes() in whole.values()
    assert cola("store", "verify").exit_code == 0


def test_what_is_handed_out_small_can_be_edited_and_what_is_shared_cannot(tmp_path: Path) -> None:
    store, _ = opened(tmp_path / "store")
    folder = store.folder(keep(store, 0))
    assert [path.stat().st_mode & 0o222 for path in folder.glob("*.safetensors")] == [0]
    hand_out(folder / "steps.jsonl", tmp_path / "copy", large=False)
    hand_out(folder / "adapter_model.safetensors", tmp_path / "same", large=True)
    assert (tmp_path / "copy").stat().st_mode & 0o200
    assert (tmp_path / "copy").read_bytes() == (folder / "steps.jsonl").read_bytes()
    assert (tmp_path / "same").samefile(folder / "adapter_model.safetensors")
    assert (tmp_path / "same").stat().st_mode & 0o222 == 0


@pytest.fixture
def nobodys() -> Iterator[Path]:
    """A folder of a user without rights of its own."""
    folder = Path(tempfile.mkdtemp())
    os.chown(folder, NOBODY, NOBODY)
    yield folder
    shutil.rmtree(folder)


def as_nobody(folder: Path, told: Path) -> None:
    """What a user without root's rights can do to a segment that was handed out, and to the store."""
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    store, warned = opened(folder / "store")
    name = keep(store, 0)
    file = store.folder(name) / "adapter_model.safetensors"
    run = folder / "run"
    run.mkdir()
    hand_out(file, run / "same", large=True)
    hand_out(file, run / "copy", large=False)
    refused = []
    for mode in ("ab", "r+b", "wb"):
        try:
            (run / "same").open(mode).close()
        except PermissionError:
            refused.append(mode)
    (run / "copy").write_bytes(b"mine")
    (run / "same").rename(run / "moved")
    found: dict[str, Any] = {"refused": refused, "whole": store.get(name) is not None}
    store.mark(name, "segment")  # the record is written anew
    shutil.rmtree(run)
    found["whole after all"] = store.get(name) is not None
    with leases.alone(store.path):
        prune.prune(store, prune.garbage(store))
    found["pruned"] = not list(store.segments())
    told.write_text(json.dumps(found | {"warned": warned}))


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user; the test before this one is for all")
def test_a_user_without_roots_rights_cannot_write_into_what_is_shared_and_can_prune_it(nobodys: Path) -> None:
    told = nobodys / "told.json"
    process = processes.Process(target=as_nobody, args=(nobodys, told))
    process.start()
    process.join(60)
    assert json.loads(told.read_text()) == {
        "refused": ["ab", "r+b", "wb"],
        "whole": True,
        "whole after all": True,
        "pruned": True,
        "warned": [],
    }
