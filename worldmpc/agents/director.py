"""Director (Hafner, Lee, Fischer, Abbeel 2022, "Deep Hierarchical Planning from Pixels") on the world model of TD-MPC2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from worldmpc.agents.goals import GoalCarry, GoalPlans, GoalSetter
from worldmpc.agents.planning import plan_output, plan_replay
from worldmpc.agents.tdmpc2 import TDMPC2
from worldmpc.config import RunConfig, seed_decisions, too_long_interval
from worldmpc.data.source import ReplaySource
from worldmpc.data.transitions import first_steps
from worldmpc.learners.hierarchy import HierarchyLearner
from worldmpc.learners.objectives import Objectives
from worldmpc.models.goal_directed import GoalDirected, plan_weights
from worldmpc.models.hierarchy import Hierarchy
from worldmpc.noise import NoiseSpec, NoiseStream
from worldmpc.types import ActOutput, Carry, EnvSpec, Metrics, Mode, SequenceBatch


class Director:
    """A manager that sets goals in the latent space every so many decisions, and a worker that plans towards them.

    The world model, its policy and its critics are those of TD-MPC2 and learn as they do there, from what the worker does.

    Args:
        config: the run's configuration.
        spec: what the environments said about themselves.
        device: where to act and learn.
        total_updates: length of the learning-rate schedule.

    Raises:
        ConfigError: goals that last longer than an episode.
    """

    def __init__(self, config: RunConfig, spec: EnvSpec, device: torch.device | str = "cpu", total_updates: int = 1) -> None:
        interval = config.manager.goal_interval
        if spec.episode_length is not None and interval > spec.episode_length:
            raise too_long_interval(interval, spec.episode_length)
        self.flat = TDMPC2(config, spec, device, total_updates)
        self.config, self.spec, self.device, self.discount = config, spec, self.flat.device, self.flat.discount
        self.hierarchy = Hierarchy(config.goal_vae, config.manager, config.worker, self.flat.model, config.seed).to(self.device)
        self.model = nn.ModuleDict({"world": self.flat.model, "director": self.hierarchy})
        own, weights = self.hierarchy, lambda: plan_weights(config.worker, self.hierarchy.worker)
        self.planning = GoalDirected(self.flat.model, own.worker, own.similarity, weights)
        self.streams = {name: NoiseStream(config.seed, "director", name, device=self.device) for name in ("goals", "update")}
        self.learner = HierarchyLearner(config, self.hierarchy, self.planning, self.streams["update"], total_updates)
        self.setter = GoalSetter(self.hierarchy, interval)
        self.plans = GoalPlans(config, self.flat.planner, self.planning, self.setter, self.device)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """How it can act; ``prior`` is the worker's policy, or the task's without one, under the manager's most likely goals."""
        return self.flat.modes

    @property
    def window(self) -> int:
        """Steps of the replayed windows: enough for the world model, and for a goal."""
        return max(self.config.window, self.setter.interval)

    @property
    def updates(self) -> int:
        """Updates so far."""
        return self.flat.updates

    @property
    def compile_seconds(self) -> float:
        """Seconds that compiling took so far; 0 without ``compile``."""
        return self.flat.compile_seconds + self.learner.compile_seconds + self.plans.compile_seconds

    @property
    def objectives(self) -> Objectives:
        """What the world model and the task's policy learn."""
        return self.flat.objectives

    def init_carry(self, num_envs: int) -> GoalCarry:
        """Return the carry of ``num_envs`` fresh episodes, in which a goal is due at once."""
        return self.setter.begin(self.flat.init_carry(num_envs).plan)

    @torch.no_grad()
    def act(self, carry: GoalCarry, obs: Tensor, mode: Mode, goal: Tensor | Literal["manager"] | None = "manager") -> ActOutput:
        """Choose actions: [E, O] -> [E, A] in [-1, 1], or one-hot.

        Args:
            carry: of the episodes under way.
            obs: [E, O].
            mode: explore, eval, or prior (policies alone); only exploring the manager's goals are drawn at random.
            goal: the manager's, weighed against the task; or latents [E, Z] to go to, for which plans forget the task (the worker's policy
                does not, so that with ``mode=prior`` it counts as with the manager's); or None, which is TD-MPC2.

        Raises:
            TypeError: a goal of another kind.
            ValueError: goals of another shape, or not finite; no such mode.
        """
        if mode not in ("explore", "eval", "prior"):
            raise ValueError(f"mode: expected explore, eval or prior, got {mode!r}")
        obs = obs.to(self.device)
        if goal is None:
            output = self.flat.act(Carry(carry.plan), obs, mode)
            return output._replace(carry=carry._replace(plan=output.carry.plan))
        noise = self._noise(len(obs), mode)
        alone = not (isinstance(goal, str) and goal == "manager")
        if alone:
            carry = self.setter.follow(carry, goal)
        if mode == "prior" or not self.config.planner.mpc:
            carry, state = self.plans.state(obs, carry, noise)
            return ActOutput(self.planning.follow(state, noise["eps"]), carry, {"goal_code": carry.code}, {})
        carry, plan = self.plans.decide(obs, carry, noise, mode, alone)
        output = plan_output(plan)
        return ActOutput(output.action, carry, {**output.extras, "goal_code": carry.code}, output.metrics)

    def _noise(self, num_envs: int, mode: Mode) -> dict[str, Tensor]:
        """Draw the noise of one decision; goals are drawn at random where it explores alone."""
        explores, plans = mode == "explore", mode != "prior" and self.config.planner.mpc
        specs = self.flat.planner.noise_specs(num_envs) if plans else {"eps": NoiseSpec("normal", (num_envs, self.spec.action_dim))}
        noise = dict(self.flat.streams.acting(mode).draw(specs))
        if not plans and not explores:
            noise["eps"] = torch.zeros_like(noise["eps"])
        return noise | (self.streams["goals"].draw(self.setter.noise_specs(num_envs)) if explores else {})

    def make_source(self, num_envs: int, generator: torch.Generator) -> ReplaySource:
        """Return a replay of windows that are long enough for a goal, with what plans and goals leave in it."""
        config, window = self.config, self.window
        extras = {"goal_code": (config.goal_vae.n_latents,)}
        replay = plan_replay(config, self.spec, num_envs, self.device, window, extras)
        return ReplaySource(replay, config.loss.batch_size, config.train.utd, seed_decisions(config, self.spec.episode_length), generator)

    def update(self, batch: SequenceBatch) -> Metrics:
        """Do one update: of the world model on the windows' first steps as TD-MPC2 does, then of goals, worker and manager."""
        metrics = self.flat.update(first_steps(batch, self.config.window))
        shared = ("consistency_loss", "reward_loss", *(("value_loss", "pi_loss") if self.hierarchy.worker is None else ()))
        metrics |= {f"worker/{name}": metrics[name] for name in shared}
        metrics |= self.learner.update(batch)
        return metrics | {"skipped_updates": metrics["skipped_updates"] + self.learner.skipped}

    def reset_eval_noise(self, *index: int) -> None:
        """Start the evaluation stream anew."""
        self.flat.reset_eval_noise(*index)

    def state_dict(self) -> dict[str, Any]:
        """Return parameters, optimisers, running scales, counters and random streams."""
        flat = self.flat.state_dict()
        streams = {"flat": flat.pop("streams"), **{name: stream.state_dict() for name, stream in self.streams.items()}}
        flat.pop("model")
        return {"model": dict(self.model.state_dict()), "flat": flat, "learner": self.learner.state_dict(), "streams": streams}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        world = {name.removeprefix("world."): value for name, value in state["model"].items() if name.startswith("world.")}
        self.model.load_state_dict(state["model"])
        self.flat.load_state_dict({**state["flat"], "model": world, "streams": state["streams"]["flat"]})
        self.learner.load_state_dict(state["learner"])
        for name, stream in self.streams.items():
            stream.load_state_dict(state["streams"][name])
