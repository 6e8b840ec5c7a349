"""From a path to an agent that can act: our checkpoints and run folders, and published ``.pt`` files."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from worldmpc.agents import make_agent
from worldmpc.agents.tdmpc2 import TDMPC2
from worldmpc.config import ConfigError, RunConfig, merge
from worldmpc.envs import Task, borrowed_envs, canonical_task
from worldmpc.models.official import is_official, load_official
from worldmpc.opponents.loaders import is_saved, read_name
from worldmpc.opponents.match import player_spec
from worldmpc.runtime import resolve_device
from worldmpc.training.checkpoint import (
    META,
    CheckpointError,
    CheckpointStore,
    check_same_architecture,
    find_saved,
    load_checkpoint,
    verify_checkpoint,
)
from worldmpc.training.policy_store import TrainingCheckpointer
from worldmpc.training.specs import spec_from
from worldmpc.training.transfer import fit_opponents
from worldmpc.types import Agent, EnvSpec


def load_agent(
    path: str | Path,
    task: Task | EnvSpec | None = None,
    *,
    device: str = "auto",
    seed: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    learn: bool = False,
) -> tuple[Agent, RunConfig]:
    """Load an agent and the configuration it acts with.

    Random streams begin anew from the seed: this is for acting and for further research; :func:`worldmpc.training.run.run` with
    ``resume`` continues a run exactly.

    Args:
        path: a run folder, a checkpoint folder, or a published ``.pt`` file; see :func:`find_checkpoint`.
        task: what to act in. Needed for a published file, as it does not say; for ours the task that was trained on is the default,
            and no environment is made for it.
        device: where to act.
        seed: of the random streams; None: that of the run, 1 for a published file.
        overrides: nested configuration values on top, such as ``{"planner": {"horizon": 5}}``; ``compile`` and ``cuda_graph`` of the run
            that trained the agent are not taken over.
        learn: its references of imagined opponents will be learned from: what was cloned from something else, that was then at the same
            path, begins anew. Without it they are kept, as they are needed to act.

    Raises:
        ConfigError: a published file without task, a task with other observations or actions, an override out of range or of a key that
            the agent never reads, or a learned prior where none was trained.
        CheckpointError: our checkpoint is missing or damaged, or does not fit the overrides.
        FileNotFoundError: no such published file.
    """
    device = resolve_device(device)
    # How another machine computed is nothing that this one has to be able to.
    changes: dict[str, Any] = {"compile": False, "cuda_graph": False, **(overrides or {}), "device": device}
    changes |= {} if seed is None else {"seed": seed}
    found = find_checkpoint(path)
    if is_official(found):
        return _load_official(found, task, device, changes)
    return _load_own(found, task, device, changes, learn)


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint that a path stands for: a run folder's best one, or its newest where the best is missing or damaged.

    Raises:
        CheckpointError: there is none, or no intact one, or it is of a training with components.
    """
    path = Path(path)
    path = find_saved(path.parent, path.name) or path
    is_run = (path / "config.json").exists() or (path / "checkpoints").exists()  # a run has a meta.json of its own
    if is_official(path) or ((path / META).is_file() and not is_run):
        return path
    folder = path if path.name == "checkpoints" else path / "checkpoints"
    if (folder / TrainingCheckpointer.STATE / META).is_file():
        raise _of_components(path)
    if not folder.is_dir():
        kind = "neither a run folder (no checkpoints/), a checkpoint, nor a .pt file" if path.exists() else "no such file or folder"
        raise CheckpointError(f"checkpoint: {path}: {kind}")
    store = CheckpointStore(folder, keep=1)
    if store.best is not None:
        try:
            verify_checkpoint(store.best)
        except CheckpointError as error:
            warnings.warn(f"{error}; using the newest checkpoint instead of the best", stacklevel=2)
        else:
            return store.best
    newest = store.newest_valid()
    if newest is None:
        raise CheckpointError(f"checkpoint: no usable checkpoint in {folder}")
    return newest


def identity(name: str) -> str:
    """Return what an opponent is known by wherever it lies: a bot's name, or the digest of what was saved.

    Raises:
        ConfigError: an unknown name.
        CheckpointError: nothing usable is at its path.
    """
    path = read_name(name).path
    if path is None:
        return name
    found = Path(path) if (Path(path) / META).is_file() and not (Path(path) / "checkpoints").is_dir() else find_checkpoint(path)
    return hashlib.sha256((found / META).read_bytes() if found.is_dir() else found.read_bytes()).hexdigest()[:16]


def task_spec(task: Task, config: RunConfig) -> EnvSpec:
    """Make one environment of a task, and return what it says about itself."""
    with borrowed_envs(task, dataclasses.replace(config.env, num_envs=1, workers="sync", num_workers=None), seed=config.seed) as envs:
        return envs.spec if envs.spec.seats is None else player_spec(envs.spec)


def trusted_task(task: str, found: str | Path = "the agent") -> str:
    """Return the task that a checkpoint names, unless making it would import a module: whoever wrote the checkpoint chose that.

    Raises:
        ConfigError: the task is ``gym/<module>:<EnvId>``; the message says how to ask for it.
    """
    if ":" in task:
        raise ConfigError(f"task: {found} was trained on {task}, which imports a module; name it with task={task} if you trust it")
    return task


def check_dimensions(path: str | Path, obs_dim: int, action_dim: int, spec: EnvSpec, discrete: bool = False) -> None:
    """Compare the dimensions of a model with those of a task.

    Raises:
        ConfigError: they differ; the message names both.
    """
    if spec.obs_shape != (obs_dim,) or spec.action_dim != action_dim:
        found = " x ".join(map(str, spec.obs_shape))
        raise ConfigError(
            f"task: {path} was trained on {obs_dim} observations and {action_dim} actions, "
            f"{spec.name} has {found} observations and {spec.action_dim} actions"
        )
    if spec.discrete != discrete:
        kinds = {True: "Discrete", False: "Box"}
        raise ConfigError(f"task: {path} was trained on {kinds[discrete]} actions, {spec.name} has {kinds[spec.discrete]} ones")


def _of_components(path: Path) -> CheckpointError:
    return CheckpointError(
        f"checkpoint: {path} was written by worldmpc.training.components, which keep a policy and no agent; "
        "score it with their PolicyEvaluator and PolicyStore (docs/components.md)"
    )


def _load_own(path: Path, task: Task | EnvSpec | None, device: str, changes: Mapping[str, Any], learn: bool) -> tuple[Agent, RunConfig]:
    if "config" not in load_checkpoint(path, groups=[])[1]:
        raise _of_components(path)
    tree, meta = load_checkpoint(path, groups=["agent"])
    config = RunConfig.from_dict(merge(meta["config"], changes), changes)
    # The critics learned with the discount of the task that was trained on, so its spec stays, also where another task is played.
    spec = spec_from(meta["spec"])
    if task is not None:
        spec_now = task if isinstance(task, EnvSpec) else task_spec(task, config)
        check_dimensions(path, spec.obs_shape[0], spec.action_dim, spec_now, spec.discrete)
        config = dataclasses.replace(config, task=canonical_task(task) if isinstance(task, str) else spec_now.name)
    agent = make_agent(config, spec, device)
    state = tree["agent"]
    if config.planner.prior == "none" and state.get("prior") is not None:  # trained with a prior that this planner has no use for
        parameters = {name: value for name, value in state["model"].items() if not name.startswith("trajectory.")}
        state = {**state, "model": parameters, "prior": None}
    if state.get("prior") is None:
        _refuse_prior(path, config)
    simulation, former = getattr(agent, "simulation", None), state.get("simulation")
    if simulation is not None and (learn or (former is not None and list(former["names"]) != list(simulation.names))):
        simulation.ids |= {name: identity(name) for name in simulation.references if learn or is_saved(name)}
    state, notes = fit_opponents(state, agent)
    for note in notes:
        warnings.warn(f"{path}: {note}", stacklevel=3)
    check_same_architecture(agent.model.state_dict(), state["model"])
    agent.load_state_dict({**state, "streams": agent.state_dict()["streams"]})
    return agent, config


def _load_official(path: Path, task: Task | EnvSpec | None, device: str, changes: Mapping[str, Any]) -> tuple[TDMPC2, RunConfig]:
    model = load_official(path)
    if task is None:
        raise ConfigError(f"task: {path} does not say which task it was trained on; name it with task=suite/name")
    termination = "off" if model.termination is None else "on"
    published = RunConfig(model=dataclasses.replace(model.config, termination=termination))
    config = RunConfig.from_dict(merge(published.to_dict(), changes))
    spec = task if isinstance(task, EnvSpec) else task_spec(task, config)
    check_dimensions(path, model.obs_dim, model.action_dim, spec)
    config = dataclasses.replace(config, task=canonical_task(task) if isinstance(task, str) else spec.name)
    _refuse_prior(path, config)
    agent = TDMPC2(config, spec, device)
    check_same_architecture(agent.model.state_dict(), model.state_dict())
    agent.model.load_state_dict(model.state_dict())
    return agent, config


def _refuse_prior(path: Path, config: RunConfig) -> None:
    """Refuse to plan with a prior over action sequences, as the checkpoint has none."""
    if config.planner.prior == "learned":
        raise ConfigError(f"planner.prior: {path} holds no learned prior; use planner.prior=none, or train one with planner.prior=learned")
