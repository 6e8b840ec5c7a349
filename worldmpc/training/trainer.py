"""The training loop: collect, store, update, report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from worldmpc.envs import EnvError
from worldmpc.functional import tree_fill, tree_tensors, tree_where
from worldmpc.models.heads import one_hot_argmax
from worldmpc.noise import NoiseSpec, NoiseStream
from worldmpc.opponents.match import Envs, Match
from worldmpc.training.episodes import Episode, EpisodeTally
from worldmpc.training.two_player import attach_references, transform_windows
from worldmpc.types import ActOutput, Agent, DataSource, EnvStep, Metrics, Transition


class DivergenceError(RuntimeError):
    """A loss term is not finite or has exploded; the update it came from was not applied."""


@dataclass
class TrainState:
    """All that a run consists of; what it holds is saved and restored together."""

    agent: Agent
    envs: Envs
    source: DataSource
    random: NoiseStream
    sampling: NoiseStream
    carry: Any
    tally: EpisodeTally
    decisions: int = 0
    advanced: int = 0
    """Decisions that the last step took: one per environment, fewer where some only began an episode."""
    episodes: int = 0
    settled: bool = True
    """False between collecting a step and the end of its updates and hooks."""
    stop: bool = False
    """Set from outside to end the loop at the next clean point."""
    metrics: Metrics = field(default_factory=dict)
    """Of the last update."""
    act_metrics: Metrics = field(default_factory=dict)
    """What the agent said about its last decision."""
    finished: list[Episode] = field(default_factory=list)
    """Episodes that ended and that no hook has reported."""
    reported: int = 0
    """How many of them a hook of this step has reported: they are dropped once all hooks of the step are done."""
    begun: int = 0
    """The environments' count of resets, as far as this state knows of them."""

    @property
    def env_steps(self) -> int:
        """Simulator steps so far."""
        return self.decisions * self.envs.spec.action_repeat

    @property
    def updates(self) -> int:
        """Updates so far."""
        return self.source.updates

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs to continue bit for bit."""
        return {
            "agent": self.agent.state_dict(),
            "replay": self.source.data_state(),
            "loop": {
                "source": self.source.state_dict(),
                "envs": self.envs.state_dict(),
                "random": self.random.state_dict(),
                "sampling": self.sampling.state_dict(),
                "carry": tree_tensors(self.carry),
                "decisions": self.decisions,
                "advanced": self.advanced,
                "episodes": self.episodes,
                "settled": self.settled,
                **self.tally.state_dict(),
                "metrics": dict(self.metrics),
                "act_metrics": dict(self.act_metrics),
                "finished": torch.tensor(self.finished, dtype=torch.float64).view(-1, len(Episode._fields)),
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; a state without a replay continues with an empty one."""
        loop = state["loop"]
        self.agent.load_state_dict(state["agent"])
        self.source.load_state_dict(loop["source"])
        self.source.load_data(state.get("replay"))
        self.random.load_state_dict(loop["random"])
        self.sampling.load_state_dict(loop["sampling"])
        self.carry = tree_fill(self.carry, [tensor.to(self.agent.device) for tensor in loop["carry"]])
        self.decisions, self.episodes, self.settled = int(loop["decisions"]), int(loop["episodes"]), bool(loop["settled"])
        self.advanced = int(loop.get("advanced", self.envs.num_envs))  # not in states of older versions
        self.tally.load_state_dict(loop)
        self.metrics, self.act_metrics = dict(loop["metrics"]), dict(loop["act_metrics"])
        self.finished = [Episode(ret, int(length), *success) for ret, length, *success in loop["finished"].tolist()]
        envs, saved = self.envs, loop["envs"]
        if not (envs.load_state_dict(saved, self.agent) if isinstance(envs, Match) else envs.load_state_dict(saved)):
            self.carry = self.agent.init_carry(self.envs.num_envs)
            self.tally.reset()
            self.source.cut()
        self.begun = self.envs.begun


Hook = Callable[[TrainState, Metrics], None]
"""Called after the updates of every step; it decides itself whether it is due."""


class Every:
    """Tells when a counter has crossed a multiple of an interval since the last call of the loop."""

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def due(self, now: int, step: int) -> bool:
        """Return whether the last ``step`` counts up to ``now`` crossed a multiple of the interval."""
        return now // self.interval > (now - step) // self.interval


def make_state(agent: Agent, envs: Envs) -> TrainState:
    """Put an agent, its environments, a fresh data source and the random streams of ``agent.config.seed`` together.

    Args:
        agent: learns.
        envs: separate from those of the evaluation.

    Raises:
        ConfigError: an opponent to learn from that is unknown or does not fit, or windows that cannot be made as configured.
        CheckpointError: such an opponent's checkpoint cannot be read.
    """
    seed = agent.config.seed
    attach_references(agent, envs.num_envs, envs.pool.players if isinstance(envs, Match) else ())
    sampling = NoiseStream(seed, "replay")
    source = agent.make_source(envs.num_envs, sampling.generator)
    transform_windows(source, envs, agent.config, sampling.generator)
    random, carry, tally = NoiseStream(seed, "random"), agent.init_carry(envs.num_envs), EpisodeTally(envs.num_envs)
    return TrainState(agent, envs, source, random, sampling, carry, tally, begun=envs.begun)


class Team(Protocol):
    """Who acts and learns for one or several seeds: :class:`Solo`, or a :class:`worldmpc.agents.stack.Stack`."""

    def act(self, carries: Sequence[Any], obs: Sequence[Tensor]) -> list[ActOutput]:
        """Explore: one answer per seed."""
        ...

    def update(self, batches: Sequence[Any]) -> list[Metrics]:
        """Do one update of every seed."""
        ...


class Solo:
    """A team of one."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent

    def act(self, carries: Sequence[Any], obs: Sequence[Tensor]) -> list[ActOutput]:
        """Explore."""
        return [self.agent.act(carries[0], obs[0], "explore")]

    def update(self, batches: Sequence[Any]) -> list[Metrics]:
        """Do one update."""
        return [self.agent.update(batches[0])]


def train(state: TrainState, hooks: Sequence[Hook], total_decisions: int) -> None:
    """Train until ``total_decisions``, or until ``state.stop`` is set; then the state can be saved and continued.

    Raises:
        DivergenceError: a loss is not finite or too large; the state is as it was before that update.
        EnvError: an environment failed.
    """
    train_together(Solo(state.agent), [state], [hooks], total_decisions)


def train_together(team: Team, states: Sequence[TrainState], hooks: Sequence[Sequence[Hook]], total_decisions: int) -> None:
    """Train several seeds in step, each with hooks of its own, until ``total_decisions``, or until one of them is to stop.

    Raises:
        DivergenceError: see :func:`train`; the message names the seed where there are several.
        EnvError: an environment failed.
    """
    overlap = states[0].agent.config.train.overlap
    for state in states:
        if state.decisions == 0:
            _show_learner(state)
            state.envs.reset()
            state.begun = state.envs.begun
    while True:
        if not all(state.settled for state in states):
            if not overlap and not learn_together(team, states):
                return
            _run_hooks(states, hooks)
        if any(state.stop for state in states) or states[0].decisions >= total_decisions:
            if overlap and states[0].decisions >= total_decisions:
                learn_together(team, states, until_done=True)  # what was due with the last steps
            return
        collect_together(team, states, overlap)


def collect(state: TrainState) -> None:
    """Take one decision in every environment, at random during the seed phase, and hand it to the data source."""
    collect_together(Solo(state.agent), [state])


def learn(state: TrainState) -> bool:
    """Do all updates that are due, leaving the last one's metrics in ``state.metrics``; False where ``state.stop`` interrupted.

    Raises:
        DivergenceError: see :func:`check_losses`.
        ConfigError: nothing can be trained on long after the seed phase.
    """
    return learn_together(Solo(state.agent), [state])


def _run_hooks(states: Sequence[TrainState], hooks: Sequence[Sequence[Hook]]) -> None:
    for state in states:
        state.settled = True
    try:
        for state, own in zip(states, hooks, strict=True):
            for hook in own:
                hook(state, state.metrics)
            if state.settled:  # or a hook was stopped, and all of this step's are done again
                del state.finished[: state.reported]
            state.reported = 0
    except BaseException:
        for state in states:
            state.settled = False  # whoever resumes does the hooks of this step again
        raise


def collect_together(team: Team, states: Sequence[TrainState], overlap: bool = False) -> None:
    """Take one decision everywhere; with ``overlap`` the updates that are due are done while the environments step."""
    observed = [state.envs.obs for state in states]
    for state in states:
        _show_learner(state)
        if state.begun != state.envs.begun:
            _begin_anew(state)
    if states[0].decisions < states[0].source.seed_decisions:
        outputs = [ActOutput(_random_action(state), state.carry, {}, {}) for state in states]
    else:
        outputs = team.act([state.carry for state in states], observed)
    errors: list[EnvError] = []
    under_way: list[tuple[TrainState, Tensor, ActOutput]] = []
    for state, obs, output in zip(states, observed, outputs, strict=True):
        with _collected(errors, state, states):
            state.envs.step_async(output.action)
            under_way.append((state, obs, output))
    try:
        if overlap and not errors:
            learn_together(team, states, until_done=True)
    finally:
        # Also after an error: what the environments have done belongs to the state that is saved then, and one seed that fails must not
        # cost the others their step.
        for state, obs, output in under_way:
            with _collected(errors, state, states):
                _observe(state, obs, output, state.envs.step_wait())
        if errors:
            raise errors[0]


def _show_learner(state: TrainState) -> None:
    """Let opponents that are snapshots of the learner be taken where they are due."""
    if isinstance(state.envs, Match):
        state.envs.follow(state.agent, state.decisions)


@contextmanager
def _collected(errors: list[EnvError], state: TrainState, states: Sequence[TrainState]) -> Iterator[None]:
    """Keep an error of an environment for later, with the name of its seed where there are several."""
    try:
        yield
    except EnvError as error:
        errors.append(error if len(states) == 1 else EnvError(f"seed {state.agent.config.seed}: {error}"))


def _begin_anew(state: TrainState) -> None:
    """Somebody else has reset the environments, such as an evaluation on them: no transition may lead from one episode into the other."""
    state.source.cut()
    state.tally.reset()
    state.carry, state.begun = state.agent.init_carry(state.envs.num_envs), state.envs.begun


def _random_action(state: TrainState) -> Tensor:
    spec = state.envs.spec
    uniform = state.random.draw({"action": NoiseSpec("uniform", (state.envs.num_envs, spec.action_dim))})["action"]
    return one_hot_argmax(uniform) if spec.discrete else uniform * 2 - 1


def _observe(state: TrainState, obs: Tensor, output: ActOutput, step: EnvStep) -> None:
    """Store what followed a decision, and begin afresh where an episode ended."""
    state.source.observe(
        Transition(
            obs, output.action, step.reward, step.terminated, step.truncated, step.next_obs, step.valid, {**output.extras, **step.extras}
        )
    )
    state.act_metrics, state.settled = output.metrics, False
    output = _watched(state, obs, output, step)
    fresh = step.terminated | step.truncated | ~step.valid
    state.carry = output.carry
    if fresh.any():
        state.carry = tree_where(fresh, state.agent.init_carry(state.envs.num_envs), output.carry)
    state.decisions, state.advanced = state.source.decisions, state.source.decisions - state.decisions
    finished = state.tally.note(step)
    state.finished.extend(finished.values())
    state.episodes += len(finished)


def _watched(state: TrainState, obs: Tensor, output: ActOutput, step: EnvStep) -> ActOutput:
    """Let an agent that imagines opponents see what they did."""
    agent: Any = state.agent
    if not isinstance(state.envs, Match) or getattr(agent, "simulation", None) is None:
        return output
    fresh = step.terminated | step.truncated
    return output._replace(carry=agent.watch_game(output.carry, obs, step.extras, names=state.envs.played, fresh=fresh))


def learn_together(team: Team, states: Sequence[TrainState], until_done: bool = False) -> bool:
    """Do the updates that are due for all seeds; False where one of them is to stop, unless ``until_done``."""
    for _ in range(min(state.source.ready() for state in states)):
        if any(state.stop for state in states) and not until_done:
            return False
        found = team.update([state.source.next() for state in states])
        for state, metrics in zip(states, found, strict=True):
            state.metrics = metrics
        if states[0].agent.device.type == "cpu":  # reading a loss costs nothing here; on a GPU the log hook does it
            for state in states:
                check_losses(
                    state.metrics, state.agent.config.train.max_loss, "" if len(states) == 1 else f"seed {state.agent.config.seed}: "
                )
    return True


def check_losses(metrics: Mapping[str, Tensor], max_loss: float, who: str = "") -> None:
    """Check the losses of an update; ``who`` begins the message.

    Raises:
        DivergenceError: naming the first term that is not finite, or larger than ``max_loss``.
    """
    for name in ("total_loss", "pi_loss", *(name for name in metrics if "/" in name and name.endswith("_loss"))):
        if name in metrics and not abs(float(metrics[name])) < max_loss:
            terms = {
                term: float(value)
                for term, value in metrics.items()
                if term.endswith("_loss") and term != "total_loss" or term.startswith("custom/")
            }
            bad = next((term for term, value in terms.items() if not math.isfinite(value)), max(terms, key=lambda term: abs(terms[term])))
            rate = {"manager": "manager.lr", "goal_vae": "goal_vae.lr"}.get(bad.partition("/")[0], "optim.lr")
            raise DivergenceError(
                f"{who}{bad} is {terms[bad]:g} (limit train.max_loss={max_loss:g}); its update was not applied. "
                f"Look at the scale of rewards and observations, or go on with resume=<run folder> and a lower {rate}"
            )
    if float(metrics.get("skipped_updates", 0)) > 0:
        raise DivergenceError(f"{who}a loss or gradient was not finite, or above train.max_loss, in some update; it was not applied")
