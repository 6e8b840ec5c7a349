"""Director: goals and their intervals, the world model left alone, coming back from a checkpoint, what is refused."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch

from tests.graphs import stand_in_for_graphs
from tests.trees import leaves
from worldmpc import functional, losses
from worldmpc.agents import make_agent
from worldmpc.agents.director import Director
from worldmpc.agents.tdmpc2 import TDMPC2
from worldmpc.config import ConfigError, make_config
from worldmpc.data.transitions import first_steps
from worldmpc.envs import make_envs
from worldmpc.functional import tree_where
from worldmpc.models import kernels
from worldmpc.models.goal_directed import with_goal
from worldmpc.training.evaluator import evaluate
from worldmpc.training.trainer import make_state, train
from worldmpc.types import EnvSpec

BOX, DISCRETE = EnvSpec("x", (3,), 2, 50), EnvSpec("x", (3,), 2, 50, discrete=True)
SMALL = {"manager.goal_interval": 4, "goal_vae.n_latents": 3, "goal_vae.n_classes": 4, "manager.batch_size": 4}


def config(**overrides):
    return make_config("debug", agent="director", **{**SMALL, **overrides})


def make(spec=BOX, **overrides) -> Director:
    return Director(config(**overrides), spec)


def start(task="toy/pointmass", num_envs=1, **overrides):
    own = config(task=task, **{"env.num_envs": num_envs, "replay.capacity": 2000, **overrides})
    envs = make_envs(task, own.env, seed=1)
    return make_state(make_agent(own, envs.spec), envs)


def equal(one, other) -> bool:
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True))


def test_without_a_goal_it_is_tdmpc2_bit_for_bit():
    """Acting, and the world model that it learns, with everything else that learns beside it."""
    director, flat = make(), TDMPC2(make_config("debug"), BOX)
    obs = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for mode in ("explore", "eval", "prior"):
        mine = director.act(director.init_carry(2), obs, mode, goal=None)
        theirs = flat.act(flat.init_carry(2), obs, mode)
        assert torch.equal(mine.action, theirs.action) and torch.equal(mine.carry.plan.mean, theirs.carry.plan.mean)
        assert "goal_code" not in mine.extras
    state = start()
    train(state, [], 80)
    director, flat = state.agent, TDMPC2(make_config("debug"), state.agent.spec)
    flat.load_state_dict(director.flat.state_dict())
    batch = state.source.next()
    for _ in range(3):
        mine, theirs = director.update(batch), flat.update(first_steps(batch, 3))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs if name != "skipped_updates")
    assert equal(director.flat.model.state_dict().values(), flat.model.state_dict().values())


def test_goals_and_worker_may_learn_from_a_part_of_the_batch():
    state = start(**{"worker.batch_size": 3, "manager.update_every": 2})
    train(state, [], 80)
    batch, one, other = state.source.next(), state.agent.learner, make(state.agent.spec, **{"worker.batch_size": 3}).learner
    other.hierarchy.load_state_dict(one.hierarchy.state_dict())
    other.load_state_dict(one.state_dict())
    other.stream.load_state_dict(one.stream.state_dict())
    other.model.load_state_dict(one.model.state_dict())
    one.update(batch)
    other.update(batch._replace(obs=torch.cat((batch.obs[:, :3], batch.obs[:, 3:] + 1), 1), reward=batch.reward + 1))
    for name, parameter in one.hierarchy.goals.named_parameters():
        assert torch.equal(parameter, other.hierarchy.goals.get_parameter(name))
    assert equal(one.hierarchy.worker.state_dict().values(), other.hierarchy.worker.state_dict().values())


def test_the_online_trainer_is_tdmpc2():
    online = make_config("debug", agent="director", trainer="online")
    one, other = make_agent(online, BOX), make_agent(make_config("debug"), BOX)
    assert type(one) is TDMPC2 and equal(one.model.state_dict().values(), other.model.state_dict().values())


@pytest.mark.parametrize("mode", ["explore", "eval", "prior"])
def test_goals_last_their_interval_in_every_environment(mode):
    agent = make()
    carry, goals, left = agent.init_carry(3), [], []
    for step in range(9):
        output = agent.act(carry, torch.randn(3, 3, generator=torch.Generator().manual_seed(step)), mode)
        carry = output.carry
        if step == 5:  # the second environment begins an episode
            carry = tree_where(torch.arange(3) == 1, agent.init_carry(3), carry)
        goals.append(output.carry.goal)
        left.append(output.carry.left.tolist())
        assert torch.equal(output.extras["goal_code"], output.carry.code) and output.extras["goal_code"].shape == (3, 3)
    assert [row[0] for row in left] == [3, 2, 1, 0, 3, 2, 1, 0, 3]
    assert [row[1] for row in left] == [3, 2, 1, 0, 3, 2, 3, 2, 1]
    changed = [[not torch.equal(before[env], after[env]) for before, after in zip(goals, goals[1:], strict=False)] for env in range(3)]
    assert not any(changed[0][index] for index in (0, 1, 2, 4, 5, 6)) and not any(changed[1][index] for index in (0, 1, 2, 4, 6, 7))
    if mode == "explore":
        assert changed[0][3] and changed[0][7] and changed[1][5]


def test_evaluation_disturbs_neither_goals_nor_streams():
    state, other = start(num_envs=2), start(num_envs=2)
    train(state, [], 80)
    train(other, [], 80)
    with make_envs("toy/pointmass", dataclasses.replace(state.agent.config.env, num_envs=3), seed=9) as envs:
        evaluate(state.agent, envs, 3)
        evaluate(state.agent, envs, 3, mode="prior")
    assert equal(state.carry[1:], other.carry[1:]) and torch.equal(state.carry.plan.mean, other.carry.plan.mean)
    train(state, [], 100)
    train(other, [], 100)
    assert equal(
        [value for _, value in leaves(state.agent.model.state_dict())], [value for _, value in leaves(other.agent.model.state_dict())]
    )


@pytest.mark.parametrize("task", ["toy/pointmass", "toy/identity-discrete", "toy/balance"])
def test_resumed_equals_uninterrupted(task):
    state, other = start(task, num_envs=2), start(task, num_envs=2)
    train(state, [], 90)
    other.load_state_dict(copy.deepcopy(state.state_dict()))
    for one in (state, other):
        train(one, [], 140)
    torch.testing.assert_close(dict(leaves(state.state_dict())), dict(leaves(other.state_dict())), rtol=0, atol=0, equal_nan=True)
    names = state.metrics.keys()
    for section, keys in {
        "goal_vae": ("total_loss", "recon_loss", "kl", "temperature", "perplexity"),
        "manager": ("actor_loss", "critic_loss", "entropy", "advantage"),
        "worker": ("consistency_loss", "reward_loss", "value_loss", "pi_loss", "goal_reward"),
    }.items():
        assert {f"{section}/{key}" for key in keys} <= names
    assert all(bool(value.isfinite()) for value in state.metrics.values())


def test_random_decisions_have_no_goal_and_later_ones_are_stored():
    state = start(**{"train.seed_decisions": 60})
    train(state, [], 100)
    batch = [state.source.next().extras["goal_code"] for _ in range(40)]
    seen = torch.cat([part.flatten(0, 1) for part in batch])
    assert seen.isnan().all(-1).any() and seen.isfinite().all(-1).any()
    known = seen[seen.isfinite().all(-1)]
    assert ((known >= 0) & (known < 4) & (known == known.round())).all()


def test_windows_reach_as_far_as_a_goal():
    state = start()
    assert state.source.replay.horizon == 4
    assert start(**{"manager.goal_interval": 2}).source.replay.horizon == 3
    train(state, [], 80)
    batch = state.source.next()
    first = first_steps(batch, 3)
    assert len(batch.reward) == 4 and len(first.reward) == 3 and len(first.obs) == 4
    assert torch.equal(first.obs, batch.obs[:4]) and torch.equal(first.action, batch.action[:3])


def test_a_goal_of_ones_own_is_followed_until_the_manager_chooses():
    agent, obs = make(), torch.zeros(2, 3)
    goal = agent.flat.model.encode(torch.randn(2, 3))
    output = agent.act(agent.init_carry(2), obs, "eval", goal=goal)
    assert torch.equal(output.carry.goal, goal) and output.carry.left.tolist() == [0, 0] and output.extras["goal_code"].isnan().all()
    with pytest.raises(ValueError, match=r"^goal: expected latents \[2, 16\], got \[2, 8\]"):
        agent.act(output.carry, obs, "eval", goal=goal[:, :8])
    again = agent.act(output.carry, obs, "eval")
    assert not torch.equal(again.carry.goal, goal) and again.carry.left.tolist() == [3, 3]


@pytest.mark.parametrize("spec", [BOX, DISCRETE])
@pytest.mark.parametrize("mode", ["goal_conditioned", "planner_bonus"])
@pytest.mark.parametrize("kind", ["straight_through", "gumbel"])
def test_every_kind_acts_and_learns(spec, mode, kind):
    task = "toy/identity-discrete" if spec.discrete else "toy/pointmass"
    state = start(task, **{"worker.mode": mode, "goal_vae.kind": kind})
    train(state, [], 70)
    assert state.updates == 70 and state.metrics["total_loss"].isfinite()
    names = ("goal_reward", "consistency_loss", "reward_loss", "value_loss", "pi_loss")
    assert all(state.metrics[f"worker/{name}"].isfinite() for name in names) and 0 < state.metrics["worker/goal_reward"] <= 1
    assert (state.metrics["worker/value_loss"] == state.metrics["value_loss"]) == (mode == "planner_bonus")


def test_a_smaller_batch_is_all_that_the_hierarchy_learns_from():
    small = start(**{"manager.batch_size": 100, "worker.batch_size": 100})
    train(small, [], 70)
    assert small.updates == 70 and small.metrics["manager/critic_loss"].isfinite()


def test_a_mode_that_is_none_and_goals_that_are_not_finite_are_refused():
    agent, obs = make(), torch.zeros(1, 3)
    with pytest.raises(ValueError, match="mode: expected explore, eval or prior, got 'nonsense'"):
        agent.act(agent.init_carry(1), obs, "nonsense")
    with pytest.raises(ValueError, match="goal: expected finite latents"):
        agent.act(agent.init_carry(1), obs, "eval", goal=torch.full((1, 16), torch.nan))


def test_a_manager_whose_critics_fail_does_not_move():
    learner = start().agent.learner
    before = {name: value.clone() for name, value in learner.hierarchy.manager.state_dict().items()}
    real = learner._losses["critics"]
    learner._losses["critics"] = lambda *parts: ((found := real(*parts))[0] * torch.inf, *found[1:])
    noise = learner.stream.draw(losses.imagination_noise(learner.config.manager, learner.hierarchy, 2, 4))
    learner.manage(torch.randn(4, 2), noise)
    assert learner.skipped > 0 and equal(before.values(), learner.hierarchy.manager.state_dict().values())


@pytest.mark.parametrize("planner", ["cem", "icem", "random_shooting", "policy_guided", "diffusion", "mcts"])
def test_every_planner_follows_goals(planner):
    spec = DISCRETE if planner == "mcts" else BOX
    agent = make(spec, **{"planner.name": planner})
    model, obs = agent.flat.model, torch.zeros(1, 3)
    output = agent.act(agent.init_carry(2), torch.randn(2, 3), "eval")
    assert output.action.shape == (2, 2) and output.action.isfinite().all()
    z = model.encode(obs)
    others = torch.eye(2) if planner == "mcts" else torch.rand(200, 2, generator=torch.Generator().manual_seed(2)) * 2 - 1
    beaten = []
    for action in others[:10]:
        goal = model.next(z, action[None])
        chosen = agent.act(agent.init_carry(1), obs, "eval", goal=goal).action
        reached, of_others = (agent.hierarchy.similarity(model.next(z.expand(len(one), -1), one), goal) for one in (chosen, others))
        beaten.append((reached >= of_others - 1e-6).float().mean())
    assert sum(beaten) / len(beaten) > 0.8


@pytest.mark.parametrize("mode", ["goal_conditioned", "planner_bonus"])
def test_policies_alone_act_alike_in_every_environment(mode):
    agent = make(**{"worker.mode": mode})
    obs = torch.randn(4, 3)
    output = agent.act(agent.init_carry(4), obs, "prior")
    z = agent.flat.model.encode(obs)
    worker, zeros = agent.hierarchy.worker, torch.zeros(4, 2)
    expected = agent.flat.model.propose(z, zeros) if worker is None else worker.propose(with_goal(z, output.carry.goal), zeros)
    assert torch.equal(output.action, expected)


def test_plans_follow_the_goal():
    """In a world that moves by the action the first step leads towards a goal of one's own, whatever the task has to say."""
    agent = make(**{"planner.num_samples": 64, "planner.num_elites": 8, "planner.iterations": 4})
    model, obs = agent.flat.model, torch.zeros(1, 3)
    z = model.encode(obs)
    with torch.no_grad():
        model.q.layers[-1].weight.normal_(std=3.0, generator=torch.Generator().manual_seed(1))
    actions = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])
    others = torch.rand(200, 2, generator=torch.Generator().manual_seed(2)) * 2 - 1
    for action in actions:
        goal = model.next(z, action[None])
        chosen = agent.act(agent.init_carry(1), obs, "eval", goal=goal).action
        reached, of_others = (agent.hierarchy.similarity(model.next(z.expand(len(one), -1), one), goal) for one in (chosen, others))
        assert (reached > of_others).float().mean() > 0.8


@pytest.mark.parametrize(("goal", "error"), [("mine", TypeError), ([0.0], TypeError), (torch.zeros(1, 3), ValueError)])
def test_a_goal_of_another_kind_is_refused(goal, error):
    agent = make()
    with pytest.raises(error, match="^goal: expected"):
        agent.act(agent.init_carry(1), torch.zeros(1, 3), "eval", goal=goal)
    double = torch.full((1, 16), 0.125, dtype=torch.float64)
    assert agent.act(agent.init_carry(1), torch.zeros(1, 3), "eval", goal=double).action.dtype == torch.float32


def test_weights_that_are_fixed_are_those_of_the_configuration_after_loading():
    saved = make(**{"manager.ent_coef": 0.5, "goal_vae.beta": 0.25, "worker.task_range": 0.2}).state_dict()
    other = make(**{"manager.ent_coef": 0.2, "goal_vae.beta": 0.3, "worker.task_range": 0.5})
    other.load_state_dict(saved)
    assert other.hierarchy.manager.ent_coef.item() == pytest.approx(0.2) and other.hierarchy.goals.beta.item() == pytest.approx(0.3)
    assert other.planning.weights().goal.item() == pytest.approx(1.0)
    free = make(**{"manager.ent_coef": None})
    free.load_state_dict(saved)
    assert free.planning.weights().goal.item() == pytest.approx(0.1)  # 0.02 of 0.2
    assert free.hierarchy.manager.ent_coef.item() == pytest.approx(0.5) and free.hierarchy.goals.beta.item() == pytest.approx(0.25)


def test_goals_begin_with_the_episodes_of_every_environment(monkeypatch):
    """CartPole falls soon, and each pole at another time."""
    state = start("gym/CartPole-v1", 3, **{"train.utd": 0.05})
    act, step, seen, done = state.agent.act, state.envs.step_wait, [], []

    def watched_act(carry, obs, mode):
        output = act(carry, obs, mode)
        seen.append((len(done), carry.left.clone(), output.carry.left, output.carry.code))
        return output

    def watched_step():
        result = step()
        done.append(result.terminated | result.truncated)
        return result

    monkeypatch.setattr(state.agent, "act", watched_act)
    monkeypatch.setattr(state.envs, "step_wait", watched_step)
    train(state, [], 400)
    ended = changed = 0
    for (_, _, left, code), (time, carried, now, new) in itertools.pairwise(seen):
        fresh = done[time - 1]
        assert torch.equal(carried, torch.where(fresh, 0, left)) and torch.equal(now, torch.where(carried == 0, 4, carried) - 1)
        assert torch.equal(new[carried > 0], code[carried > 0])
        ended, changed = ended + int(fresh.sum()), changed + int((carried == 0).sum())
    assert ended > 3 and changed > ended + 10


def filled(agent, seed=0):
    """Windows of four steps, the last half of them under goals."""
    generator = torch.Generator().manual_seed(seed)
    state = make_state(agent, make_envs("toy/pointmass", agent.config.env, seed=1))
    source = state.source
    train(state, [], 60)
    source.generator = generator
    return source.next()


def steps(agent, batches, obs):
    """Updates and decisions, with what came of them."""
    metrics = [agent.update(batch) for batch in batches]
    explored = agent.act(agent.init_carry(2), obs, "explore")
    again = agent.act(explored.carry, obs, "explore")
    return metrics[-1], explored.action, again.action, explored.carry[1:], agent.act(agent.init_carry(2), obs, "eval").action


def test_compiled_equals_eager(monkeypatch):
    """Through the compiler's front end; further updates and plans must not compile again."""
    monkeypatch.setattr(functional, "COMPILE_BACKEND", "aot_eager")
    monkeypatch.setattr(kernels, "NATIVE_FROM", 1 << 60)
    spec, obs, short = make_envs("toy/pointmass").spec, torch.randn(2, 2), {"manager.goal_interval": 2, "manager.imagined_goals": 1}
    batch = filled(make(spec, **short))
    found = []
    for compiled in (True, False):
        agent = make(spec, compile=compiled, **short)
        found.append(steps(agent, [batch] * 2, obs))
        if compiled:
            with torch.compiler.set_stance("fail_on_recompile"):
                steps(agent, [batch] * 4, obs)
            parts = agent.flat.compile_seconds, agent.learner.compile_seconds
            assert min(parts) > 0 and agent.compile_seconds > sum(parts)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_captured_equals_eager(monkeypatch):
    stand_in_for_graphs(monkeypatch)
    spec, obs = make_envs("toy/pointmass").spec, torch.randn(2, 2)
    batches = [filled(make(spec), seed) for seed in range(2)] * 9
    plain, captured = make(spec), make(spec, cuda_graph=True)
    for _ in range(2):
        torch.testing.assert_close(*(steps(agent, batches, obs) for agent in (plain, captured)), rtol=0, atol=0)
    assert equal(plain.model.state_dict().values(), captured.model.state_dict().values())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"manager.goal_interval": 0}, "manager.goal_interval: expected at least 1, got 0"),
        ({"manager.goal_interval": 51}, "manager.goal_interval: expected at most the episode's 50 decisions, got 51"),
        ({"env.episode_length": 3}, "manager.goal_interval: expected at most the episode's 3 decisions, got 4"),
        ({"worker.mode": "follower"}, "worker.mode: expected one of goal_conditioned, planner_bonus, got 'follower'"),
        ({"goal_vae.n_classes": 1}, "goal_vae.n_classes: expected at least 2, got 1; a code of one class says nothing"),
        ({"goal_vae.n_latents": 0}, "goal_vae.n_latents: expected at least 1, got 0"),
        ({"goal_vae.n_latents": 17}, "goal_vae.n_latents: expected at most the latent's 16 dimensions, got 17"),
        ({"worker.goals": [float("nan"), 0.5, 0.5]}, "worker.goals: expected three shares that sum to 1"),
        ({"worker.goal_weight": 0.0, "worker.task_weight": 0.0}, "worker.goal_weight: plans towards nothing"),
        ({"goal_vae.n_classes": 2000}, "goal_vae.n_classes: 3 codes of 2000 classes have more than 4096 entries"),
        ({"replay.windows": "inside"}, "replay.windows: whole windows of manager.goal_interval=4 steps.*use replay.windows=padded"),
        ({"goal_vae.tau_start": 0.5}, "goal_vae.tau_start: goal_vae.kind=straight_through never reads it.*use goal_vae.kind=gumbel"),
        ({"goal_vae.kl_target": 0.5, "goal_vae.beta": 0.5}, "goal_vae.kl_target: goal_vae.beta=0.5 never reads it.*use goal_vae.beta=null"),
        ({"manager.ent_target": 0.4, "manager.ent_coef": 0.01}, "manager.ent_target: manager.ent_coef=0.01 never reads it"),
        ({"worker.gamma": 0.9, "worker.mode": "planner_bonus"}, "worker.gamma: worker.mode=planner_bonus never reads it"),
        ({"trainer": "online"}, "manager.goal_interval: trainer=online never reads it; leave it out, or use trainer=director"),
        ({"worker.goals": [0.5, 0.5]}, "worker.goals: expected three shares that sum to 1"),
        ({"worker.goals": [0.5, 0.5, 0.5]}, "worker.goals: expected three shares that sum to 1"),
        ({"policy.objective": "kl_to_planner", "model.policy": "clipped"}, "policy.objective: plans of agent=director follow goals"),
        ({"seeds": [1, 2]}, "seeds: agent=director trains one run per seed"),
        ({"planner": {"name": "diffusion", "prior": "learned"}}, "planner.prior: a learned prior knows no goals"),
        ({"agent": "dqn"}, "manager.goal_interval: agent=dqn never reads it; leave it out, or use agent=director"),
        ({"agent": "tdmpc2"}, "manager.goal_interval: agent=tdmpc2 never reads it; leave it out, or use agent=director"),
    ],
)
def test_bad_input_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        Director(make_config("debug", **{"agent": "director", **SMALL, **overrides}), BOX)
