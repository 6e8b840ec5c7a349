"""Imagined opponents: buffers, cloning, beliefs, plans against them, and what the world model learns of real actions."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from tests.opponents.people import Counting
from worldmpc.agents import make_agent
from worldmpc.config import ConfigError, make_config
from worldmpc.models.cloning import Clone
from worldmpc.models.world_model import WorldModel
from worldmpc.opponents.simulation import ANYONE, Against, CloningBuffer, Demonstrations, OpponentSimulation, combine
from worldmpc.planners import rollout_return
from worldmpc.types import EnvSpec, GameCarry, Seat, SequenceBatch

SPEC = EnvSpec("toy/game", (5,), 2, 50, other=Seat((5,), 3))


def config(**changes):
    over = {"enabled": True, "opponent_agents": ["weak", "strong"], **changes}
    return make_config("debug", task="hockey", opponent_simulation=over)


def agent_of(**changes):
    return make_agent(config(**changes), SPEC)


def quick(made):
    """Let a configuration learn in few updates."""
    return dataclasses.replace(made, optim=dataclasses.replace(made.optim, lr=3e-3))


def batch_of(length=3, rows=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.rand(*shape, generator=generator) * 2 - 1  # noqa: E731
    other = draw(length, rows, 3)
    return SequenceBatch(
        obs=draw(length + 1, rows, 5),
        action=draw(length, rows, 2),
        reward=other[..., 0],  # what the other player does decides
        terminated=torch.zeros(length, rows),
        truncated=torch.zeros(length, rows),
        mask=torch.ones(length, rows),
        index=torch.zeros(length, rows, dtype=torch.int64),
        extras={"other_action": other, "other_obs": draw(length, rows, 5)},
    )


def test_a_buffer_keeps_the_newest_steps():
    buffer = CloningBuffer(5, 2, 1, torch.device("cpu"))
    for number in range(8):
        buffer.add(torch.full((1, 2), float(number)), torch.full((1, 1), -float(number)))
    obs, action = buffer.draw(torch.rand(200))
    assert len(buffer) == 5 and set(obs[:, 0].tolist()) == {3.0, 4.0, 5.0, 6.0, 7.0} and torch.equal(obs[:, :1], -action)
    buffer.add(torch.arange(14.0).view(7, 2), torch.zeros(7, 1))  # more than it holds at once
    assert set(buffer.draw(torch.rand(200))[0][:, 0].tolist()) == {4.0, 6.0, 8.0, 10.0, 12.0}


@pytest.mark.parametrize("capacity", [5, 3, 9])
def test_a_buffer_is_restored_also_into_another_size(capacity):
    buffer = CloningBuffer(5, 2, 1, torch.device("cpu"))
    buffer.add(torch.arange(14.0).view(7, 2), torch.zeros(7, 1))
    other = CloningBuffer(capacity, 2, 1, torch.device("cpu"))
    other.load_state_dict(buffer.state_dict())
    newest = [4.0, 6.0, 8.0, 10.0, 12.0][-min(capacity, 5) :]
    assert sorted(set(other.draw(torch.rand(300))[0][:, 0].tolist())) == newest
    other.add(torch.full((1, 2), 99.0), torch.zeros(1, 1))
    expected = [*newest, 99.0][-capacity:]
    assert sorted(set(other.draw(torch.rand(300))[0][:, 0].tolist())) == expected


def test_returns_are_combined_as_asked():
    values = torch.tensor([[3.0, 0.0], [1.0, 5.0], [2.0, 2.0]])
    weight = torch.tensor([[0.5, 0.2], [0.25, 0.5], [0.25, 0.3]])
    assert combine(values, weight, "mean", 1.0).tolist() == pytest.approx([2.25, 3.1])
    assert combine(values, weight, "worst", 1.0).tolist() == [1.0, 0.0]
    assert combine(values, weight, "cvar", 0.5).tolist() == pytest.approx([(0.25 * 1 + 0.25 * 2) / 0.5, (0.2 * 0 + 0.3 * 2) / 0.5])
    assert torch.allclose(combine(values, weight, "cvar", 1.0), combine(values, weight, "mean", 1.0))


def test_the_worst_is_not_somebody_that_nobody_believes_in():
    values, weight = torch.tensor([[-100.0], [1.0]]), torch.tensor([[0.001], [0.999]])
    assert combine(values, weight, "worst", 1.0).tolist() == [1.0]


@pytest.mark.parametrize("samples", [1, 2])
def test_every_particle_follows_one_opponent_for_the_whole_trajectory(samples):
    agent = agent_of(samples=samples)
    simulation, horizon, envs, candidates = agent.simulation, 4, 2, 5
    noise = agent.streams["eval"].draw(simulation.noise_specs(horizon, envs))
    model = simulation.against(simulation.prior(envs), noise)
    particles = 3 * samples
    assert model.num_particles == particles
    z = agent.model.encode(torch.randn(envs, 5))[:, None].expand(particles, envs, candidates, -1)
    actions = torch.rand(horizon, particles, envs, candidates, 2) * 2 - 1
    steps = model.rollout(z, actions)
    for particle, env in itertools.product(range(particles), range(envs)):
        clone, latent = simulation.clones[particle % 3], z[particle, env]
        for step in range(horizon):
            other = clone.sample(latent, noise["opponents"][step, particle, env].expand(candidates, -1))
            joint = torch.cat((actions[step, particle, env], other), -1)
            reward = agent.model.two_hot.decode(agent.model.reward(latent, joint))
            assert torch.allclose(steps.reward[step, particle, env], reward, atol=1e-5)
            latent = agent.model.next(latent, joint)
            assert torch.allclose(steps.z[step + 1, particle, env], latent, atol=1e-5)


def test_the_score_of_a_plan_is_the_beliefs_mean_of_its_scores_against_each():
    agent = agent_of(least_belief=0.0)
    simulation, horizon, envs, candidates = agent.simulation, 3, 2, 6
    with torch.no_grad():
        agent.model.reward[-1].weight.normal_(0, 0.5)  # a new model expects no reward
    noise = agent.streams["eval"].draw(simulation.noise_specs(horizon, envs))
    belief = torch.randn(envs, 3)
    z = agent.model.encode(torch.randn(envs, 5))[:, None].expand(-1, candidates, -1)
    actions, eps = torch.rand(horizon, envs, candidates, 2) * 2 - 1, torch.randn(envs, candidates, 2)
    critics = torch.tensor([0, 1])

    def score(believed):
        return rollout_return(simulation.against(believed, noise), z, actions, 0.9, eps, critics)

    alone = [score(torch.where(torch.arange(3) == number, 0.0, -1e9).expand(envs, 3)) for number in range(3)]
    weight = torch.softmax(belief, -1)
    expected = sum(weight[:, number, None] * alone[number] for number in range(3))
    assert torch.allclose(score(belief), expected, atol=1e-4)
    assert float((alone[0] - alone[1]).abs().max()) > 1e-4


def test_whom_nobody_believes_in_is_left_out_and_changes_little():
    agent = agent_of(least_belief=0.02)
    simulation = agent.simulation
    noise = agent.streams["eval"].draw(simulation.noise_specs(3, 2))
    belief = torch.tensor([[0.9, 0.09, 0.01], [0.98, 0.01, 0.01]]).log()
    model = simulation.against(belief, noise)
    assert model.num_particles == 2 and list(model.clones) == list(simulation.clones[:2])
    assert torch.allclose(model.belief, torch.tensor([[0.9 / 0.99, 0.09 / 0.99], [0.98 / 0.99, 0.01 / 0.99]]))
    assert torch.equal(model.uniform, noise["opponents"][:, :2])
    alone = simulation.against(torch.tensor([[1.0, 1e-9, 1e-9]]).log().expand(2, -1), noise)
    assert alone.num_particles == 1
    z, actions = agent.model.encode(torch.randn(2, 5))[:, None].expand(-1, 4, -1), torch.rand(3, 2, 4, 2)
    expected = model.rollout(z.expand(2, -1, -1, -1), actions[:, None].expand(-1, 2, -1, -1, -1))
    assert torch.allclose(alone.rollout(z, actions).reward, expected.reward[:, 0], atol=1e-5)


def test_candidates_meet_the_same_opponents():
    agent = agent_of()
    noise = agent.streams["eval"].draw(agent.simulation.noise_specs(3, 1))
    model = agent.simulation.against(agent.simulation.prior(1), noise)
    z, plan = agent.model.encode(torch.randn(1, 5))[:, None].expand(-1, 4, -1), torch.rand(3, 1, 1, 2)
    values = rollout_return(model, z, plan.expand(-1, -1, 4, -1), 0.9, torch.zeros(1, 4, 2), torch.tensor([0, 1]))
    assert torch.allclose(values, values[:, :1].expand_as(values))


def test_a_single_opponent_is_imagined_without_a_dimension_for_it():
    agent = agent_of(opponent_agents=[])
    assert agent.simulation.names == (ANYONE,)
    noise = agent.streams["eval"].draw(agent.simulation.noise_specs(3, 2))
    model = agent.simulation.against(agent.simulation.prior(2), noise)
    z = agent.model.encode(torch.randn(2, 5))[:, None].expand(-1, 4, -1)
    steps = model.rollout(z, torch.rand(3, 2, 4, 2))
    assert steps.z.shape == (4, 2, 4, 16) and steps.reward.shape == (3, 2, 4)
    assert agent.act(agent.init_carry(2), torch.randn(2, 5), "explore").action.shape == (2, 2)


def sure(clone: Clone, bins: list[int]) -> None:
    """Let a clone expect these bins."""
    with torch.no_grad():
        clone.net[-1].weight.zero_()
        clone.net[-1].bias.zero_()
        for dim, chosen in enumerate(bins):
            clone.net[-1].bias[dim * clone.bins + chosen] = 3.0


def test_beliefs_follow_bayes_rule_and_forget():
    agent = agent_of(pooled=False, belief_decay=0.5)
    simulation = agent.simulation
    sure(simulation.clones[0], [0, 0, 0])
    sure(simulation.clones[1], [0, 0, 14])
    obs, action = torch.randn(2, 5), torch.tensor([[-1.0, -1.0, -1.0], [-1.0, -1.0, 1.0]])
    first = simulation.update_belief(simulation.prior(2), obs, action)
    assert torch.softmax(first, -1).argmax(-1).tolist() == [0, 1]
    ratio = first[0, 0] - first[0, 1]
    assert float(ratio) == pytest.approx(3.0, abs=1e-4)  # the logits differ in one bin, by 3
    second = simulation.update_belief(first, obs, action)
    assert float(second[0, 0] - second[0, 1]) == pytest.approx(0.5 * 3 + 3, abs=1e-4)
    assert torch.allclose(second.exp().sum(-1), torch.ones(2))


def test_one_surprise_excludes_nobody():
    agent = agent_of(pooled=False)
    for clone, bins in zip(agent.simulation.clones, ([0, 0, 0], [14, 14, 14]), strict=True):
        sure(clone, bins)
        with torch.no_grad():
            clone.net[-1].bias.mul_(10)
    belief = agent.simulation.update_belief(agent.simulation.prior(1), torch.randn(1, 5), -torch.ones(1, 3))
    assert float(belief[0, 1]) > -12.1


def test_cloning_networks_learn_from_their_own_buffers_and_move_nothing_else():
    agent = make_agent(quick(config()), SPEC)
    simulation = agent.simulation
    obs = torch.randn(500, 5)
    simulation.store("weak", obs, torch.ones(500, 3))
    simulation.store("strong", obs, -torch.ones(500, 3))
    before = {name: value.clone() for name, value in agent.model.state_dict().items() if not name.startswith("opponents.")}
    batch = batch_of()
    first = simulation.update(batch)
    for _ in range(100):
        last = simulation.update(batch)
    assert float(last["opponents/weak_nll"]) < float(first["opponents/weak_nll"]) - 2
    z = agent.model.encode(obs[:10])
    assert float(simulation.clones[0].mean(z).mean()) > 0.5 and float(simulation.clones[1].mean(z).mean()) < -0.5
    assert float(last[f"opponents/{ANYONE}_nll"]) < float(first[f"opponents/{ANYONE}_nll"])
    assert all(torch.equal(value, agent.model.state_dict()[name]) for name, value in before.items())


def test_who_was_met_is_learned_from_the_replay_padding_left_out():
    agent = agent_of(opponent_agents=[])
    batch = batch_of()
    mask = batch.mask.clone()
    mask[:, 4:] = 0
    spoiled = batch.extras["other_action"].clone()
    spoiled[:, 4:] = 1.0
    clean = batch._replace(mask=mask)
    dirty = clean._replace(extras={**batch.extras, "other_action": spoiled})
    assert torch.equal(
        agent.simulation.update(clean)["opponents/anyone_nll"],
        agent_of(opponent_agents=[]).simulation.update(dirty)["opponents/anyone_nll"],
    )


def test_reward_and_dynamics_learn_what_the_other_player_really_did():
    losses = {}
    for imagine in (False, True):
        agent = make_agent(quick(config() if imagine else make_config("debug", task="hockey")), SPEC)
        for number in range(200):
            metrics = agent.update(batch_of(rows=32, seed=number))
        losses[imagine] = float(metrics["reward_loss"])
    assert losses[True] < losses[False] - 0.3, losses


def test_the_world_model_reads_the_others_action_behind_its_own():
    agent = agent_of()
    batch = batch_of()
    assert torch.equal(agent.model.acted(batch), torch.cat((batch.action, batch.extras["other_action"]), -1))
    assert agent.model.dynamics[0].weight.shape[1] == agent.model.reward[0].weight.shape[1] == 16 + 2 + 3
    assert agent.model.critics.layers[0].weight.shape[-1] == 16 + 2  # whoever plays then, plays its own way
    alone = WorldModel(agent.config.model, 5, 2)
    assert alone.acted(batch) is batch.action


def test_watching_changes_the_belief_that_plans_use():
    agent = agent_of()
    sure(agent.simulation.clones[1], [14, 14, 14])
    carry = agent.init_carry(2)
    assert isinstance(carry, GameCarry) and torch.equal(carry.belief, torch.zeros(2, 3))
    obs = torch.randn(2, 5)
    output = agent.act(carry, obs, "eval")
    assert float(output.metrics["opponents/certainty"]) == pytest.approx(1 / 3)
    seen = agent.watch_game(output.carry, obs, {"other_action": torch.ones(2, 3)})
    assert torch.softmax(seen.belief, -1)[:, 1].min() > 0.9 and torch.equal(seen.plan.mean, output.carry.plan.mean)
    assert float(agent.act(seen, obs, "eval").metrics["opponents/certainty"]) > 0.9


def test_references_show_what_they_do_in_the_mean_over_the_steps_of_a_decision():
    agent = agent_of()
    players = {"weak": Counting(0.1, 3), "strong": Counting(-0.5, 3)}
    agent.simulation.demonstrations = Demonstrations(players, 2, seed=1)
    obs, views, carry = torch.randn(2, 5), torch.randn(2, 3, 5), agent.init_carry(2)
    extras = {"other_action": torch.full((2, 3), 0.7), "other_views": views, "steps": torch.tensor([3.0, 2.0])}
    agent.watch_game(carry, obs, extras, names=["strong", "weak"], fresh=torch.tensor([False, True]))
    assert torch.equal(torch.stack([view for _, view in players["weak"].asked], 1), views)
    kept = {name: buffer.state_dict()["rows"] for name, buffer in agent.simulation.buffers.items()}
    assert kept["weak"][:, 5].tolist() == pytest.approx([0.11, 0.7]) and kept["strong"][:, 5].tolist() == pytest.approx([0.7, -0.495])
    assert all(torch.equal(rows[:, :5], obs) for rows in kept.values())
    agent.watch_game(carry, obs, extras, names=["strong", "weak"], fresh=torch.tensor([False, False]))
    assert [steps for steps, _ in players["strong"].asked[3:]] == [[3, 0], [4, 1], [5, 2]]


def test_methods_by_name_and_number():
    agent = agent_of()
    agent.store_opponent_action(torch.zeros(5), torch.zeros(3), "strong")
    agent.store_opponent_action(torch.zeros(4, 5), torch.zeros(4, 3), 0)
    assert [len(agent.simulation.buffers[name]) for name in ("weak", "strong")] == [4, 1]
    with pytest.raises(ValueError, match="anyone"):
        agent.store_opponent_action(torch.zeros(5), torch.zeros(3), ANYONE)
    with pytest.raises(ValueError, match="no opponent 'nobody'; there are weak, strong, anyone"):
        agent.set_current_opponent("nobody")
    sure(agent.simulation.clones[0], [0, 0, 0])
    sure(agent.simulation.clones[1], [14, 14, 14])
    z, actions = agent.model.encode(torch.randn(4, 5)), torch.zeros(4, 2, 2)
    agent.set_current_opponent("weak")
    weak = agent.rollout_dynamics_multi_step(z, actions, 2)
    assert sorted(weak) == [1, 2]
    agent.set_current_opponent(1)
    strong = agent.rollout_dynamics_multi_step(z, actions, 2)
    assert not torch.allclose(weak[1], strong[1])
    assert torch.equal(agent.rollout_dynamics_multi_step(z, actions, 2, opponent_id="weak")[2], weak[2])
    agent.set_current_opponent(None)
    assert agent.simulation.forced is None


def test_nobody_is_imagined_where_nobody_else_plays():
    with pytest.raises(ConfigError, match="nobody else plays in toy/game"):
        make_agent(config(), dataclasses.replace(SPEC, other=None))
    with pytest.raises(RuntimeError, match="opponent_simulation.enabled=true"):
        make_agent(make_config("debug", task="hockey"), SPEC).set_current_opponent("weak")


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"opponent_simulation": {"enabled": True, "opponent_agents": ["weak", "weak"]}}, "different references"),
        ({"opponent_simulation": {"enabled": True, "pooled": False}}, "nobody is left to imagine"),
        ({"opponent_simulation": {"opponent_agents": ["weak"]}}, "add opponent_simulation.enabled=true"),
        ({"opponent_simulation": {"enabled": True}, "compile": True}, "compile: cannot be had with imagined opponents"),
        ({"opponent_simulation": {"enabled": True}, "agent": "bmpc"}, "cannot be had with imagined opponents"),
        ({"opponent_simulation": {"enabled": True, "aggregate": "cvar", "cvar_share": 0.0}}, "opponent_simulation.cvar_share: expected in"),
        ({"opponent_simulation": {"enabled": True, "opponent_agents": [{"type": "SAC", "file": "x"}]}}, "expected type and path"),
        ({"opponent_simulation": {"enabled": True}, "planner": "mcts"}, "mcts weighs all imagined opponents alike"),
        ({"opponent_simulation": {"enabled": True}, "agent": "sac"}, "agent=sac never reads it"),
        ({"opponent_simulation": {"enabled": True, "cvar_share": 0.2}}, "cvar_share: opponent_simulation.aggregate=mean never reads it"),
        ({"opponent_simulation": {"enabled": True}, "planner.mpc": False}, "planner.mpc=false never plans against anybody"),
    ],
)
def test_what_cannot_be_is_refused(over, message):
    with pytest.raises(ConfigError, match=message):
        make_config("debug", task="hockey", **over)


def test_references_are_named_as_in_the_original():
    made = config(opponent_agents=[{"type": "TDMPC2", "path": "a/b"}, {"type": "weak"}])
    assert made.opponent_simulation.opponent_agents == ("TDMPC2:a/b", "weak")


@pytest.mark.parametrize("planner", ["cem", "icem", "random_shooting", "policy_guided", "mppi", "diffusion"])
@pytest.mark.parametrize("aggregate", ["mean", "cvar", "worst"])
def test_every_planner_that_samples_plans_against_opponents(planner, aggregate):
    made = make_config(
        "debug", task="hockey", planner=planner, opponent_simulation={"enabled": True, "opponent_agents": ["weak"], "aggregate": aggregate}
    )
    agent = make_agent(made, SPEC)
    action = agent.act(agent.init_carry(3), torch.randn(3, 5), "eval").action
    assert action.shape == (3, 2) and bool(action.isfinite().all())


def test_choices_against_choices():
    spec = EnvSpec("toy/game", (5,), 4, 50, discrete=True, other=Seat((5,), 3, True))
    agent = make_agent(make_config("debug", task="hockey", opponent_simulation={"enabled": True}), spec)
    output = agent.act(agent.init_carry(2), torch.randn(2, 5), "eval")
    assert output.action.sum(-1).tolist() == [1.0, 1.0]
    assert agent.watch_game(output.carry, torch.randn(2, 5), {"other_action": torch.eye(3)[:2]}).belief.shape == (2, 1)


def test_the_simulation_is_restored_bit_for_bit():
    agents = [agent_of(), agent_of()]
    agents[0].simulation.store("weak", torch.randn(50, 5), torch.rand(50, 3))
    agents[0].update(batch_of())
    agents[1].load_state_dict(agents[0].state_dict())
    ends = [agent.update(batch_of(seed=3)) for agent in agents]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    with pytest.raises(ValueError, match="imagined opponents were weak, strong, anyone, are strong, weak, anyone"):
        agent_of(opponent_agents=["strong", "weak"]).load_state_dict(agents[0].state_dict())


def test_models_of_this_kind_satisfy_what_planners_need():
    agent = agent_of()
    noise = agent.streams["eval"].draw(agent.simulation.noise_specs(3, 2))
    model = agent.simulation.against(agent.simulation.prior(2), noise)
    assert isinstance(model, Against) and isinstance(agent.simulation, OpponentSimulation)
    z, action = agent.model.encode(torch.randn(2, 5)), torch.rand(2, 2)
    most = model.next(z, action)
    other = agent.simulation.clones[0].mean(z)  # of equal beliefs the first
    assert torch.allclose(most, agent.model.next(z, torch.cat((action, other), -1)), atol=1e-6)
