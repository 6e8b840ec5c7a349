"""Targets of critics on a chain of two states, whose values are known, and against their definition step by step."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from worldmpc import losses
from worldmpc.config import ModelConfig, ValueConfig
from worldmpc.models.world_model import WorldModel
from worldmpc.noise import NoiseStream
from worldmpc.types import ModelStep, SequenceBatch

GAMMA = 0.9
REWARD = torch.tensor([1.0, -3.0])
TRUE = torch.stack((REWARD[0] + GAMMA * REWARD[1], REWARD[1] + GAMMA * REWARD[0])) / (1 - GAMMA**2)
PAIR = torch.tensor([2, 0])
"""The critics that are drawn, of three."""


class Chain:
    """States 0 and 1 in turn, with a reward for leaving each. A proposal is its noise; actions add themselves to rewards and values.

    Critics are off by ``errors``; ``cont`` are the probabilities that the episode goes on after reaching each state.
    """

    discrete, action_dim, num_q = False, 1, 3

    def __init__(self, kind="v", errors=(0.0, 0.0, 0.0), cont=(1.0, 1.0)):
        self.state_values = kind == "v"
        self.believed, self.cont = TRUE + torch.tensor(errors)[:, None], torch.tensor(cont)

    def v_values(self, z, critics=None, slow=False):
        assert slow and self.state_values
        return torch.tensordot(self.believed[critics], z, ([1], [-1]))

    def target_q_values(self, z, action, critics=None):
        assert not self.state_values
        return torch.tensordot(self.believed[critics], z, ([1], [-1])) + action.squeeze(-1)

    def propose(self, z, eps):
        return eps

    def step(self, z, action):
        following = z.flip(-1)
        return ModelStep(following, (z * REWARD).sum(-1) + action.squeeze(-1), (following * self.cont).sum(-1))


def windows(length=5, size=2):
    """Windows of the chain that begin in its states in turn: the batch, and states [T, B, 2] before and after each step."""
    state = (torch.arange(length + 1)[:, None] + torch.arange(size)) % 2
    zeros = torch.zeros(length, size)
    batch = SequenceBatch(torch.zeros(length + 1, size, 1), zeros[..., None], REWARD[state[:-1]], zeros, zeros, zeros + 1, zeros.long())
    z = torch.eye(2)[state]
    return batch, z[:-1], z[1:]


def random_windows(length=5, size=64, seed=0):
    """Random rewards, and episodes that end anywhere: by termination, truncation or padding alone, or not at all."""
    generator = torch.Generator().manual_seed(seed)
    step = torch.arange(length)[:, None]
    last = torch.randint(length, (size,), generator=generator)
    how = torch.arange(size) % 4  # goes on, terminated, truncated, padded
    mask = ((step <= last) | (how == 0)).float()
    at_end = (step == last).float()
    random = torch.randn(length, size, 2, generator=generator)
    terminated, truncated = at_end * (how == 1), at_end * (how == 2)
    parts = torch.zeros(length + 1, size, 1), torch.zeros(length, size, 1), random[..., 0] * mask
    return SequenceBatch(*parts, terminated, truncated, mask, mask.long()), random[..., 1]


def targets(config, model, batch, z, next_z, noise=None):
    steps, size = batch.reward.shape
    if noise is None:
        specs = losses.target_noise(config, model, steps, size)
        noise = {name: torch.zeros(spec.shape) for name, spec in specs.items()} | {"td_critics": PAIR}
    return losses.value_targets(config, model, z, next_z, batch, GAMMA, noise)


def geometric(lam, count):
    """Share of the error of values in the mean of ``count`` n-step targets."""
    return (1 - lam) * sum(lam ** (n - 1) * GAMMA**n for n in range(1, count)) + lam ** (count - 1) * GAMMA**count


KINDS = {
    "td": (ValueConfig(), lambda left: GAMMA),
    "1 step": (ValueConfig(target="n_step", n_step=1), lambda left: GAMMA),
    "2 steps": (ValueConfig(target="n_step", n_step=2), lambda left: GAMMA ** min(2, left)),
    "3 steps": (ValueConfig(target="n_step", n_step=3), lambda left: GAMMA ** min(3, left)),
    "all steps": (ValueConfig(target="n_step", n_step=9), lambda left: GAMMA**left),
    "lambda 0": (ValueConfig(target="td_lambda", lam=0.0), lambda left: GAMMA),
    "lambda 0.7": (ValueConfig(target="td_lambda", lam=0.7), lambda left: geometric(0.7, left)),
    "lambda 1": (ValueConfig(target="td_lambda", lam=1.0), lambda left: GAMMA**left),
    "model 1": (ValueConfig(target="model", td_horizon=1), lambda left: GAMMA),
    "model 3": (ValueConfig(target="model", td_horizon=3), lambda left: GAMMA**3),
}
"""Targets, and what they leave of a constant error of values with so many steps left in the window."""
REPLAYED = {name: config for name, (config, _) in KINDS.items() if config.target != "model"}


@pytest.mark.parametrize("kind", ["v", "q"])
@pytest.mark.parametrize(("config", "left"), KINDS.values(), ids=KINDS)
def test_true_values_are_a_fixed_point_and_errors_shrink(config, left, kind):
    batch, z, next_z = windows()
    for error in (0.0, 2.0):
        found, _ = targets(config, Chain(kind, (error,) * 3), batch, z, next_z)
        shares = torch.tensor([float(left(len(z) - t)) for t in range(len(z))])[:, None]
        assert_close(found, (z * TRUE).sum(-1) + error * shares)


@pytest.mark.parametrize("kind", ["v", "q"])
@pytest.mark.parametrize("config", [config for config, _ in KINDS.values()], ids=KINDS)
@pytest.mark.parametrize(("bootstrap", "error"), [("min", -0.25), ("mean", 0.25)])
def test_two_critics_are_reduced(bootstrap, error, config, kind):
    """By their minimum or their mean; the one that is not drawn counts for nothing."""
    batch, z, next_z = windows()
    config = ValueConfig(config.target, bootstrap, config.n_step, config.lam, config.td_horizon)
    found, values = targets(config, Chain(kind, (0.75, -50.0, -0.25)), batch, z, next_z)
    expected, _ = targets(config, Chain(kind, (error,) * 3), batch, z, next_z)
    assert_close(found, expected)
    if config.target == "model":
        assert values is None
    else:
        assert_close(values, (next_z * TRUE).sum(-1) + error)


# Replayed steps ---------------------------------------------------------------------------------------------------------------


def n_step_return(batch, values, step, row, n):
    """The definition: at most ``n`` rewards of one window up to its episode's end, and a bootstrap unless that is terminal."""
    total = 0.0
    for k in range(n):
        now = step + k
        total += GAMMA**k * float(batch.reward[now, row])
        if batch.terminated[now, row]:
            return total
        if k == n - 1 or now == len(values) - 1 or batch.truncated[now, row] or not batch.mask[now + 1, row]:
            return total + GAMMA ** (k + 1) * float(values[now, row])
    raise AssertionError


def steps_left(batch, step, row):
    """Real steps of the episode from here to its end or the window's."""
    count = 0
    for now in range(step, len(batch.reward)):
        count += 1
        if batch.terminated[now, row] or batch.truncated[now, row] or (now + 1 < len(batch.mask) and not batch.mask[now + 1, row]):
            break
    return count


def defined(config, batch, values, step, row):
    if config.target == "td":
        return n_step_return(batch, values, step, row, 1)
    if config.target == "n_step":
        return n_step_return(batch, values, step, row, config.n_step)
    lam, count = config.lam, steps_left(batch, step, row)
    returns = [n_step_return(batch, values, step, row, n) for n in range(1, count + 1)]
    return (1 - lam) * sum(lam**n * value for n, value in enumerate(returns[:-1])) + lam ** (count - 1) * returns[-1]


class Given:
    """Values of next states as they are given, as latents."""

    state_values, discrete, num_q, action_dim = True, False, 2, 1

    def v_values(self, z, critics=None, slow=False):
        return z.squeeze(-1).expand(2, *z.shape[:-1])


def of_values(config, batch, values):
    return targets(config, Given(), batch, torch.full_like(values, torch.nan)[..., None], values[..., None])[0]


@pytest.mark.parametrize("config", REPLAYED.values(), ids=REPLAYED)
def test_targets_of_windows_with_ends_follow_their_definition(config):
    batch, values = random_windows(size=32)
    found = of_values(config, batch, values)
    for step, row in batch.mask.nonzero().tolist():
        assert float(found[step, row]) == pytest.approx(defined(config, batch, values, step, row), abs=1e-5), (step, row)


@pytest.mark.parametrize("factor", [100.0, torch.nan], ids=str)
@pytest.mark.parametrize("config", REPLAYED.values(), ids=REPLAYED)
def test_nothing_leaks_across_an_episodes_end(config, factor):
    """What lies behind is any number or none, not only the zeros of padding, and of another episode as well."""
    batch, values = random_windows()
    _, junk_values = random_windows(seed=1)
    real = batch.mask > 0
    behind = batch._replace(
        reward=torch.where(real, batch.reward, factor * junk_values),
        terminated=torch.where(real, batch.terminated, (junk_values > 0).float()),
        truncated=torch.where(real, batch.truncated, (junk_values < -1).float()),
    )
    expected = of_values(config, batch, values)
    assert torch.equal(of_values(config, behind, torch.where(real, values, factor * junk_values))[real], expected[real])
    ended = (batch.terminated + batch.truncated).sum(0) > 0  # their flags alone must stop it
    unmasked = behind._replace(mask=torch.where(ended, 1.0, batch.mask))
    assert torch.equal(of_values(config, unmasked, torch.where(real, values, factor * junk_values))[real], expected[real])


@pytest.mark.parametrize("config", REPLAYED.values(), ids=REPLAYED)
def test_the_value_of_a_terminal_state_counts_for_nothing_and_that_of_a_truncated_one_does(config):
    batch, values = random_windows()
    expected = of_values(config, batch, values)
    for flag, counts in ((batch.terminated, False), (batch.truncated, True)):
        found = of_values(config, batch, values + 7 * flag)
        rows = flag.sum(0) > 0
        changed = (found != expected) & (batch.mask > 0)
        assert rows.any() and not changed[:, ~rows].any()
        if not counts:
            assert not changed.any()
        assert torch.equal(changed[flag > 0], torch.full((int(flag.sum()),), counts))


def test_ends_of_the_mean_over_n():
    """Weights of 0 and 1 are one step and as many as there are."""
    batch, values = random_windows()
    kinds = {name: of_values(config, batch, values)[batch.mask > 0] for name, config in REPLAYED.items()}
    assert torch.equal(kinds["td"], kinds["1 step"]) and torch.equal(kinds["td"], kinds["lambda 0"])
    assert_close(kinds["lambda 1"], kinds["all steps"])
    longest = of_values(ValueConfig(target="n_step", n_step=5), batch, values)[batch.mask > 0]
    assert torch.equal(longest, kinds["all steps"])
    for one, other in itertools.combinations(("td", "2 steps", "3 steps", "all steps", "lambda 0.7"), 2):
        assert not torch.allclose(kinds[one], kinds[other])


def test_windows_of_one_step():
    batch, values = random_windows(length=1)
    found = [of_values(config, batch, values) for config in REPLAYED.values()]
    assert all(torch.equal(one, found[0]) for one in found)


# Imagined steps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "horizon", "expected"),
    [
        # Rewards of present proposals (their noise, 10 then 20, 30), continuation behind each step, bootstrap at the last noise.
        ("v", 1, lambda r, v, c: (r[0] + 10) + GAMMA * c[1] * v[1]),
        ("v", 3, lambda r, v, c: (r[0] + 10) + GAMMA * c[1] * ((r[1] + 20) + GAMMA * c[0] * ((r[0] + 30) + GAMMA * c[1] * v[1]))),
        # The first reward is the replayed one, 5 more than the chain's, whatever is proposed; values at noise 10 or 30.
        ("q", 1, lambda r, v, c: (r[0] + 5) + GAMMA * (v[1] + 10)),
        ("q", 3, lambda r, v, c: (r[0] + 5) + GAMMA * ((r[1] + 10) + GAMMA * c[0] * ((r[0] + 20) + GAMMA * c[1] * (v[1] + 30)))),
    ],
)
def test_imagined_steps_by_hand(kind, horizon, expected):
    batch, z, next_z = windows()
    batch, cont = batch._replace(reward=batch.reward + 5), (0.5, 0.8)
    config = ValueConfig(target="model", td_horizon=horizon)
    eps = (10 * torch.arange(1, horizon + 1.0))[:, None, None, None].expand(horizon, *batch.reward.shape, 1)
    found, _ = targets(config, Chain(kind, cont=cont), batch, z, next_z, {"td_critics": PAIR, "td_policy": eps})
    for start in (0, 1):
        order = [start, 1 - start]
        value = expected(REWARD[order], TRUE[order], [cont[state] for state in order])
        assert_close(found[z[..., start] > 0], value.expand(int(z[..., start].sum())))


def test_imagined_steps_of_states_depend_on_no_replayed_reward_or_end():
    config = ValueConfig(target="model", td_horizon=2)
    batch, z, next_z = windows()
    other = batch._replace(reward=batch.reward + 100, terminated=batch.mask, truncated=batch.mask, action=batch.action + 1)
    found = [targets(config, Chain("v"), windows, z, 9 * next_z)[0] for windows in (batch, other)]
    assert torch.equal(*found)


def test_imagined_steps_of_actions_end_where_the_replayed_one_is_terminal():
    config = ValueConfig(target="model", td_horizon=3)
    batch, z, next_z = windows()
    terminated = (torch.arange(10).view(5, 2) % 3 == 0).float()
    expected, _ = targets(config, Chain("q"), batch, z, next_z)
    found, _ = targets(config, Chain("q"), batch._replace(terminated=terminated), z, next_z)
    assert torch.equal(found, torch.where(terminated > 0, batch.reward, expected))


# Choices ----------------------------------------------------------------------------------------------------------------------


class Choices:
    """Two critics of three choices in one state, and the policy's probabilities."""

    state_values, discrete, num_q, action_dim = False, True, 2, 3
    values = torch.tensor([[1.0, 4.0, -2.0], [2.0, -1.0, 0.0]])
    probs = torch.tensor([0.5, 0.25, 0.25])

    def choice_values(self, z, critics=None, slow=False):
        assert slow
        return self.values[critics].reshape(2, *[1] * (z.dim() - 1), 3).expand(2, *z.shape[:-1], 3)

    def expected(self, values, z):
        return (self.probs * values).sum(-1)


@pytest.mark.parametrize(("reduce", "value"), [("min", 0.5 * 1 - 0.25 - 0.25 * 2), ("mean", 0.5 * 1.5 + 0.25 * 1.5 - 0.25 * 1)])
def test_choices_are_expected_after_critics_are_reduced(reduce, value):
    found = losses.slow_value(Choices(), torch.zeros(4, 2, 1), torch.randn(4, 2, 3), torch.tensor([1, 0]), reduce)
    assert_close(found, torch.full((4, 2), value))


# Of a world model -------------------------------------------------------------------------------------------------------------

SMALL = {"enc_dim": 16, "mlp_dim": 16, "latent_dim": 16, "num_enc_layers": 2, "num_q": 3}
WORLDS = list(itertools.product(["q", "v"], [False, True]))
WORLD_IDS = [f"{value}-{'choices' if discrete else 'box'}" for value, discrete in WORLDS]


def world(value="q", discrete=False, spread=0.3):
    model = WorldModel(ModelConfig(**SMALL, value=value), 5, 3, terminates=True, discrete=discrete)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return model


def world_batch(length=4, size=6):
    generator = torch.Generator().manual_seed(5)
    zeros = torch.zeros(length, size)
    action = torch.eye(3)[torch.randint(3, (length, size), generator=generator)]
    reward, terminated = torch.randn(length, size, generator=generator), (torch.arange(length * size).view(length, size) % 5 == 0).float()
    return SequenceBatch(torch.randn(length + 1, size, 5, generator=generator), action, reward, terminated, zeros, zeros + 1, zeros.long())


def world_targets(config, model, batch, noise=None):
    noise = noise or NoiseStream(1, "x").draw(losses.target_noise(config, model, *batch.reward.shape))
    return losses.roll(model, batch, GAMMA, 0.5, noise, config).td_target


@pytest.mark.parametrize(("value", "discrete"), WORLDS, ids=WORLD_IDS)
@pytest.mark.parametrize("horizon", [1, 3])
def test_imagined_steps_of_a_world_model(value, discrete, horizon):
    """Its parts called one by one: policy, reward, dynamics, termination, slow critics."""
    model, batch = world(value, discrete), world_batch()
    config = ValueConfig(target="model", td_horizon=horizon, bootstrap="mean")
    noise = NoiseStream(1, "x").draw(losses.target_noise(config, model, 4, 6))
    eps, critics = noise["td_policy"], noise["td_critics"]
    with torch.no_grad():
        codes = model.encode(batch.obs)
        if value == "v":
            z, total, weight, left = codes[:-1], 0.0, 1.0, list(eps)
        else:
            z, total, weight, left = codes[1:], batch.reward, GAMMA * (1 - batch.terminated), list(eps[:-1])
        for one in left:
            action = model.propose(z, one)
            total = total + weight * model.two_hot.decode(model.reward(z, action))
            z = model.dynamics(z, action)
            weight = weight * GAMMA * (1 - torch.sigmoid(model.termination(z).squeeze(-1)))
        if value == "v":
            last = model.two_hot.decode(model.target_v(z))[critics].mean(0)
        elif discrete:
            one_by_one = [model.target_q_values(z, torch.eye(3)[choice].expand(4, 6, 3), critics).mean(0) for choice in range(3)]
            last = (torch.softmax(model.pi(z), -1) * torch.stack(one_by_one, -1)).sum(-1)
        else:
            last = model.two_hot.decode(model.target_q(z, model.propose(z, eps[-1])))[critics].mean(0)
    assert_close(world_targets(config, model, batch, noise), total + weight * last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("value", "discrete"), WORLDS, ids=WORLD_IDS)
@pytest.mark.parametrize("config", [config for config, _ in KINDS.values()], ids=KINDS)
def test_targets_come_from_slow_critics_without_gradient(config, value, discrete):
    model, batch = world(value, discrete), world_batch()
    found = world_targets(config, model, batch)
    assert found.isfinite().all() and not found.requires_grad
    with torch.no_grad():
        for parameter in model.critics.parameters():
            parameter.add_(1.0)
    assert torch.equal(world_targets(config, model, batch), found)
    with torch.no_grad():
        for parameter in (model.target_v if value == "v" else model.target_q).parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape))
    assert not torch.allclose(world_targets(config, model, batch), found)


@pytest.mark.parametrize("value", ["q", "v"])
def test_imagination_begins_at_the_encoding_of_each_observation(value):
    """Not at imagined latents: changed actions change no target of states, and that of actions by its own step alone."""
    model, batch = world(value), world_batch()
    config = ValueConfig(target="model", td_horizon=2)
    found = world_targets(config, model, batch)
    assert torch.equal(world_targets(config, model, batch._replace(action=-batch.action)), found)
    obs = batch.obs.clone()
    obs[2] += 1
    changed = (world_targets(config, model, batch._replace(obs=obs)) != found).any(1)
    assert changed.tolist() == [step == (2 if value == "v" else 1) for step in range(4)]


@pytest.mark.parametrize(
    ("value", "config", "shapes"),
    [
        ("q", ValueConfig(), {"td_policy": (4, 6, 3), "td_critics": (2,)}),
        ("q", ValueConfig(target="n_step"), {"td_policy": (4, 6, 3), "td_critics": (2,)}),
        ("q", ValueConfig(target="model", td_horizon=3), {"td_policy": (3, 4, 6, 3), "td_critics": (2,)}),
        ("v", ValueConfig(), {"td_critics": (2,)}),
        ("v", ValueConfig(target="td_lambda"), {"td_critics": (2,)}),
        ("v", ValueConfig(target="model", td_horizon=2), {"td_policy": (2, 4, 6, 3), "td_critics": (2,)}),
    ],
)
def test_noise_is_what_is_needed_in_the_published_order(value, config, shapes):
    specs = losses.target_noise(config, world(value), 4, 6)
    assert [(name, spec.shape) for name, spec in specs.items()] == list(shapes.items())
    assert specs["td_critics"].kind == "subset" and specs["td_critics"].argument == 3
