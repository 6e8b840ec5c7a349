"""Policies and the state of training on disk, in the library's one checkpoint format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from worldmpc.config import ConfigError
from worldmpc.envs.vector import VecEnv
from worldmpc.models.actor_critic import ActorCritic
from worldmpc.training.checkpoint import META, CheckpointError, check_same_architecture, find_saved, load_checkpoint, save_checkpoint
from worldmpc.training.configs import AgentConfig
from worldmpc.types import EnvSpec

Builder = Callable[[AgentConfig, EnvSpec, int], nn.Module]
"""``(agent, spec, seed) -> policy`` with initial weights."""


@dataclass(frozen=True)
class PolicyRecord:
    """A policy and what is known about it."""

    name: str
    policy: nn.Module
    uri: str | None = None
    """Where it is saved; None: nowhere yet."""
    metadata: dict[str, Any] = field(default_factory=dict)


def mlp_policy(agent: AgentConfig, spec: EnvSpec, seed: int) -> ActorCritic:
    """Make a policy for vectors.

    Raises:
        ConfigError: the environments have other observations.
    """
    if len(spec.obs_shape) != 1:
        shape = list(spec.obs_shape)
        raise ConfigError(f"agent.name: mlp is for vectors, {spec.name} has observations of shape {shape}; use simple_cnn for images")
    return ActorCritic.build(_architecture(agent, spec, spec.obs_shape[0], None), agent.log_std_init, seed)


def cnn_policy(agent: AgentConfig, spec: EnvSpec, seed: int) -> ActorCritic:
    """Make a policy for images [C, height, width] of pixels from 0 to 255.

    Raises:
        ConfigError: the environments have other observations.
    """
    if len(spec.obs_shape) != 3:
        shape = list(spec.obs_shape)
        raise ConfigError(f"agent.name: simple_cnn is for images, {spec.name} has observations of shape {shape}; use mlp for vectors")
    return ActorCritic.build(_architecture(agent, spec, agent.hidden_size, spec.obs_shape), agent.log_std_init, seed)


class PolicyStore:
    """Policies in a folder, each in the library's one checkpoint format: plain tensors and JSON, nothing that runs code.

    Args:
        folder: where they are; created at the first save.
        agent: what :meth:`create` makes.
        device: where policies are put.
        seed: of initial weights.
        builders: further networks that ``agent.name`` may name. Policies that they make are saved as well if they say what they are
            made of: an attribute ``architecture`` of plain values with a ``name``, under which ``loaders`` has a function that makes
            the network of it again.
        loaders: ``architecture -> network`` by name.
    """

    def __init__(
        self,
        folder: str | Path,
        agent: AgentConfig | None = None,
        device: torch.device | str = "cpu",
        *,
        seed: int = 1,
        builders: Mapping[str, Builder] | None = None,
        loaders: Mapping[str, Callable[[Mapping[str, Any]], nn.Module]] | None = None,
    ) -> None:
        self.folder, self.agent, self.device, self.seed = Path(folder), agent or AgentConfig(), torch.device(device), seed
        self.builders: dict[str, Builder] = {"mlp": mlp_policy, "simple_cnn": cnn_policy, **(builders or {})}
        self.loaders: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {"actor_critic": ActorCritic.build, **(loaders or {})}

    def create(self, env: VecEnv | EnvSpec) -> PolicyRecord:
        """Make a policy with initial weights for environments; it is not saved.

        Raises:
            ConfigError: unknown ``agent.name``, or one that does not fit the observations.
        """
        if self.agent.name not in self.builders:
            raise ConfigError(f"agent.name: unknown policy '{self.agent.name}'; one of {', '.join(self.builders)}, or give builders")
        spec = env if isinstance(env, EnvSpec) else env.spec
        policy = self.builders[self.agent.name](self.agent, spec, self.seed).to(self.device)
        return PolicyRecord("initial", policy, None, {"task": spec.name})

    def save(self, name: str, policy: nn.Module, metadata: Mapping[str, Any] | None = None) -> PolicyRecord:
        """Save a policy; one of that name is replaced.

        Args:
            name: letters, digits, ``_``, ``-`` and ``.``.
            policy: its parameters and its ``architecture`` are saved.
            metadata: plain values that come back with it.

        Raises:
            ConfigError: a policy that does not say what it is made of.
            CheckpointError: it could not be written.
        """
        architecture = getattr(policy, "architecture", None)
        if not isinstance(architecture, Mapping):
            raise ConfigError(
                f"policy: a {type(policy).__name__} without `architecture` could not be loaded again; give it one, "
                f"plain values that it is made of with a `name`, and the store a loader of that name"
            )
        architecture = {"name": "actor_critic", **architecture} if isinstance(policy, ActorCritic) else dict(architecture)
        meta = {"name": name, "architecture": architecture, "metadata": dict(metadata or {})}
        path = save_checkpoint(self.folder, name, {"policy": dict(policy.state_dict())}, meta)
        return PolicyRecord(name, policy, str(path), dict(metadata or {}))

    def policy(self, uri: str | Path) -> PolicyRecord:
        """Load a policy: by its name in this store, or by a path, with or without ``file://``.

        Raises:
            CheckpointError: it is missing or damaged, or holds no policy.
            ConfigError: nobody here makes its kind of network.
        """
        path = self.path(uri)
        tree, meta = load_checkpoint(path, ["policy"])
        architecture = dict(meta.get("architecture", {}))
        kind = architecture.pop("name", None)
        if kind not in self.loaders:
            raise ConfigError(f"policy: {path} holds a {kind}, this store loads {', '.join(self.loaders)}; give it a loader")
        policy = self.loaders[kind](architecture)
        check_same_architecture(policy.state_dict(), tree["policy"])
        policy.load_state_dict(tree["policy"])
        return PolicyRecord(meta["name"], policy.to(self.device), str(path), dict(meta["metadata"]))

    def path(self, uri: str | Path) -> Path:
        """Return where a policy is.

        Raises:
            CheckpointError: there is none.
        """
        text = str(uri).removeprefix("file://")
        for path in (self.folder / text, Path(text)):
            if (path / META).is_file():
                return path
        raise CheckpointError(f"policy: nothing at {uri}, neither in {self.folder} nor as a path of its own")

    def names(self) -> list[str]:
        """Return the names of all policies in the store."""
        return sorted(path.name for path in self.folder.iterdir() if (path / META).is_file()) if self.folder.is_dir() else []


class TrainingCheckpointer:
    """Saves and loads what a training consists of: policies, and the state of everything around them.

    Args:
        checkpoint_dir: where the trainer's state goes, unless a call names another folder.
        policy_store: where policies go.
        wandb_run: uploads policies as well, where given.
    """

    STATE = "trainer_state"

    def __init__(self, checkpoint_dir: str | Path, policy_store: PolicyStore, wandb_run: Any = None) -> None:
        self.checkpoint_dir, self.policy_store, self.wandb_run = Path(checkpoint_dir), policy_store, wandb_run
        self.last_policy: PolicyRecord | None = None

    def save_policy(self, policy: nn.Module, epoch: int, metadata: Mapping[str, Any] | None = None) -> PolicyRecord:
        """Save the policy of an epoch, with that among its metadata.

        Raises:
            CheckpointError: it could not be written.
        """
        record = self.policy_store.save(f"policy_{epoch:06d}", policy, {"epoch": epoch, **(metadata or {})})
        if self.wandb_run is not None:
            self.wandb_run.save(f"{record.uri}/*")
        self.last_policy = record
        return record

    def save_trainer_state(
        self, agent_step: int, epoch: int, optimizer_state_dict: Mapping[str, Any], run_dir: str | Path | None = None, **extra: Any
    ) -> Path:
        """Save everything but the policy, and the name of the policy that was saved last.

        Args:
            agent_step: decisions so far.
            epoch: epochs so far.
            optimizer_state_dict: of the optimizer.
            run_dir: where to; None: ``checkpoint_dir``.
            extra: whatever else is to come back, nested plain values and tensors.

        Raises:
            CheckpointError: it could not be written; what was there before is untouched.
        """
        state = {
            "agent_step": agent_step,
            "epoch": epoch,
            "optimizer_state_dict": dict(optimizer_state_dict),
            "policy_uri": None if self.last_policy is None else self.last_policy.name,
            **extra,
        }
        return save_checkpoint(self._folder(run_dir), self.STATE, {"trainer": state}, {"agent_step": agent_step, "epoch": epoch})

    def load_trainer_state(self, run_dir: str | Path | None = None) -> dict[str, Any] | None:
        """Return what :meth:`save_trainer_state` saved, or None where nothing was.

        Raises:
            CheckpointError: it is damaged.
        """
        path = find_saved(self._folder(run_dir), self.STATE)
        return None if path is None else load_checkpoint(path, ["trainer"])[0]["trainer"]

    def load_policy(
        self,
        checkpoint: Mapping[str, Any] | None,
        env: VecEnv | EnvSpec,
        initial_policy_uri: str | Path | None = None,
        default_path: str | Path | None = None,
    ) -> PolicyRecord:
        """Return the policy to go on with: the checkpoint's, else the initial one, else the one at the default path, else a new one.

        Args:
            checkpoint: what :meth:`load_trainer_state` returned.
            env: what a new policy is made for.
            initial_policy_uri: a policy to begin with.
            default_path: a policy to begin with if it is there.

        Raises:
            CheckpointError: a policy that was named is missing or damaged.
        """
        if checkpoint is not None and checkpoint.get("policy_uri") is not None:
            self.last_policy = self.policy_store.policy(checkpoint["policy_uri"])
            return self.last_policy
        if initial_policy_uri is not None:
            return self.policy_store.policy(initial_policy_uri)
        if default_path is not None and Path(default_path).exists():
            return self.policy_store.policy(default_path)
        return self.policy_store.create(env)

    def _folder(self, run_dir: str | Path | None) -> Path:
        return self.checkpoint_dir if run_dir is None else Path(run_dir)


def _architecture(agent: AgentConfig, spec: EnvSpec, obs_dim: int, image: tuple[int, ...] | None) -> dict[str, Any]:
    hidden = [agent.hidden_size] * agent.num_layers
    return {"obs_dim": obs_dim, "action_dim": spec.action_dim, "hidden": hidden, "discrete": spec.discrete, "image": image}
