"""Checkpoints: exact round trips, and nothing lost or executed whatever happens to the files."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from worldmpc.training import checkpoint as module
from worldmpc.training.checkpoint import (
    CheckpointError,
    CheckpointStore,
    check_same_architecture,
    find_saved,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from worldmpc.training.restore import find_checkpoint

META = {"step": 12, "config": {"task": "dmc/cartpole-swingup", "lr": 3e-4, "betas": (0.9, 0.999), "discount": None, 3: [math.inf]}}


def small(value: float = 1.0) -> dict[str, Any]:
    """A tree of two groups with tensors and one without."""
    return {"agent": {"w": torch.full((3, 2), value), "count": 7}, "replay": {"obs": torch.arange(100)}, "progress": {"decisions": 5}}


def equal(one: Any, two: Any) -> bool:
    """Same types, same values, bit by bit."""
    if isinstance(one, torch.Tensor):
        return (
            isinstance(two, torch.Tensor)
            and one.dtype == two.dtype
            and one.shape == two.shape
            and torch.equal(one.cpu().contiguous().reshape(-1).view(torch.uint8), two.contiguous().reshape(-1).view(torch.uint8))
        )
    if type(one) is not type(two):
        return False
    if isinstance(one, dict):
        return list(one) == list(two) and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    return one == two or (one != one and two != two)


def optimiser() -> torch.optim.Optimizer:
    """An optimiser with state: integer keys, tuples, 0-d tensors."""
    weight = torch.nn.Parameter(torch.ones(3))
    optim = torch.optim.Adam([{"params": [weight], "lr": 0.1}, {"params": [torch.nn.Parameter(torch.ones(2))]}])
    weight.sum().backward()
    optim.step()
    return optim


def test_everything_comes_back_exactly(tmp_path: Path) -> None:
    """All dtypes, shapes and layouts of tensors, and every plain type, with its order and key types."""
    base = torch.randn(4, 6)
    dtypes = list(module.DTYPES)
    tree = {
        "dtypes": {str(dtype): torch.arange(5).to(dtype) for dtype in dtypes},
        "shapes": {"scalar": torch.tensor(2.5, dtype=torch.float64), "empty": torch.zeros(0, 3, dtype=torch.bool)},
        "layouts": {"transposed": base.T, "slice": base[1:3, ::2], "shared": base, "again": base, "expanded": base[0].expand(3, 6)},
        "rng": torch.get_rng_state(),
        "parameter": {"a.b": torch.nn.Parameter(torch.ones(2)), "a": {"b": torch.zeros(2)}, "__metadata__": torch.ones(1)},
        "optimiser": optimiser().state_dict(),
        "plain": {"int": 2**70, "neg": -0.0, "bools": (True, None), "empty": [{}, [], ()], "text": "ü\n"},
        "not_finite": [math.inf, -math.inf, math.nan, torch.tensor([math.nan])],
        "keys": {1: "one", "1": "text", "$tensor": {"$float": "nan"}},
        "number": 3,
        "nothing": {},
    }
    path = save_checkpoint(tmp_path / "new" / "folder", "all", tree, META)
    assert path == tmp_path / "new" / "folder" / "all"
    back, meta = load_checkpoint(path)
    expected = {**tree, "parameter": {name: value.detach() if name == "a.b" else value for name, value in tree["parameter"].items()}}
    for group in tree:
        assert equal(expected[group], back[group]), group
    assert list(back) == list(tree) and equal(meta, META)
    optimiser().load_state_dict(back["optimiser"])
    torch.set_rng_state(back["rng"])
    verify_checkpoint(path)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
TREES = st.recursive(
    LEAVES | st.builds(torch.full, st.tuples(st.integers(0, 3), st.integers(0, 2)), st.floats(-9, 9)),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.from_regex(r"\A[a-z][a-z0-9_]{0,5}\Z"), TREES, max_size=3))
def test_any_tree_comes_back(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> None:
    """Whatever nesting, keys and values."""
    path = save_checkpoint(tmp_path_factory.mktemp("any"), "tree", tree, {})
    assert equal(load_checkpoint(path)[0], tree)


def test_files_are_ordinary_safetensors_one_per_group(tmp_path: Path) -> None:
    """Weights can be read without the replay, by this library or any other."""
    path = save_checkpoint(tmp_path, "one", small(), META)
    assert sorted(file.name for file in path.iterdir()) == ["agent.safetensors", "meta.json", "replay.safetensors"]
    assert equal(load_file(path / "agent.safetensors"), {"w": torch.ones(3, 2)})
    os.remove(path / "replay.safetensors")
    assert equal(load_checkpoint(path, ["agent", "progress"])[0], {name: small()[name] for name in ("agent", "progress")})
    with pytest.raises(CheckpointError, match="has no"):
        load_checkpoint(path, ["optim"])
    assert json.loads((path / "meta.json").read_text())["meta"]["config"]["$dict"][0] == ["task", "dmc/cartpole-swingup"]


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"a": {"b": [1, object()]}}, "a.b.1: cannot store a builtins.object"),
        ({"a": {(1, 2): 3}}, "key \\(1, 2\\)"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, "complex128"),
        ({"../a": 1}, "'../a': expected letters"),
        ({"a": Path("x")}, "Path"),
    ],
)
def test_what_cannot_be_stored_is_named(tmp_path: Path, tree: dict, words: str) -> None:
    """The place in the tree and the type; nothing is written."""
    with pytest.raises(CheckpointError, match=words):
        save_checkpoint(tmp_path, "one", tree, {})
    with pytest.raises(CheckpointError, match="checkpoint name"):
        save_checkpoint(tmp_path, "../one", {}, {})
    with pytest.raises(CheckpointError, match="meta.x: cannot store a torch.Tensor"):
        save_checkpoint(tmp_path, "one", {}, {"x": torch.zeros(1)})
    assert not list(tmp_path.iterdir())


def operations(monkeypatch: pytest.MonkeyPatch, fail_at: int, error: BaseException) -> list[str]:
    """Make the n-th operation on the file system fail; return the list of those that were called."""
    called: list[str] = []

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            called.append(name)
            if len(called) == fail_at:
                raise error
            return function(*args, **keywords)

        return call

    class Writer:
        """A file whose writes count as operations too."""

        def __init__(self, file: Any) -> None:
            self.file = file
            self.write = wrap("write", file.write)

        def __enter__(self) -> Writer:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    def opened(file: Any, mode: str) -> Any:
        return Writer(open(file, mode)) if "w" in mode else open(file, mode)

    monkeypatch.setattr(module, "open", wrap("open", opened), raising=False)
    for name in ("fsync", "rename", "replace", "link"):
        monkeypatch.setattr(os, name, wrap(name, getattr(os, name)))
    monkeypatch.setattr(Path, "mkdir", wrap("mkdir", Path.mkdir))
    monkeypatch.setattr(Path, "symlink_to", wrap("symlink_to", Path.symlink_to))
    return called


@pytest.mark.parametrize("same_name", [False, True])
@pytest.mark.parametrize("killed", [False, True])
def test_failure_at_any_step_loses_nothing(tmp_path: Path, same_name: bool, killed: bool) -> None:
    """A full disk, or a process killed, at every single operation: older ones and the best stay, the next save cleans up."""
    fail_at = 0
    while True:
        fail_at += 1
        folder = tmp_path / str(fail_at)
        store = CheckpointStore(folder, keep=2)
        store.save(1, small(1.0), META, best=True)
        store.save(2, small(2.0), META)
        with pytest.MonkeyPatch.context() as patch:
            if killed:
                # Death runs no cleanup.
                patch.setattr(shutil, "rmtree", lambda *_, **__: None)
                patch.setattr(module, "_clean_leftovers", lambda _: None)
            error = SystemExit() if killed else OSError(errno.ENOSPC, "No space left on device")
            called = operations(patch, fail_at, error)
            try:
                store.save(2 if same_name else 3, small(3.0), META, best=True)
            except SystemExit:
                assert killed
            except CheckpointError as caught:
                # Where hard links are refused the files are copied, so that is no failure.
                assert not killed and "No space left on device" in str(caught) and "\n" not in str(caught)
                assert str(folder) in str(caught)
                assert (
                    not list(folder.glob(".worldmpc-tmp-*"))
                    and not list(folder.glob(".worldmpc-link-*"))
                    and len(list(folder.glob(".worldmpc-best-*"))) == 1
                )
            if len(called) < fail_at:
                break
        assert store.best is not None and load_checkpoint(store.best)[0]["agent"]["w"][0, 0] in (1.0, 3.0)
        again = CheckpointStore(folder, keep=2)
        again.save(4, small(4.0), META)
        newest = again.newest_valid()
        assert newest is not None and newest.name == "step_000000004" and not again.corrupt
        assert [path.name for path in again.all()][1] in ("step_000000002", "step_000000003")
        for path in again.all():
            verify_checkpoint(path)
        hidden = sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
        assert hidden == [os.readlink(folder / "best")]
    assert fail_at > 20 and {"write", "fsync", "rename", "link", "symlink_to", "replace"} <= set(called)


def test_a_full_disk_leaves_the_error_to_do_something_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line: which checkpoint, why, what to do."""
    operations(monkeypatch, 4, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(CheckpointError, match="step_000000001: .*No space left on device.*untouched.*free disk space"):
        CheckpointStore(tmp_path, keep=1).save(1, small(), META)
    assert not list(tmp_path.iterdir())


def damage_truncate(file: Path) -> None:
    """Lose the last byte."""
    os.truncate(file, file.stat().st_size - 1)


def damage_flip(file: Path) -> None:
    """Flip one bit in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["agent.safetensors", "replay.safetensors", "meta.json"])
@pytest.mark.parametrize("damage", [damage_truncate, damage_flip, os.remove])
def test_damage_is_found_named_and_the_previous_one_used(tmp_path: Path, damage: Callable[[Path], None], name: str) -> None:
    """Any damaged file: loading names it; the newest valid checkpoint is the one before; pruning does not count the damaged one."""
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, small(1.0), META)
    store.save(2, small(2.0), META)
    damage(tmp_path / "step_000000002" / name)
    with pytest.raises(CheckpointError, match=f"step_000000002/{name}"):
        load_checkpoint(tmp_path / "step_000000002")
    with pytest.warns(UserWarning, match=f"step_000000002/{name}.*trying the one before"):
        newest = store.newest_valid()
    assert newest == tmp_path / "step_000000001" and [path.name for path in store.corrupt] == ["step_000000002"]
    store.save(3, small(3.0), META)
    assert [path.name for path in store.all()] == ["step_000000003", "step_000000001"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_flipped_bit_of_the_meta_is_found_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """The plain values are protected like the tensors; only white space may differ."""
    path = save_checkpoint(tmp_path_factory.mktemp("flip"), "one", small(), META)
    text = bytearray((path / "meta.json").read_bytes())
    text[data.draw(st.integers(0, len(text) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (path / "meta.json").write_bytes(text)
    try:
        tree, meta = load_checkpoint(path)
    except CheckpointError:
        return
    assert equal(tree, small()) and equal(meta, META)


class Trap:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what unpickling runs."""
        return Path.touch, (self.target,)


@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_pickles_are_refused_and_never_executed(tmp_path: Path, writer: str) -> None:
    """Even with a meta that vouches for the pickle, loading it fails and runs nothing; a lone pickle is refused too."""
    mark = tmp_path / "executed"
    path = save_checkpoint(tmp_path, "one", small(), META)
    file = path / "agent.safetensors"
    payload = {"w": Trap(mark)}
    file.write_bytes(pickle.dumps(payload)) if writer == "pickle" else torch.save(payload, file)
    with pytest.raises(CheckpointError, match="agent.safetensors: checkpoint is damaged"):
        load_checkpoint(path)
    content = json.loads((path / "meta.json").read_bytes())
    del content["checksum"]
    content["files"]["agent"] = {"size": file.stat().st_size, "sha256": module.hashlib.sha256(file.read_bytes()).hexdigest()}
    (path / "meta.json").write_bytes(module._sealed(content))
    with pytest.raises(CheckpointError, match="agent.safetensors: not a safetensors file"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(file)
    assert not mark.exists()
    if writer == "pickle":
        pickle.loads(file.read_bytes())
        assert mark.exists(), "the trap works, had anybody stepped into it"
    source = Path(module.__file__).read_text()
    assert "import pickle" not in source and "torch.load" not in source


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.update(format=2), "has format 2, this worldmpc reads up to 1; update worldmpc"),
        (lambda content: content.update(format="x"), "no format number"),
        (lambda content: content["files"].update({"../../secret": {"size": 0, "sha256": ""}}), "bad file entry"),
        (lambda content: content["files"].pop("agent"), "'agent' does not match its tensors"),
        (lambda content: content["tree"].update(agent={"$code": 1}), "'agent' does not match its tensors"),
        (lambda content: content.pop("tree"), "a section is missing"),
    ],
)
def test_metas_of_other_makers_are_refused(tmp_path: Path, change: Callable[[dict], Any], words: str) -> None:
    """A newer format says so; a meta that was made up, with a fitting checksum, does no harm."""
    path = save_checkpoint(tmp_path, "one", small(), META)
    content = json.loads((path / "meta.json").read_bytes())
    del content["checksum"]
    change(content)
    body = {"checksum": module._checksum(content), **content}
    (path / "meta.json").write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(path)


def test_store_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    """Pruning counts by order of saving; the best survives it with all its files, and is replaced as a whole."""
    store = CheckpointStore(tmp_path / "deep", keep=2)
    assert store.newest_valid() is None and store.best is None and store.all() == []
    for step in (10, 20, 30, 40):
        store.save(step, small(step), META, best=step == 20)
    assert [path.name for path in store.all()] == ["step_000000040", "step_000000030"]
    assert store.best is not None and load_checkpoint(store.best)[0]["agent"]["w"][0, 0] == 20
    store.save(50, small(50), META, best=True)
    assert load_checkpoint(store.best)[0]["agent"]["w"][0, 0] == 50
    assert len(list((tmp_path / "deep").glob(".worldmpc-best-*"))) == 1
    # Same files, not a copy of them.
    assert (store.best / "replay.safetensors").stat().st_nlink == 2
    # A run continued from an older checkpoint saves lower steps: these are the newest now.
    store.save(35, small(35), META)
    assert [path.name for path in store.all()] == ["step_000000035", "step_000000050"]
    store.save(35, small(36), META)
    newest = store.newest_valid()
    assert newest is not None and load_checkpoint(newest)[0]["agent"]["w"][0, 0] == 36


def test_the_best_of_what_is_left_behind_is_forgotten(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    assert not store.forget_best(0)
    for step in (10, 20):
        store.save(step, small(step), {**META, "env_steps": step}, best=True)
    assert not store.forget_best(20) and store.best is not None
    assert store.forget_best(19) and store.best is None and not store.forget_best(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000010", "step_000000020"]
    store.save(30, small(30), {**META, "env_steps": 30}, best=True)
    assert store.best is not None
    damage_truncate(store.best / "meta.json")
    assert not store.forget_best(0)


def test_best_of_a_copied_run_is_replaced_too(tmp_path: Path) -> None:
    """Copying a run turns the link into a directory."""
    store = CheckpointStore(tmp_path / "a", keep=1)
    store.save(1, small(1), META, best=True)
    shutil.copytree(tmp_path / "a", tmp_path / "b", symlinks=False)
    copied = CheckpointStore(tmp_path / "b", keep=1)
    assert copied.best is not None and not copied.best.is_symlink()
    copied.save(2, small(2), META, best=True)
    assert copied.best.is_symlink() and load_checkpoint(copied.best)[0]["agent"]["w"][0, 0] == 2
    assert sorted(path.name[:14] for path in (tmp_path / "b").iterdir()) == [".worldmpc-best", "best", "step_000000002"]


@pytest.mark.parametrize("kind", ["folder", "file", "dangling", "run", "notes"])
def test_saving_replaces_checkpoints_and_nothing_else(tmp_path: Path, kind: str) -> None:
    """Whatever else has that name stays, and so does everything beside it."""
    target = tmp_path / "thesis.v2"
    if kind == "file":
        target.write_text("chapter 1")
    elif kind == "dangling":
        target.symlink_to("elsewhere")
    else:
        if kind == "notes":
            save_checkpoint(tmp_path, target.name, small(1.0), META)
        target.mkdir(exist_ok=True)
        (target / ("meta.json" if kind == "run" else "chapter.txt")).write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        CheckpointError, match="thesis.v2: (exists and is no|has chapter.txt in it, which is no part of a) checkpoint; choose"
    ):
        save_checkpoint(tmp_path, target.name, small(2.0), META)
    assert sorted(tmp_path.rglob("*")) == before


def test_saving_cleans_up_in_no_folder_but_a_stores_own(tmp_path: Path) -> None:
    """Hidden files of other programs stay, also of names that a store would use; names have dots."""
    for name in (".tmp-work", ".link-me", ".old-letters-1", ".best-of", ".worldmpc-tmp-mine"):
        (tmp_path / name).mkdir()
    (tmp_path / ".link-file").write_text("x")
    for value in (1.0, 2.0):
        path = save_checkpoint(tmp_path, "agent.v1.5", small(value), META)
    assert load_checkpoint(path)[0]["agent"]["w"][0, 0] == 2 and len(list(tmp_path.iterdir())) == 7
    (tmp_path / ".worldmpc-tmp-file").write_text("left by a crash")
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, small(), META)
    store.save(2, small(), META)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".best-of", ".link-file", ".link-me", ".old-letters-1", ".tmp-work", "agent.v1.5", "step_000000002"]
    link = tmp_path / "linked"
    link.symlink_to("agent.v1.5")
    save_checkpoint(tmp_path, "linked", small(3.0), META)
    assert not link.is_symlink() and load_checkpoint(path)[0]["agent"]["w"][0, 0] == 2
    with pytest.raises(CheckpointError, match="checkpoint name '.hidden'"):
        save_checkpoint(tmp_path, ".hidden", {}, {})


def die_at_second_rename(patch: pytest.MonkeyPatch) -> None:
    rename, calls = os.rename, []

    def die(*paths: Any) -> None:
        calls.append(paths)
        if len(calls) > 1:
            raise SystemExit
        rename(*paths)

    patch.setattr(os, "rename", die)


def test_killed_between_two_renames_of_a_saved_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_saved(tmp_path / "nowhere", "mine") is None and find_saved(tmp_path, "mine") is None
    save_checkpoint(tmp_path, "mine", small(1.0), META)
    with monkeypatch.context() as patch:
        die_at_second_rename(patch)
        with pytest.raises(SystemExit):
            save_checkpoint(tmp_path, "mine", small(2.0), META)
    found = find_saved(tmp_path, "mine")
    assert found is not None and found.name != "mine" and load_checkpoint(found)[0]["agent"]["w"][0, 0] == 1
    assert find_checkpoint(tmp_path / "mine") == found and find_saved(tmp_path, "other") is None
    save_checkpoint(tmp_path, "mine", small(3.0), META)
    assert find_saved(tmp_path, "mine") == tmp_path / "mine"


def test_killed_between_two_renames_of_the_only_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was set aside is found without changing anything; the next save brings it back or replaces it."""
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, small(1.0), META, best=True)
    store.save(2, small(2.0), META)
    with monkeypatch.context() as patch:
        die_at_second_rename(patch)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(SystemExit):
            store.save(2, small(3.0), META)
    before = sorted(tmp_path.iterdir())
    again = CheckpointStore(tmp_path, keep=1)
    newest = again.newest_valid()
    assert again.all() == [] and newest is not None and load_checkpoint(newest)[0]["agent"]["w"][0, 0] == 2
    assert sorted(tmp_path.iterdir()) == before
    again.save(3, small(4.0), META)
    assert [path.name for path in sorted(tmp_path.iterdir()) if not path.name.startswith(".")] == ["best", "step_000000003"]


@pytest.mark.filterwarnings("ignore:.*trying the one before")
def test_the_best_is_the_last_resort(tmp_path: Path) -> None:
    """Where no numbered checkpoint is intact."""
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, small(1.0), META, best=True)
    store.save(2, small(2.0), META)
    damage_flip(tmp_path / "step_000000002" / "agent.safetensors")
    newest = store.newest_valid()
    assert newest is not None and newest == tmp_path / "best" and load_checkpoint(newest)[0]["agent"]["w"][0, 0] == 1
    shutil.rmtree(tmp_path / "step_000000002")
    assert store.newest_valid() == tmp_path / "best"
    damage_flip(tmp_path / "best" / "agent.safetensors")
    assert store.newest_valid() is None


def test_missing_and_keep() -> None:
    """Plain mistakes."""
    with pytest.raises(CheckpointError, match="nowhere: no such checkpoint"):
        load_checkpoint(Path("/nowhere"))
    with pytest.raises(ValueError, match="checkpoint.keep"):
        CheckpointStore(Path("."), keep=0)


def test_architectures_are_compared_in_one_line() -> None:
    """Missing, unexpected and misshapen names, the first few of each."""
    ours = {f"q.{index}": torch.zeros(2) for index in range(5)} | {"encoder.0": torch.zeros(3, 4)}
    check_same_architecture(ours, {name: torch.ones_like(value) for name, value in ours.items()})
    with pytest.raises(CheckpointError) as caught:
        check_same_architecture(ours, {"encoder.0": torch.zeros(3, 5), "policy": torch.zeros(1)})
    text = str(caught.value)
    assert "5 missing (q.0, q.1, q.2, ...)" in text and "1 unexpected (policy)" in text and "\n" not in text
    assert "1 shape (encoder.0 [3, 5] instead of [3, 4])" in text
