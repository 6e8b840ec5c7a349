"""A learned prior over action sequences beside the agents: trained, used, saved, and without effect on anything else."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import worldmpc
from tests.trees import leaves
from worldmpc.agents import make_agent
from worldmpc.config import ConfigError, make_config
from worldmpc.envs import make_envs
from worldmpc.training.restore import load_agent
from worldmpc.training.trainer import make_state, train
from worldmpc.types import EnvSpec

DIFFUSION = {"planner.name": "diffusion", "planner.prior": "learned", "planner.num_samples": 16}


def trained(agent, task, steps=160, **overrides):
    fits = {"mbmpc.fit_every": 60} if agent == "mbmpc" else {}
    config = make_config("debug", agent=agent, task=task, steps=steps, **{"train.seed_decisions": 60, **fits, **overrides})
    envs = make_envs(task, config.env, seed=1)
    state = make_state(make_agent(config, envs.spec), envs)
    train(state, [], steps)
    return state


@pytest.mark.parametrize("task", ["toy/pointmass", "toy/identity-discrete"])
@pytest.mark.parametrize("agent", ["tdmpc2", "mbmpc"])
def test_trained_and_resumed(agent, task):
    state = trained(agent, task, **DIFFUSION)
    assert state.metrics["trajectory_loss"].isfinite() and state.agent.prior.updates > 0
    other = make_state(make_agent(state.agent.config, state.envs.spec), make_envs(task, state.agent.config.env, seed=1))
    other.load_state_dict(state.state_dict())
    for one in (state, other):
        train(one, [], 230)
    one, two = dict(leaves(state.state_dict())), dict(leaves(other.state_dict()))
    torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


def test_learns_what_was_done():
    """From sequences that always go right where the state says so, and left otherwise, the prior's samples do the same."""
    config = make_config("debug", task="toy/pointmass", **DIFFUSION)
    with make_envs("toy/pointmass") as envs:
        prior = make_agent(config, envs.spec).prior
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(400):
        z = torch.rand(32, 16, generator=generator) - 0.5
        actions = 0.8 * z[:, :2].sign().expand(config.planner.horizon, 32, 2)
        losses.append(float(prior.update(z, actions, torch.ones(config.planner.horizon, 32))["trajectory_loss"]))
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


def test_sequences_that_an_episode_end_cut_do_not_count():
    config = make_config("debug", task="toy/pointmass", **DIFFUSION)
    with make_envs("toy/pointmass") as envs:
        one, other = (make_agent(config, envs.spec).prior for _ in range(2))
    z, actions, mask = torch.randn(8, 16), torch.rand(3, 8, 2), torch.ones(3, 8)
    mask[2, 4:] = 0.0
    changed = torch.where(mask[..., None] > 0, actions, 5.0)
    assert torch.equal(one.update(z, actions, mask)["trajectory_loss"], other.update(z, changed, mask)["trajectory_loss"])


def test_without_a_prior_everything_else_is_the_same():
    """Random decisions alone, so that both see the same data: parameters after updates are bit-equal."""
    overrides = {"train.seed_decisions": 100, "planner.name": "diffusion", "planner.num_samples": 16}
    plain, extra = (
        trained("tdmpc2", "toy/pointmass", 100, **overrides, **{"planner.prior": prior, "train.utd": 0.2}) for prior in ("none", "learned")
    )
    ours = extra.agent.model.state_dict()
    assert plain.updates == extra.updates > 0
    assert all(torch.equal(value, ours[name]) for name, value in plain.agent.model.state_dict().items())


@pytest.mark.parametrize(("key", "value"), [("seeds", [1, 2]), ("compile", True), ("cuda_graph", True)])
def test_what_it_cannot_be_combined_with(key, value):
    with pytest.raises(ConfigError, match=f"^{key}: a learned prior .* planner.prior=none"):
        make_config("debug", **DIFFUSION, **{key: value})


def test_other_planners_have_no_place_for_it():
    with pytest.raises(ConfigError, match="planner=cem has no place for a learned prior; use planner=diffusion"):
        make_config("debug", planner="cem", **{"planner.prior": "learned"})
    with pytest.raises(ConfigError, match="agent=mpc learns nothing"):
        make_config("debug", agent="mpc", planner="diffusion", **{"planner.prior": "learned"})


def test_a_plan_needs_the_prior_in_the_model():
    config = make_config("debug", task="toy/pointmass", **DIFFUSION)
    with make_envs("toy/pointmass", dataclasses.replace(config.env, num_envs=2)) as envs:
        agent = make_agent(config, envs.spec)
        agent.model.trajectory = None
        with pytest.raises(ConfigError, match="planner.prior"):
            agent.act(agent.init_carry(2), envs.reset(), "eval")


@pytest.mark.parametrize("agent", ["tdmpc2", "mbmpc"])
def test_what_was_trained_with_a_prior_can_plan_without(agent, tmp_path):
    state = trained(agent, "toy/pointmass", **DIFFUSION)
    worldmpc.save(state.agent, tmp_path / "agent")
    other, config = load_agent(tmp_path / "agent", overrides={"planner": {"name": "cem", "prior": "none"}})
    assert other.prior is None and config.planner.name == "cem"
    assert len(worldmpc.evaluate(other, episodes=1).returns) == 1
    again, _ = load_agent(tmp_path / "agent", overrides={"planner": {"iterations": 1}})
    ours, theirs = state.agent.prior.model, again.prior.model
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items()) and ours.steps == theirs.steps


@pytest.mark.parametrize(("iterations", "dims", "message"), [(11, 2, r"planner.iterations \(11\)"), (9, 20, r".*extra_iterations \(11\)")])
def test_plans_have_no_more_iterations_than_the_prior_has_steps(iterations, dims, message):
    """As many are fine; what large action spaces add counts there alone."""
    config = make_config("debug", **{**DIFFUSION, "planner.iterations": iterations})
    with pytest.raises(ConfigError, match=f"planner.prior_steps: expected at least {message}, got 10"):
        make_agent(config, EnvSpec("x", (3,), dims, 50))
    make_agent(make_config("debug", **{**DIFFUSION, "planner.iterations": 10}), EnvSpec("x", (3,), 2, 50))


@pytest.mark.parametrize("agent", ["tdmpc2", "mbmpc"])
def test_a_run_without_a_prior_says_so(agent, tmp_path):
    envs = worldmpc.make_envs("toy/pointmass")
    worldmpc.save(worldmpc.make_agent(envs, "debug", agent=agent), tmp_path / "agent")
    with pytest.raises(ConfigError, match="^planner.prior: .*agent holds no learned prior; use planner.prior=none"):
        load_agent(tmp_path / "agent", overrides={"planner": {"name": "diffusion", "prior": "learned"}})
