"""Several seeds of one agent as one batched model: act and learn together, everything else apart."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from worldmpc.agents.planning import plan_output
from worldmpc.agents.tdmpc2 import TDMPC2
from worldmpc.functional import CapturedByShape, maybe_compile, tree_map
from worldmpc.learners.world_model import Learner
from worldmpc.optim import GroupOptimizer
from worldmpc.types import ActOutput, Carry, Metrics, Noise, PlanResult, SequenceBatch

TreeT = TypeVar("TreeT")


class Stack:
    """``N`` agents that differ in their seeds, with their parameters stacked; each agent goes on holding its own, as a view.

    One plan and one update of all seeds are :func:`torch.vmap` over those of one. Clipping, running scale, noise and metrics are per
    seed, so that each seed does what it would do alone (to rounding). The one thing in common: an update whose loss is not finite for
    one seed is applied to none.

    Args:
        agents: made with the same configuration apart from the seed; from now on they learn through the stack.

    Raises:
        ValueError: no agents, or agents that differ in more than their seed.
    """

    def __init__(self, agents: Sequence[TDMPC2]) -> None:
        first = agents[0] if agents else None
        if first is None or any(agent.spec != first.spec or _without_seed(agent) != _without_seed(first) for agent in agents):
            raise ValueError("stack: expected at least one agent, and agents that differ in their seed alone")
        if any(_slots(agent) != _slots(first) for agent in agents):
            raise ValueError("stack: the agents have other loss terms, weights or objectives than the first one; give them the same ones")
        self.agents = list(agents)
        self._verbs = _Verbs(first)
        learners = [agent.learner for agent in agents]
        model_optimizer = GroupOptimizer.stack([learner.model_optimizer for learner in learners])
        policy_optimizer = GroupOptimizer.stack([learner.policy_optimizer for learner in learners])
        copies = first.model.slow_copies
        slow = {name: _stack_parameters([agent.model.get_submodule(name) for agent in agents]) for name in copies}
        scale, skipped = torch.stack([learner.scale for learner in learners]), torch.stack([learner.skipped for learner in learners])
        for index, learner in enumerate(learners):
            learner.scale, learner.skipped = scale[index], skipped[index]
            learner.leave_to_stack()
        self._params = {
            **{f"model.{name}": value for name, value in zip(model_optimizer.names, model_optimizer.params, strict=True)},
            **{f"model.{name}": value for name, value in zip(policy_optimizer.names, policy_optimizer.params, strict=True)},
            **{f"model.{copy}.{name}": value for copy, values in slow.items() for name, value in values.items()},
        }

        def update_target(tau: Tensor) -> None:
            for copy, values in slow.items():
                for name, value in values.items():
                    value.lerp_(self._params[f"model.{copies[copy]}.{name}"].detach(), tau.view(-1, *[1] * (value.dim() - 1)))

        def reset(update: int) -> None:
            for agent in agents:
                agent.model.reset_last_layers(update)

        def check() -> None:
            for learner in learners:
                learner.check()

        compiled = first.config.compile
        self.learner = Learner(
            first.config,
            maybe_compile(lambda batch, noise: self._call("objectives.model_loss", batch, noise), compiled),
            maybe_compile(lambda zs, batch, scale, noise: self._call("objectives.policy_loss", zs, batch, scale, noise), compiled),
            model_optimizer,
            policy_optimizer,
            update_target,
            scale,
            policy_from=learners[0].policy_from,
            reset=reset,
            check=check,
        )
        self.learner.skipped, self.learner.updates = skipped, learners[0].updates
        self._plan = maybe_compile(lambda obs, state, noise: self._call("plan", obs, state, noise, explore=True), compiled)
        if first.config.cuda_graph:
            self._plan = CapturedByShape(self._plan)
        self.batched_acting = first.device.type != "cpu"
        """Whether the seeds plan as one batch. On a CPU one after the other is faster, as each plan keeps all cores busy."""

    @torch.no_grad()
    def act(self, carries: Sequence[Carry], obs: Sequence[Tensor]) -> list[ActOutput]:
        """Choose exploring actions: one carry and observations [E, O] per seed -> one answer per seed, as :meth:`TDMPC2.act`."""
        first = self.agents[0]
        if not self.batched_acting or not first.config.planner.mpc:
            return [agent.act(carry, own, "explore") for agent, carry, own in zip(self.agents, carries, obs, strict=True)]
        specs = first.planner.noise_specs(len(obs[0]))
        noise = _stacked([agent.streams["explore"].draw(specs) for agent in self.agents])
        starts = _stacked([carry.plan for carry in carries])
        plan: PlanResult = self._plan(torch.stack(list(obs)).to(first.device), starts, noise)
        return [plan_output(tree_map(operator.itemgetter(index), plan)) for index in range(len(self.agents))]

    def update(self, batches: Sequence[SequenceBatch]) -> list[Metrics]:
        """Do one update of every seed on its own batch; return the metrics of each."""
        steps, batch_size = batches[0].reward.shape
        noise = _stacked([agent.streams["update"].draw(agent.objectives.noise_specs(steps, batch_size)) for agent in self.agents])
        return self.update_with_noise(_stacked(batches), noise)

    def update_with_noise(self, batch: SequenceBatch, noise: Noise) -> list[Metrics]:
        """Do one update with given noise; every tensor of both has a leading ``N``."""
        metrics = self.learner.update(batch, noise)
        for agent in self.agents:
            agent.learner.updates = self.learner.updates
        return [{name: value[index] for name, value in metrics.items()} for index in range(len(self.agents))]

    def _call(self, verb: str, *args: Any, **constants: Any) -> Any:
        """Call a method of the agent for all seeds: every tensor of the arguments and of the result has a leading ``N``."""

        def one(params: Mapping[str, Tensor], *args: Any) -> Any:
            return functional_call(self._verbs, dict(params), (verb, *args), constants)

        return torch.vmap(one)(self._params, *args)


class _Verbs(nn.Module):
    """An agent's methods as those of a module, so that they can be called with other parameters."""

    def __init__(self, agent: TDMPC2) -> None:
        super().__init__()
        self.model, self._agent = agent.model, [agent]

    def forward(self, verb: str, *args: Any, **constants: Any) -> Any:
        return operator.attrgetter(verb)(self._agent[0])(*args, **constants)


def _slots(agent: TDMPC2) -> tuple[Any, ...]:
    objectives = agent.objectives
    return objectives.terms, objectives.weights, objectives.groups, objectives.policy


def _without_seed(agent: TDMPC2) -> dict[str, Any]:
    return agent.config.to_dict() | {"seed": None, "run_dir": None, "resume": None}


def _stack_parameters(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return the parameters of equal modules stacked; the modules then hold views."""
    stacked = {}
    named = [dict(module.named_parameters()) for module in modules]
    for name in named[0]:
        stacked[name] = torch.stack([own[name].detach() for own in named])
        for index, own in enumerate(named):
            own[name].data = stacked[name][index]
    return stacked


def _stacked(trees: Sequence[TreeT]) -> TreeT:
    """Stack equal named tuples and dicts of tensors."""
    first: Any = trees[0]
    if isinstance(first, Tensor):
        return torch.stack(list(trees))  # type: ignore[arg-type,return-value]
    if isinstance(first, dict):
        return {name: _stacked([tree[name] for tree in trees]) for name in first}  # type: ignore[index,return-value]
    return type(first)(*(_stacked(list(parts)) for parts in zip(*trees, strict=True)))  # type: ignore[call-overload]
