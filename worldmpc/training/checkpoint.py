"""Checkpoints: one directory per saved state, tensors in safetensors files, everything else in a readable ``meta.json``.

::

    checkpoints/
      step_000012000/
        meta.json             format, size and sha256 of each file, the tree's plain values, the caller's meta
        agent.safetensors     one file per top-level key of the tree, so that weights can be read without the replay
        replay.safetensors
      best -> .worldmpc-best-3f2a/    hard links to the best one's files: survives pruning and costs no space until then

A checkpoint appears complete or not at all: it is written beside its place, flushed to disk and renamed. Loading verifies every
byte and runs no code, whoever wrote the file: nothing here knows how to unpickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

FORMAT = 1
META = "meta.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-]*")
STEP = re.compile(r"step_[0-9]+")
HIDDEN = ".worldmpc-"
"""How the name of everything unfinished begins: nothing else is ever cleaned up."""
OLD = f"{HIDDEN}old-"
CHUNK = 1 << 24
DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used; one line that says which, why and what to do."""


def save_checkpoint(folder: Path, name: str, tree: Mapping[str, Any], meta: Mapping[str, Any]) -> Path:
    """Write ``folder/name`` atomically; a checkpoint of that name is replaced, anything else of that name is left alone.

    Args:
        folder: created where missing; one process writes to it at a time. Nothing else in it is touched.
        name: of the checkpoint's directory.
        tree: nested mappings, lists and tuples of tensors, numbers, strings and None; top-level keys become files.
        meta: plain values that describe the run (configuration, counters).

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: a value or name that cannot be stored, something else of that name, or the disk refused; what was there
            before is untouched.
    """
    _require_name(name, NAME, "checkpoint name", "letters, digits, '_', '-' and '.'")
    _require_replaceable(folder / name)
    return _save(folder, name, tree, meta, own=False)


def find_saved(folder: Path, name: str) -> Path | None:
    """Return where a checkpoint of :func:`save_checkpoint` is, or None.

    That is ``folder/name``, or where a writer had moved it aside that was killed before the next one took its place.
    """
    if os.path.lexists(folder / name):
        return folder / name
    aside = [path for path in _moved_aside(folder) if _former(path).name == name]
    return max(aside, key=lambda path: path.stat().st_mtime_ns, default=None)


def _save(folder: Path, name: str, tree: Mapping[str, Any], meta: Mapping[str, Any], *, own: bool) -> Path:
    """Write ``folder/name``; a folder of our ``own`` is cleaned up first, and numbers its checkpoints."""
    target = folder / name
    skeleton, groups = _flatten(tree)
    content: dict[str, Any] = {"meta": _encode(meta, "meta", None), "tree": skeleton}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if own:
            _clean_leftovers(folder)
        content["sequence"] = max((_sequence(path) for path in _checkpoints(folder)), default=0) + 1 if own else 1
        temporary = folder / f"{HIDDEN}tmp-{name}-{uuid.uuid4().hex[:8]}"
        try:
            temporary.mkdir()
            content["files"] = {group: _write_tensors(temporary / f"{group}.safetensors", tensors) for group, tensors in groups.items()}
            _write_file(temporary / META, _sealed(content))
            _sync_directory(temporary)
            _move_into_place(temporary, target)
        except BaseException:
            # The reason is on its way up; a second failure while tidying must not hide it.
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise CheckpointError(
            f"{target}: checkpoint could not be written ({error.strerror or error}); older checkpoints are untouched; "
            "free disk space, or lower checkpoint.keep, or set checkpoint.replay=false"
        ) from error
    return target


def load_checkpoint(path: Path, groups: Collection[str] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a checkpoint after verifying size and sha256 of its files.

    Args:
        path: the checkpoint's directory.
        groups: top-level keys to read; ``None``: all.

    Returns:
        The tree (tensors on the CPU) and the caller's meta.

    Raises:
        CheckpointError: missing, damaged, not a checkpoint, of a newer format, or without one of the groups.
    """
    content = _read_meta(path)
    skeleton = content["tree"]
    chosen = list(skeleton) if groups is None else list(groups)
    for group in chosen:
        if group not in skeleton:
            raise CheckpointError(f"{path}: checkpoint has no '{group}'; it has {', '.join(skeleton) or 'nothing'}")
    tree = {}
    for group in chosen:
        tensors = _read_tensors(path, group, content) if group in content["files"] else {}
        try:
            tree[group] = _decode(skeleton[group], tensors)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path / META}: checkpoint is damaged ('{group}' does not match its tensors: {error!r})") from error
    return tree, _decode(content["meta"], {})


def verify_checkpoint(path: Path) -> None:
    """Read every byte of a checkpoint and compare it with what was written.

    Raises:
        CheckpointError: the first file that is missing or damaged, by name.
    """
    content = _read_meta(path)
    for group in content["files"]:
        _verify_file(path, group, content)


def check_same_architecture(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    """Compare names and shapes of parameters before loading them.

    Raises:
        CheckpointError: one line with the first few missing and unexpected names and shape mismatches.
    """
    shapes = [
        f"{name} {list(got[name].shape)} instead of {list(expected[name].shape)}"
        for name in expected
        if name in got and got[name].shape != expected[name].shape
    ]
    kinds = {
        "missing": [name for name in expected if name not in got],
        "unexpected": [name for name in got if name not in expected],
        "shape": shapes,
    }
    parts = [f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" for kind, names in kinds.items() if names]
    if parts:
        raise CheckpointError(
            f"checkpoint does not fit this architecture: {'; '.join(parts)}; use the model configuration and task it was trained with"
        )


class CheckpointStore:
    """The checkpoints of one run: the newest ``keep`` of them, and the best."""

    def __init__(self, folder: Path, keep: int) -> None:
        """Manage ``folder`` (created at the first save), keeping the ``keep`` most recently saved.

        Raises:
            ValueError: ``keep`` below 1.
        """
        if keep < 1:
            raise ValueError(f"checkpoint.keep: expected at least 1, got {keep}")
        self.folder = Path(folder)
        self.keep = keep
        self.corrupt: list[Path] = []
        """Damaged checkpoints that :meth:`newest_valid` skipped."""

    def save(self, step: int, tree: Mapping[str, Any], meta: Mapping[str, Any], best: bool = False) -> Path:
        """Write ``step_<step>``, point ``best`` at it where asked, and delete what is no longer kept.

        Args:
            step: simulator steps so far; names the checkpoint.
            tree: as in :func:`save_checkpoint`.
            meta: plain values; read them back with :func:`load_checkpoint`.
            best: also keep this one as the best.

        Raises:
            CheckpointError: it could not be written; what was there before is untouched.
        """
        path = _save(self.folder, f"step_{step:09d}", tree, meta, own=True)
        if best:
            self._link_best(path)
        self._prune(path)
        return path

    @property
    def best(self) -> Path | None:
        """Return where the best checkpoint is, or None."""
        path = self.folder / "best"
        return path if path.exists() else None

    def forget_best(self, after: int) -> bool:
        """Delete the best checkpoint where its ``env_steps`` are more than ``after``, and return whether that was so.

        Whoever goes on from an older checkpoint leaves what came after it behind, and the best of that is none of this run's.
        """
        try:
            if self.best is None or load_checkpoint(self.best, groups=[])[1]["env_steps"] <= after:
                return False
        except CheckpointError:  # a damaged one does not keep a run from going on; who loads it is told
            return False
        _remove(self.folder / "best")
        _clean_leftovers(self.folder)
        return True

    def all(self) -> list[Path]:
        """Return every numbered checkpoint, most recently saved first, damaged ones last."""
        return sorted(_checkpoints(self.folder), key=_sequence, reverse=True)

    def newest_valid(self) -> Path | None:
        """Return the most recently saved checkpoint whose files are intact, the best where no other is, or None.

        Damaged ones are skipped with a warning that names the file, and listed in :attr:`corrupt`. One that a killed writer had
        set aside counts where nothing took its place. Nothing is changed here, as another process may be writing:
        :meth:`save` brings that one back and cleans up.
        """
        numbered = sorted([*_checkpoints(self.folder), *_set_aside(self.folder)], key=_sequence, reverse=True)
        # Where a damaged meta hides the order, that one may have been the newest: it comes first, to be reported.
        numbered.sort(key=lambda path: _sequence(path) >= 0)
        for path in [*numbered, *([self.best] if self.best is not None else [])]:
            try:
                verify_checkpoint(path)
            except CheckpointError as error:
                warnings.warn(f"{error}; trying the one before", stacklevel=2)
                if path not in self.corrupt:
                    self.corrupt.append(path)
            else:
                return path
        return None

    def _prune(self, newest: Path) -> None:
        """Delete all but the newest ``keep``; ones known to be damaged do not count as kept."""
        intact = [path for path in self.all() if path not in self.corrupt or path == newest]
        kept = [newest, *[path for path in intact if path != newest][: self.keep - 1]]
        try:
            for path in self.all():
                if path not in kept:
                    _remove(path)
        except OSError as error:
            raise CheckpointError(f"{newest}: saved, but older checkpoints could not be deleted ({error})") from error

    def _link_best(self, path: Path) -> None:
        """Replace ``best`` in one step by a link to a directory with hard links to the files of ``path``."""
        token = uuid.uuid4().hex[:8]
        copy, link, best = self.folder / f"{HIDDEN}best-{token}", self.folder / f"{HIDDEN}link-{token}", self.folder / "best"
        try:
            try:
                copy.mkdir()
                for file in path.iterdir():
                    _link_or_copy(file, copy / file.name)
                _sync_directory(copy)
                link.symlink_to(copy.name, target_is_directory=True)
                if best.is_dir() and not best.is_symlink():
                    # A run folder that was copied with its links followed; a link cannot replace a directory.
                    os.rename(best, self.folder / f"{OLD}best-{token}")
                os.replace(link, best)
                _sync_directory(self.folder)
            finally:
                _clean_leftovers(self.folder)
        except OSError as error:
            reason = error.strerror or error
            raise CheckpointError(f"{best}: best checkpoint could not be replaced ({reason}); the former one is untouched") from error


def _require_name(name: str, pattern: re.Pattern[str], what: str, expected: str) -> None:
    if not isinstance(name, str) or not pattern.fullmatch(name):
        raise CheckpointError(f"{what} {name!r}: expected {expected}, a letter or digit first, as it names a file")


def _require_replaceable(target: Path) -> None:
    """Refuse to write where there is anything that is no checkpoint of ours, or a checkpoint with more in it than we wrote."""
    if not os.path.lexists(target):
        return
    try:
        files = _read_meta(target)["files"]
    except CheckpointError as error:
        raise CheckpointError(f"{target}: exists and is no checkpoint; choose another path") from error
    ours = {META, *(f"{group}.safetensors" for group in files)}
    foreign = sorted(path.name for path in target.iterdir() if path.name not in ours)
    if foreign:
        raise CheckpointError(f"{target}: has {foreign[0]} in it, which is no part of a checkpoint; choose another path")


def _flatten(tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Split a tree into plain values with references to tensors, and the tensors of each group by flat dotted name."""
    skeleton: dict[str, Any] = {}
    groups: dict[str, dict[str, Tensor]] = {}
    for group, value in tree.items():
        _require_name(group, GROUP, "checkpoint group", "letters, digits, '_' and '-'")
        tensors: dict[str, Tensor] = {}
        skeleton[group] = _encode(value, group, tensors)
        if tensors:
            groups[group] = tensors
    return skeleton, groups


def _encode(value: Any, where: str, tensors: dict[str, Tensor] | None) -> Any:
    """Turn a value into JSON that keeps its types; tensors go into ``tensors`` under their dotted name inside the group."""
    if isinstance(value, Tensor) and tensors is not None:
        if value.dtype not in DTYPES or value.layout != torch.strided or value.is_meta:
            raise CheckpointError(f"{where}: cannot store a {value.layout} tensor of {value.dtype} on {value.device}")
        name = wanted = where.partition(".")[2] or where
        while name in tensors or name == "__metadata__":
            # {"a.b": x, "a": {"b": y}} would give both the same name; the other name is reserved by the file format.
            name = f"{wanted}~{len(tensors) + 1}"
        tensors[name] = value.detach()
        return {"$tensor": name}
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{where}.{index}", tensors) for index, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str | int):
                raise CheckpointError(f"{where}: cannot store the key {key!r}; keys are text or integers")
        pairs = [(key, _encode(item, f"{where}.{key}", tensors)) for key, item in value.items()]
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        return dict(pairs) if plain else {"$dict": [list(pair) for pair in pairs]}
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise CheckpointError(f"{where}: cannot store a {kind}; use tensors, numbers, text, None, lists, tuples and mappings of them")


def _decode(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo :func:`_encode`."""
    if isinstance(node, list):
        return [_decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    special = next((key for key in node if key.startswith("$")), None)
    if special is None:
        return {key: _decode(item, tensors) for key, item in node.items()}
    content = node[special]
    if special == "$tensor":
        return tensors[content]
    if special == "$float":
        return float(content)
    if special == "$tuple":
        return tuple(_decode(item, tensors) for item in content)
    if special == "$dict":
        return {key: _decode(item, tensors) for key, item in content}
    raise ValueError(f"unknown kind {special}")


def _sealed(content: Mapping[str, Any]) -> bytes:
    """Return the text of ``meta.json``, with a checksum of its own content."""
    body = {"format": FORMAT, **content}
    return json.dumps({"checksum": _checksum(body), **body}, indent=1, allow_nan=False).encode()


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read_meta(path: Path) -> dict[str, Any]:
    """Read and verify ``meta.json``."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    if not path.is_dir():
        raise CheckpointError(f"{path}: not a checkpoint, which is a directory with {META}; other formats are never loaded")
    file = path / META
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing, so {path.name} is no complete checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: checkpoint is damaged (not JSON: {error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise CheckpointError(f"{file}: checkpoint is damaged (no format number)")
    if content["format"] > FORMAT:
        raise CheckpointError(f"{path}: checkpoint has format {content['format']}, this worldmpc reads up to {FORMAT}; update worldmpc")
    if content.pop("checksum", None) != _checksum(content):
        raise CheckpointError(f"{file}: checkpoint is damaged (checksum differs)")
    if not all(isinstance(content.get(key), dict) for key in ("files", "tree", "meta")) or not isinstance(content.get("sequence"), int):
        raise CheckpointError(f"{file}: checkpoint is damaged (a section is missing)")
    for group, entry in content["files"].items():
        # Names become paths, and whoever wrote this file can also write a fitting checksum.
        if not GROUP.fullmatch(group) or not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
            raise CheckpointError(f"{file}: checkpoint is damaged (bad file entry {group!r})")
    return content


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write one safetensors file piece by piece, without a second copy in memory; return its size and sha256."""
    # Widest first, so that every tensor starts at a multiple of its own item size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(text)
    with open(file, "wb") as stream:
        stream.write(text)
        for _, tensor in ordered:
            data = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(data), CHUNK):
                digest.update(data[start : start + CHUNK])
                stream.write(data[start : start + CHUNK])
        _sync_stream(stream)
        size = stream.tell()
    return {"size": size, "sha256": digest.hexdigest()}


def _write_file(file: Path, data: bytes) -> None:
    with open(file, "wb") as stream:
        stream.write(data)
        _sync_stream(stream)


def _sync_stream(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _verify_file(path: Path, group: str, content: Mapping[str, Any]) -> Path:
    """Compare one file with the size and sha256 in the checkpoint's meta, and return it."""
    file, entry = Path(path) / f"{group}.safetensors", content["files"][group]
    try:
        size = file.stat().st_size
        if size != entry["size"]:
            raise CheckpointError(f"{file}: checkpoint is damaged ({size:,} bytes instead of {entry['size']:,}); use another checkpoint")
        with open(file, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: checkpoint is damaged (file is missing); use another checkpoint") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error
    if digest != entry["sha256"]:
        raise CheckpointError(f"{file}: checkpoint is damaged (content differs from its sha256); use another checkpoint")
    return file


def _read_tensors(path: Path, group: str, content: Mapping[str, Any]) -> dict[str, Tensor]:
    file = _verify_file(path, group, content)
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a safetensors file ({error}); other formats are never loaded") from error


def _checkpoints(folder: Path) -> list[Path]:
    """Return the numbered checkpoints in a store's folder by name; hidden ones are unfinished."""
    if not folder.is_dir():
        return []
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and STEP.fullmatch(path.name)]


def _set_aside(folder: Path) -> list[Path]:
    """Return the numbered checkpoints that a killed writer moved away for one that never arrived."""
    return [path for path in _moved_aside(folder) if STEP.fullmatch(_former(path).name) and not os.path.lexists(_former(path))]


def _moved_aside(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name.startswith(OLD)] if folder.is_dir() else []


def _former(path: Path) -> Path:
    """Return where a directory that was set aside had been."""
    return path.with_name(path.name.removeprefix(OLD).rpartition("-")[0])


def _sequence(path: Path) -> int:
    """Return the place of a checkpoint in the order of saving; -1 where that cannot be read, which loading will report."""
    try:
        return _read_meta(path)["sequence"]
    except CheckpointError:
        return -1


def _move_into_place(temporary: Path, target: Path) -> None:
    """Rename a complete directory to its final name; a former one of that name is set aside first and comes back on failure."""
    if os.path.lexists(target):
        aside = target.with_name(f"{OLD}{target.name}-{uuid.uuid4().hex[:8]}")
        os.rename(target, aside)
        try:
            os.rename(temporary, target)
        except OSError:
            os.rename(aside, target)
            raise
        _remove(aside)
    else:
        os.rename(temporary, target)
    _sync_directory(target.parent)


def _clean_leftovers(folder: Path) -> None:
    """Delete what killed writers left behind in a store's folder; a checkpoint that one had set aside comes back."""
    best = (folder / "best").resolve()
    for path in list(folder.iterdir()):
        if path.name.startswith(OLD) and not os.path.lexists(_former(path)):
            os.rename(path, _former(path))
        elif path.name.startswith(HIDDEN) and (path.is_symlink() or path.resolve() != best):
            _remove(path)


def _remove(path: Path) -> None:
    """Delete a directory, or just the link or file."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Not every file system has hard links.
        shutil.copyfile(source, target)
        with open(target, "rb") as stream:
            os.fsync(stream.fileno())
