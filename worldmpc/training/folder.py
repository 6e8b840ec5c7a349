"""Run folders: which one a run writes to, what may change when it goes on there, and the files that say what it is."""

from __future__ import annotations

import fcntl
import json
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from worldmpc.config import ConfigError, RunConfig, merge, preset_values
from worldmpc.files import write_whole
from worldmpc.functional import tree_tensors
from worldmpc.opponents.match import Envs
from worldmpc.report.provenance import command_line, git_commit, machine_info
from worldmpc.training.checkpoint import CheckpointStore, check_same_architecture, load_checkpoint
from worldmpc.training.logger import RunLogger
from worldmpc.training.specs import spec_dict
from worldmpc.training.trainer import DivergenceError, TrainState, check_losses
from worldmpc.training.transfer import fit_opponents

FREE = ("steps", "eval_freq", "device", "threads", "compile", "cuda_graph", "seeds", "log", "checkpoint", "eval", "label")
"""Keys and groups that may change while ``resume=auto`` still takes a run for the same one."""
FIXED = (
    "task",
    "agent",
    "env",
    "model",
    "dynamics.name",
    "dynamics.hidden",
    "dynamics.members",
    "mbmpc.hidden",
    "mbmpc.learn_policy",
    "planner.horizon",
    "loss.horizon",
    "planner.mpc",
    "planner.prior",
    "dqn.hidden",
    "dqn.dueling",
    "dqn.n_step",
    "ppo.hidden",
    "sac.hidden",
    "td3.hidden",
    "replay.capacity",
    "opponents.name",
    "multi_gamma.enabled",
    "multi_gamma.gammas",
    "multi_gamma.head",
    "multi_gamma.hidden_layers",
    "multi_gamma.bootstrap",
)
"""Keys and groups that no resumed run may change, because its past would no longer mean the same, or its parameters not fit."""


def choose_folder(config: RunConfig) -> tuple[Path, Path | None]:
    """Return the folder of the run, created, and the checkpoint to resume from, if any.

    Raises:
        ConfigError: ``run_dir`` holds another run, or ``resume`` names nothing that can be resumed.
    """
    if config.resume not in ("never", "auto"):
        path = Path(config.resume)
        holds_run = (path / "checkpoints").is_dir()
        if not holds_run and (not (path / "meta.json").is_file() or path.parent.name != "checkpoints"):
            raise ConfigError(f"resume: expected never, auto, a run folder or a checkpoint folder, got '{config.resume}'")
        if config.run_dir is not None and Path(config.run_dir) not in (path, path.parent.parent):
            raise ConfigError(f"run_dir: a resumed run goes on in its own folder; leave run_dir out, or copy {path} there first")
        if holds_run:
            newest = CheckpointStore(path / "checkpoints", keep=config.checkpoint.keep).newest_valid()
            if newest is None:
                raise ConfigError(f"resume: no usable checkpoint in {path / 'checkpoints'}")
            return path, newest
        return path.parent.parent, path
    base = Path(config.run_dir) if config.run_dir else default_folder(config)
    candidates = [base] if config.run_dir else [base, *(base.with_name(f"{base.name}-{number}") for number in range(2, 10_000))]
    taken = candidates[: _first_free(candidates)]
    if config.resume == "auto":
        for path in taken if config.run_dir else []:
            different = _differences(path, config)
            if different:
                # Warm starts of other planners may have other shapes, so that way is not promised.
                stuck = any(_fixed(name) or name.startswith("planner.") for name in different)
                other = "" if stuck else f", or go on with resume={path}"
                raise ConfigError(f"resume: {path} holds a run with another {', '.join(different)}; choose another run_dir{other}")
        same = [path for path in taken if not _differences(path, config)]
        for path in reversed(same):
            newest = CheckpointStore(path / "checkpoints", keep=config.checkpoint.keep).newest_valid()
            if newest is not None:
                return path, newest
        damaged = next((path for path in same if CheckpointStore(path / "checkpoints", keep=config.checkpoint.keep).all()), None)
        if damaged is not None:
            raise ConfigError(f"resume: no intact checkpoint in {damaged / 'checkpoints'}; choose another run_dir to begin anew")
        if same and (reached := _recorded(same[-1])):
            raise ConfigError(
                f"resume: {same[-1]} has records of {reached:,} decisions and no checkpoint to go on from; choose another run_dir, or "
                "remove that folder to begin anew"
            )
        # Killed before its first checkpoint: begin again in the same place.
        folder = same[-1] if same else candidates[_first_free(candidates)]
    elif taken and config.run_dir:
        raise ConfigError(f"run_dir: {base} already holds a run; go on with resume=auto, or choose another run_dir")
    else:
        folder = candidates[_first_free(candidates)]
    folder.mkdir(parents=True, exist_ok=True)
    return folder, None


def _recorded(folder: Path) -> int:
    """Return up to which decision there are records; a line that was not finished does not count."""
    found = [0]
    for name, pattern in (("eval.csv", r"(\d+),"), ("metrics.jsonl", r'\{"decisions": (\d+),')):
        if (file := folder / name).exists():
            found += [int(match[1]) for line in file.read_text(errors="replace").splitlines() if (match := re.match(pattern, line))]
    return max(found)


def _fixed(name: str) -> bool:
    return name in FIXED or name.split(".")[0] in FIXED


def _differences(folder: Path, config: RunConfig) -> list[str]:
    """Return the keys, other than those of :data:`FREE`, in which a folder's run differs from a configuration."""
    file = folder / "config.json"
    if not file.exists():
        return []
    changes = _changes_since(json.loads(file.read_text()), config)
    return [name for name, _, _ in changes if name.split(".")[0] not in FREE]


def default_folder(config: RunConfig) -> Path:
    """Return runs/<task>/<label or agent>-<preset>-seed<seed>."""
    slug = config.task.replace("/", "-").replace(":", "-")
    return Path("runs") / slug / f"{config.label or config.agent}-{config.preset}-seed{config.seed}"


def _first_free(candidates: list[Path]) -> int:
    return next((index for index, path in enumerate(candidates) if not _holds_run(path)), len(candidates))


def _holds_run(path: Path) -> bool:
    return (path / "config.json").exists() or (path / "checkpoints").exists()


@contextmanager
def lock(folder: Path, option: str = "run_dir") -> Iterator[None]:
    """Keep a second process out of the folder that an option has named."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{option}: another process is writing to {folder}; choose another {option} or wait") from error
        except OSError as error:  # some network file systems have none
            warnings.warn(f"{folder}: this file system has no locks ({error.strerror}); do not start the run twice", stacklevel=2)
        yield


def restore(state: TrainState, checkpoint: Path | None, logger: RunLogger, config: RunConfig) -> dict[str, Any] | None:
    """Load the checkpoint, drop what was logged after it, and return its tree."""
    if checkpoint is None:
        logger.truncate(-1)
        return None
    tree, meta = load_checkpoint(checkpoint)
    changes = list(_changes_since(meta["config"], config))
    for name, before, now in changes:
        if _fixed(name) and not name.startswith("model."):  # of whose widths the tensors say more
            raise ConfigError(f"resume: {checkpoint} was made with {name}={before}, which cannot become {now}; begin a new run")
    tree["agent"], notes = fit_opponents(tree["agent"], state.agent)
    if notes:  # what was remembered of games under way is of other plans and beliefs
        tree["loop"]["carry"] = tree_tensors(state.carry)
    for note in notes:
        logger.message(f"resume: {note}")
    check_same_architecture(state.agent.model.state_dict(), tree["agent"]["model"])
    for name, before, now in changes:
        if _fixed(name):
            raise ConfigError(f"resume: {checkpoint} was made with {name}={before}, which cannot become {now}; begin a new run")
        logger.message(f"resume: {name} was {before!r}, is now {now!r}")
    if {"discrete": False, "other": None, "mirror": None, **meta["spec"]} != spec_dict(state.envs.spec):
        raise ConfigError(f"resume: {checkpoint} was made with another environment: {meta['spec']}, now {spec_dict(state.envs.spec)}")
    if "replay" not in tree:
        logger.message(
            f"resume: the checkpoint has no replay (checkpoint.replay=false): acting for {state.source.seed_decisions:,} decisions "
            f"before the next update"
        )
    try:
        state.load_state_dict(tree)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"resume: {checkpoint} does not fit this planner and these networks; begin a new run ({reason[:400]})") from error
    try:
        check_losses(state.metrics, config.train.max_loss)
    except DivergenceError:
        state.metrics = {}  # of an update that was not applied and has been reported: it must not end the run again
    # Where the hooks of the saved step are still to be done, what they wrote about it is theirs to write again.
    logger.truncate(state.decisions if state.settled else state.decisions - 1)
    return tree


def _changes_since(saved: Mapping[str, Any], config: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, before, now) as :func:`_config_changes` does; keys younger than the saved run are as its preset has them."""
    younger = preset_values(saved["preset"], saved["agent"], saved["task"])
    return _config_changes(merge(merge(RunConfig().to_dict(), younger), saved), config.to_dict())


def _config_changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, before, now) of everything that differs, apart from where a run is and how it was begun."""
    for name, value in new.items():
        before = old.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            yield from _config_changes(before, value, f"{prefix}{name}.")
        elif before != value and f"{prefix}{name}" not in ("resume", "run_dir"):
            yield f"{prefix}{name}", before, value


def write_meta(folder: Path, config: RunConfig, envs: Envs, checkpoint: Path | None, parameters: Mapping[str, int]) -> dict[str, Any]:
    """Write ``meta.json`` and ``config.json``; return what checkpoints hold of them."""
    meta = {
        "command": command_line(),
        "commit": git_commit(),
        "machine": machine_info(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "spec": spec_dict(envs.spec),
        "parameters": dict(parameters),
    }
    if checkpoint is not None and (folder / "meta.json").exists():
        first = json.loads((folder / "meta.json").read_text())
        meta = first | {"resumed": [*first.get("resumed", []), {name: meta[name] for name in ("command", "commit", "machine", "started")}]}
    write_whole(folder / "meta.json", json.dumps(meta, indent=2) + "\n")
    write_whole(folder / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
    return {"config": config.to_dict(), "spec": meta["spec"]}
