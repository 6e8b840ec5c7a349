"""Plans anew for replayed steps: when, for which rows, with which random numbers, and that nothing else changes."""

import pytest
import torch
from torch.testing import assert_close

from worldmpc.agents.tdmpc2 import TDMPC2
from worldmpc.config import ReanalyzeConfig, make_config
from worldmpc.data.replay import Replay
from worldmpc.data.source import ReplaySource
from worldmpc.learners.reanalyze import Reanalyze
from worldmpc.models.heads import split_gaussian
from worldmpc.models.proposals import WiderProposals
from worldmpc.planners import propose, rollout_return
from worldmpc.types import EnvSpec, Transition

T = 3
EXTRAS = {"plan_mean": (2,), "plan_value": (), "other": (2,)}


class World:
    """Environments whose observations are serial numbers, so that every row of a replay tells which step it is."""

    def __init__(self, replay, seed=0):
        self.replay, self.envs = replay, replay.num_envs
        self.generator = torch.Generator().manual_seed(seed)
        self.number, self.now = self.envs, torch.arange(self.envs).float()

    def step(self, planned=True):
        """One step of every environment that makes one; episodes end now and then, and some steps have no plan."""
        u = torch.rand(3, self.envs, generator=self.generator)
        following = torch.arange(self.number, self.number + self.envs).float()
        extras = {"plan_mean": -self.now[:, None].expand(-1, 2).clone(), "plan_value": -self.now, "other": u[:2].T.contiguous()}
        for value in extras.values():
            value[u[2] < 0.2] = torch.nan
        self.replay.add(
            Transition(
                self.now[:, None],
                torch.zeros(self.envs, 1),
                self.now,
                u[0] < 0.15,
                (u[1] < 0.15) & (u[0] >= 0.15),
                following[:, None],
                u[2] < 0.9,
                extras if planned else {},
            )
        )
        ended = ((u[0] < 0.15) | (u[1] < 0.15)) & (u[2] < 0.9)
        self.number += self.envs
        fresh = torch.arange(self.number, self.number + self.envs).float()
        self.number += self.envs
        self.now = torch.where(u[2] < 0.9, torch.where(ended, fresh, following), self.now)


def filled(envs=3, capacity=90, steps=50, windows="padded", seed=0):
    replay = Replay(capacity, envs, (1,), 1, T, windows=windows, extras=EXTRAS)
    world = World(replay, seed)
    for _ in range(steps):
        world.step()
    return replay


def plan(obs):
    """A plan that tells for which observation it is."""
    number = obs[:, 0]
    whole = torch.stack((number + 0.25, number + 0.5), -1)[:, None].expand(-1, 5, -1)
    return {"plan_mean": whole[:, 0], "plan_value": number + 0.75, "plan_elite": whole[:, 1]}


def uniform(count=6, seed=1):
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def same(one, two):
    return ((one == two) | (one.isnan() & two.isnan())).flatten(1).all(1) if one.dim() > 1 else (one == two) | (one.isnan() & two.isnan())


@pytest.mark.parametrize(("begin", "interval"), [(0, 1), (0, 4), (5, 1), (5, 4), (4, 4)])
def test_due_every_so_many_updates_from_the_beginning_on(begin, interval):
    """Updates are counted from 1; what comes before counts for nothing."""
    replay, calls = filled(), []
    refresh = Reanalyze(ReanalyzeConfig(interval, 2), replay, lambda obs: calls.append(len(obs)) or plan(obs), begin)
    batch, due = replay.sample(uniform()), []
    for update in range(1, 31):
        before = len(calls)
        found = refresh(batch, update)
        assert (found is batch) == (len(calls) == before)
        due += [update] * (len(calls) - before)
    assert due == list(range(begin + interval, 31, interval)) and set(calls) == {2 * T}


@pytest.mark.parametrize("envs", [1, 3])
@pytest.mark.parametrize("windows", ["padded", "inside"])
@pytest.mark.parametrize("steps", [30, 100], ids=["filling", "overwritten"])
@pytest.mark.parametrize("count", [1, 4, 6])
def test_exactly_the_real_steps_of_the_first_windows_are_written(envs, windows, steps, count):
    """And nothing else anywhere: no other row, no last observation of an episode, no other field."""
    replay = filled(envs, 30 * envs, steps, windows)
    batch, before = replay.sample(uniform()), replay.state_dict()
    Reanalyze(ReanalyzeConfig(1, count), replay, plan, 0)(batch, 1)
    after = replay.state_dict()
    chosen = {int(number) for number in batch.obs[:-1, :count, 0][batch.mask[:, :count] > 0]}
    assert (batch.mask[:, :count] == 0).any() or windows == "inside" or count == 1
    numbers = before["obs"][:, 0]
    for name in before:
        if name in ("extras.plan_mean", "extras.plan_value"):
            continue
        assert torch.equal(before[name].nan_to_num(-7.0), after[name].nan_to_num(-7.0)), name
    real = before["flags"] > 0
    for name in ("plan_mean", "plan_value"):
        old, new, wanted = before[f"extras.{name}"], after[f"extras.{name}"], plan(before["obs"])[name]
        written = ~same(old, new)
        assert {int(number) for number in numbers[written]} == chosen and int(written.sum()) == len(chosen)
        assert real[written].all() and torch.equal(new[written], wanted[written])


@pytest.mark.parametrize("count", [1, 4, 6])
def test_the_batch_holds_the_new_plans_at_their_places(count):
    """Of the first windows; padding and the other windows stay."""
    replay = filled()
    batch = replay.sample(uniform())
    kept = batch._replace(extras={name: value.clone() for name, value in batch.extras.items()})
    found = Reanalyze(ReanalyzeConfig(1, count), replay, plan, 0)(batch, 1)
    assert (batch.mask == 0).any()
    for name in ("plan_mean", "plan_value"):
        assert torch.equal(batch.extras[name].nan_to_num(-7.0), kept.extras[name].nan_to_num(-7.0))
        wanted = plan(batch.obs[:-1].flatten(0, 1))[name].view(batch.extras[name].shape)
        for t in range(T):
            for b in range(6):
                expected = wanted if b < count and batch.mask[t, b] else kept.extras[name]
                assert torch.equal(found.extras[name][t, b].nan_to_num(-7.0), expected[t, b].nan_to_num(-7.0)), (name, t, b)
    assert found.extras.keys() == batch.extras.keys()  # what the replay has no room for goes nowhere
    assert torch.equal(found.extras["other"].nan_to_num(-7.0), kept.extras["other"].nan_to_num(-7.0))
    for one, other in zip(found[:-1], kept[:-1], strict=True):
        assert one is other or torch.equal(one, other)
    again = replay.sample(uniform())
    for name in ("plan_mean", "plan_value"):
        new, stored = found.extras[name][:, :count], again.extras[name][:, :count]
        assert torch.equal(new.nan_to_num(-7.0), stored.nan_to_num(-7.0))


def test_new_plans_stay_until_they_are_overwritten():
    """Steps that are added later take their own plans, also at the same rows."""
    replay = filled(1, 20, 40)
    world = World(replay, 5)
    world.number, world.now = 10_000, torch.tensor([9_999.0])
    batch = replay.sample(uniform(40))
    Reanalyze(ReanalyzeConfig(1, 40), replay, plan, 0)(batch, 1)
    stored = replay.transitions(0.9)
    assert same(stored.extras["plan_mean"], plan(stored.obs)["plan_mean"]).any()
    for _ in range(40):
        world.step(planned=False)
    stored = replay.transitions(0.9)
    assert len(stored.obs) > 5 and stored.extras["plan_mean"].isnan().all() and stored.extras["plan_value"].isnan().all()


def test_plans_of_padding_go_nowhere():
    """Batches that are all padding but for one step, again and again: padded rows read as before."""
    replay = Replay(20, 1, (1,), 1, T, extras=EXTRAS)
    for number in range(4):
        zeros = torch.zeros(1, dtype=torch.bool)
        replay.add(Transition(torch.full((1, 1), 2.0 * number), torch.zeros(1, 1), torch.zeros(1), ~zeros, zeros, torch.ones(1, 1), ~zeros))
    refresh = Reanalyze(ReanalyzeConfig(1, 4), replay, lambda obs: plan(obs + 100), 0)
    u = torch.arange(4, dtype=torch.float64) / 4
    for update in range(1, 4):
        batch = refresh(replay.sample(u), update)
        assert batch.mask.tolist() == [[1] * 4, [0] * 4, [0] * 4]
        for found in (batch, replay.sample(u)):
            assert (found.extras["plan_mean"][1:] == 0).all() and (found.extras["plan_value"][1:] == 0).all()
            assert found.extras["plan_value"][0].tolist() == [100.75, 102.75, 104.75, 106.75]


def test_a_source_renews_the_batches_it_hands_out():
    """Counting its updates, and drawing the same windows as one that does not."""
    sources = []
    for renews in (True, False):
        replay = filled()
        refresh = Reanalyze(ReanalyzeConfig(2, 3), replay, plan, 1) if renews else None
        sources.append(ReplaySource(replay, 6, 1, 0, torch.Generator().manual_seed(3), refresh=refresh))
    for update in range(1, 8):
        one, other = (source.next() for source in sources)
        assert torch.equal(one.index, other.index) and torch.equal(one.obs, other.obs)
        real = one.mask[:, :3] > 0
        wanted = plan(one.obs[:-1, :3].flatten(0, 1))["plan_value"].view(T, 3)
        if update in (3, 5, 7):
            assert torch.equal(one.extras["plan_value"][:, :3][real], wanted[real])
        assert not torch.equal(other.extras["plan_value"][:, :3][real], wanted[real])


# Of an agent --------------------------------------------------------------------------------------------------------------------

BOX, CHOICES = EnvSpec("test", (5,), 2, 50), EnvSpec("test", (5,), 3, 50, discrete=True)


def make(spec=BOX, **overrides):
    values = {"policy.objective": "kl_to_planner", "loss.batch_size": 6, "train.seed_decisions": 4, **overrides}
    if not spec.discrete:
        values["model.policy"] = "clipped"
    return TDMPC2(make_config("debug", **values), spec)


RENEWS = {"reanalyze.interval": 2, "reanalyze.batch_size": 3}


def observe(source, spec, steps=20, envs=2):
    generator = torch.Generator().manual_seed(8)
    for index in range(steps):
        zeros, obs = torch.zeros(envs, dtype=torch.bool), torch.randn(2, envs, 5, generator=generator)
        action = torch.eye(3)[torch.randint(3, (envs,), generator=generator)] if spec.discrete else torch.rand(envs, 2, generator=generator)
        source.observe(Transition(obs[0], action, obs[0, :, 0], zeros, zeros | (index % 7 == 6), obs[1], ~zeros))


@pytest.mark.parametrize("spec", [BOX, CHOICES], ids=["box", "choices"])
def test_an_agent_plans_anew_for_steps_that_had_no_plan(spec):
    """Elites, deviations and values of its own planner, within the bounds of actions."""
    agent = make(spec, **RENEWS)
    source = agent.make_source(2, torch.Generator().manual_seed(1))
    observe(source, spec)
    first, second = source.next(), source.next()
    assert first.extras["plan_elite"][first.mask > 0].isnan().all()
    real = second.mask[:, :3] > 0
    for name in ("plan_elite", "plan_mean", "plan_std", "plan_value"):
        new = second.extras[name]
        assert new[:, :3][real].isfinite().all() and new[:, 3:][second.mask[:, 3:] > 0].isnan().any()
    assert second.extras["plan_elite"][:, :3][real].abs().max() <= 1
    assert agent.update(second)["pi_loss"].isfinite()


def test_reanalysis_draws_numbers_of_its_own():
    """The other streams, and the windows drawn, are what they are without it."""
    agents = [make(**RENEWS), make()]
    sources = [agent.make_source(2, torch.Generator().manual_seed(1)) for agent in agents]
    untouched = agents[0].streams["reanalyze"].state_dict()["state"]
    before = torch.get_rng_state()
    for agent, source in zip(agents, sources, strict=True):
        observe(source, BOX)
        agent.act(agent.init_carry(2), torch.zeros(2, 5), "explore")
        for _ in range(4):
            agent.update(source.next())
    for name in ("explore", "eval", "update"):
        assert torch.equal(*(agent.streams[name].state_dict()["state"] for agent in agents)), name
    assert torch.equal(*(source.generator.get_state() for source in sources))
    assert not torch.equal(agents[0].streams["reanalyze"].state_dict()["state"], untouched)
    assert torch.equal(agents[1].streams["reanalyze"].state_dict()["state"], untouched)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_reanalysis_draws_is_saved():
    agents = [make(**RENEWS), make(**RENEWS)]
    obs = torch.randn(6, 5)
    agents[0].replan(obs)
    agents[1].load_state_dict(agents[0].state_dict())
    one, other = (agent.replan(obs) for agent in agents)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("skip", [True, False])
def test_reanalysis_waits_for_the_policy(skip):
    """Where the seed phase's updates are of the model alone, they do not count."""
    agent = make(**RENEWS, **{"policy.skip_seed_updates": skip, "train.utd": 0.75})
    refresh = agent.make_source(1, torch.Generator()).refresh
    assert refresh.begin == agent.learner.policy_from == (3 if skip else 0)
    assert make().make_source(1, torch.Generator()).refresh is None


@torch.no_grad()
def test_proposals_have_their_own_width(either):
    """The bounds of the log standard deviation, in one call of the library or step by step; values do not change."""
    model = make().model
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape))
    wider = WiderProposals(model, -0.5, 0.5)
    z, eps, sampled = model.encode(torch.randn(2, 5)), torch.randn(3, 2, 16, 2), []
    now = z[:, None].expand(-1, 16, -1)
    for step in eps:
        mean, log_std = split_gaussian(model.pi(now), -0.5, 0.5)
        sampled.append((torch.tanh(mean) + step * log_std.exp()).clamp(-1, 1))
        now = model.next(now, sampled[-1])
    assert_close(wider.propose(z, eps[0, :, 0]), sampled[0][:, 0])
    assert_close(propose(wider, z, eps), torch.stack(sampled), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(propose(model, z, eps), torch.stack(sampled), atol=1e-2)
    critics, sequences = torch.tensor([1, 0]), torch.stack(sampled)[:, :, 0]
    values = [rollout_return(one, z, sequences, 0.9, eps[0, :, 0], critics) for one in (wider, model)]
    assert torch.equal(*values)


def test_proposals_of_reanalysis_alone_are_wider():
    agent = make(**RENEWS, **{"reanalyze.log_std_min": -0.5, "reanalyze.log_std_max": 0.5})
    seen = []

    def spy(planning, *args, **kwargs):
        seen.append(planning)
        return plan_of(planning, *args, **kwargs)

    plan_of, agent._plan = agent._plan, spy
    agent.replan(torch.randn(4, 5))
    agent.act(agent.init_carry(2), torch.randn(2, 5), "explore")
    assert isinstance(seen[0], WiderProposals) and seen[0]._log_std == (-0.5, 0.5) and seen[1] is agent.model


def test_plans_anew_are_cold_plans():
    """What an agent with the same numbers, which has not acted yet, plans with the wider proposals."""
    agent, obs = make(**RENEWS), torch.randn(4, 5)
    noise = agent.streams["reanalyze"].draw(agent.planner.noise_specs(4))
    agent.streams["reanalyze"] = make(**RENEWS).streams["reanalyze"]
    found = agent.replan(obs)
    start = agent.planner.init(4, agent.device)
    expected = agent.planner.plan(WiderProposals(agent.model, -2.0, 1.0), agent.model.encode(obs), start, noise, False)
    assert torch.equal(found["plan_elite"], expected.elite) and torch.equal(found["plan_value"], expected.value)
    assert torch.equal(found["plan_mean"], expected.mean[:, 0]) and torch.equal(found["plan_std"], expected.std[:, 0])
