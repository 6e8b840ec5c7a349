"""The denoiser over action sequences: its diffusion in closed form, what it learns, and what sampling does."""

import math

import pytest
import torch
from torch.testing import assert_close

from worldmpc.models.heads import one_hot_argmax
from worldmpc.models.trajectory import TrajectoryModel, cosine_alpha_bar
from worldmpc.noise import NoiseStream


class TwoPoints(TrajectoryModel):
    """The exact denoiser of sequences that are all +m or all -m, with equal probability."""

    m = 0.7

    def __init__(self, horizon=2, steps=10):
        super().__init__(1, horizon, 1, (8,), steps)

    def denoise(self, x, z, step):
        left = self.alpha_bar[step]
        return (self.m * torch.tanh(self.m * math.sqrt(left) * x.sum((-2, -1), keepdim=True) / (1 - left))).expand(x.shape)


def train(model, data, updates, weight=None, lr=2e-3):
    stream, optimizer = NoiseStream(0, "training"), torch.optim.Adam(model.net.parameters(), lr)
    for _ in range(updates):
        z, actions = data(256)
        noise = stream.draw(model.noise_specs(256))
        optimizer.zero_grad()
        model.loss(z, actions, noise, None if weight is None else weight(actions)).mean().backward()
        optimizer.step()
        model.update_ema()
    return model


def draw(model, z, samples=512, seed=0, iterations=None, **how):
    noise = NoiseStream(seed, "sampling").draw(model.sample_specs(len(z), samples, iterations))
    return model.sample(z, noise, **how)


def signs(batch):
    return torch.randint(0, 2, (batch, 1)).float() * 2 - 1


# The diffusion itself.


def test_cosine_schedule_by_hand():
    def curve(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    one, half, none = cosine_alpha_bar(2)
    assert one == 1 and half == pytest.approx(curve(0.5) / curve(0)) and none == pytest.approx(half * 1e-3)


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_denoising_steps_cover_the_diffusion(iterations):
    grid = TrajectoryModel(1, 2, 1, (8,), steps=10).grid(iterations)
    assert len(grid) == iterations and grid[0][0] == 10 and grid[-1][1] == 0
    assert all(step > before for step, before in grid) and all(one[1] == two[0] for one, two in zip(grid, grid[1:], strict=False))


@pytest.mark.parametrize(("step", "before"), [(10, 9), (5, 4), (7, 2), (1, 0), (4, 0)])
def test_a_reverse_step_from_the_true_sequence_gives_its_noisy_version(step, before):
    """Where x ~ N(sqrt(abar) clean, 1 - abar), the step before must be the same with its own abar."""
    model = TrajectoryModel(1, 1, 1, (8,))
    clean, eps, x = torch.full((50_000, 1, 1), 0.6), torch.randn(50_000, 1, 1), torch.randn(50_000, 1, 1)
    x = math.sqrt(model.alpha_bar[step]) * clean + math.sqrt(1 - model.alpha_bar[step]) * x
    less = model.reverse(x, clean, step, before, eps)
    left = model.alpha_bar[before]
    assert less.mean().item() == pytest.approx(math.sqrt(left) * 0.6, abs=0.02)
    assert less.std().item() == pytest.approx(math.sqrt(1 - left), abs=0.02)
    if not before:
        assert_close(less, clean)


@pytest.mark.parametrize(("iterations", "share"), [(5, 0.9), (10, 0.99)])
def test_an_exact_denoiser_gives_exact_samples(iterations, share):
    x = draw(TwoPoints(), torch.zeros(1, 1), 4000, iterations=iterations)
    assert ((x.abs() - 0.7).abs() < 0.1).float().mean() > share
    assert (x > 0).float().mean().item() == pytest.approx(0.5, abs=0.03)


# Learning.


def test_loss_by_hand():
    """A network that always says 0 is off by the clean sequence; weights multiply."""
    model = TrajectoryModel(2, 3, 4, (8,))
    for parameter in model.net[-1].parameters():
        torch.nn.init.zeros_(parameter)
    z, actions, noise = torch.randn(5, 4), torch.rand(5, 3, 2) * 2 - 1, NoiseStream(0, "loss").draw(model.noise_specs(5))
    expected = actions.square().mean((1, 2))
    assert_close(model.loss(z, actions, noise), expected)
    weight = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0])
    assert_close(model.loss(z, actions, noise, weight), weight * expected)


@pytest.mark.parametrize("u", [0.0, 0.35, 1 - 2**-24])
def test_the_network_sees_the_noisy_sequence_of_its_step(u):
    model, seen = TrajectoryModel(1, 2, 1, (8,)), []
    model._predict = lambda network, x, z, time: seen.append((x, time)) or x  # type: ignore[method-assign]
    actions, eps = torch.rand(3, 2, 1), torch.randn(3, 2, 1)
    model.loss(torch.zeros(3, 1), actions, {"trajectory_step": torch.full((3,), u), "trajectory_noise": eps})
    step = 1 + int(u * 10)
    left = model.alpha_bar[step]
    assert_close(seen[0][0], math.sqrt(left) * actions + math.sqrt(1 - left) * eps)
    assert_close(seen[0][1], model._time[step].expand(3, -1))


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_learns_two_modes_that_follow_the_latent_of_any_scale(scale):
    """Sequences go all up or all down, by 0.4 where z is -1 and 0.8 where it is 1 (a LayerNorm on one number would hide z)."""

    def data(batch):
        z = signs(batch)
        return scale * z, ((0.6 + 0.2 * z) * signs(batch))[:, None].expand(-1, 3, -1) + 0.02 * torch.randn(batch, 3, 1)

    model = train(TrajectoryModel(1, 3, 1, (64, 64)), data, 400)
    x = draw(model, scale * torch.tensor([[-1.0], [1.0]])).squeeze(-1)
    assert ((x > 0).all(-1) | (x < 0).all(-1)).float().mean() > 0.97
    assert ((x[..., 0] > 0).float().mean(1) - 0.5).abs().max() < 0.15
    for own, mode in zip(x, (0.4, 0.8), strict=True):
        assert ((own.abs() - mode).abs() < 0.15).float().mean() > 0.85


def test_weights_shift_what_is_learned():
    """Going up returns 1, going down 0: at a temperature of 0.5 up has a weight of e^2 times that of down."""
    model = train(
        TrajectoryModel(1, 2, 1, (64, 64)),
        lambda batch: (torch.zeros(batch, 1), 0.6 * signs(batch)[:, None].expand(-1, 2, -1)),
        300,
        weight=lambda actions: len(actions) * torch.softmax((actions[:, 0, 0] > 0) / 0.5, 0),
    )
    assert (draw(model, torch.zeros(1, 1), 2000) > 0).float().mean().item() == pytest.approx(math.exp(2) / (1 + math.exp(2)), abs=0.06)


def test_learns_one_hot_sequences():
    """Of three choices: where z is -1 always the first, else the second or the third, the same at both steps."""

    def data(batch):
        z = signs(batch)
        choice = torch.where(z[:, 0] < 0, 0, 1 + torch.randint(0, 2, (batch,)))
        return z, torch.nn.functional.one_hot(choice, 3).float()[:, None].expand(-1, 2, -1)

    model = train(TrajectoryModel(3, 2, 1, (64, 64), discrete=True), data, 400)
    x = draw(model, torch.tensor([[-1.0], [1.0]]))
    assert (x.sum(-1) == 1).all() and ((x == 0) | (x == 1)).all()
    assert (x[0, :, :, 0] == 1).float().mean() > 0.98 and (x[1, :, :, 0] == 0).float().mean() > 0.97
    assert (x[1, :, 0] == x[1, :, 1]).all(-1).float().mean() > 0.95
    assert x[1, :, 0, 1].mean().item() == pytest.approx(0.5, abs=0.15)


def test_the_slow_copy_follows_and_is_what_samples():
    model = TrajectoryModel(1, 2, 1, (8,), ema_decay=0.9)
    weight, slow = model.net[0].weight, model.ema[0].weight  # type: ignore[union-attr]
    start = slow.clone()
    before = draw(model, torch.zeros(1, 1), 4)
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter += 1
    assert_close(draw(model, torch.zeros(1, 1), 4), before)
    model.update_ema()
    assert_close(slow - start, torch.full_like(slow, 0.9))  # the first update moves by 9/10
    with torch.no_grad():
        model.ema_updates.fill_(1000)
        slow.copy_(start)
    model.update_ema()
    assert_close(slow - start, torch.full_like(slow, 0.1))
    assert not torch.equal(draw(model, torch.zeros(1, 1), 4), before)
    model.loss(torch.zeros(2, 1), torch.zeros(2, 2, 1), NoiseStream(0, "loss").draw(model.noise_specs(2))).sum().backward()
    assert weight.grad is not None and slow.grad is None and not slow.requires_grad


def test_seeds_give_the_weights_and_nothing_else_does():
    one, same, other = (TrajectoryModel(1, 2, 3, (8,), seed=seed) for seed in (1, 1, 2))
    drawn = [draw(model, torch.ones(1, 3), 4) for model in (one, same, other)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    other.load_state_dict(one.state_dict())
    assert torch.equal(draw(other, torch.ones(1, 3), 4), drawn[0])


# Sampling.


def test_samples_depend_on_their_own_latent_and_noise_alone():
    model = TrajectoryModel(2, 3, 4, (16,))
    torch.nn.init.normal_(model.ema[-1].weight)  # type: ignore[union-attr,arg-type]
    z = torch.randn(3, 4)
    noise = NoiseStream(0, "sampling").draw(model.sample_specs(3, 5))
    together = model.sample(z, noise)
    assert together.shape == (3, 5, 3, 2) and together.abs().max() <= 1
    for row in range(3):
        assert_close(model.sample(z[row : row + 1], {"denoising": noise["denoising"][:, row : row + 1]}), together[row : row + 1])
    assert torch.equal(model.sample(z, noise, horizon=2), together[:, :, :2])


def test_guidance_raises_the_return_and_leaves_the_last_steps_alone():
    model, steps, z = TwoPoints(), [], torch.zeros(1, 1)

    def up(actions):
        steps.append(len(steps))
        return 2.0 * actions.sum((-2, -1))

    plain, guided = draw(model, z, 1000), draw(model, z, 1000, guidance_fn=up)
    assert (plain > 0).float().mean() < 0.6 and (guided > 0).float().mean() > 0.9
    assert ((guided.abs() - 0.7).abs() < 0.02).float().mean() > 0.98  # still what the prior can say
    assert len(steps) == 8


def test_guidance_by_hand():
    """The mean moves by the variance of the step times the gradient, here 3 a^2."""
    model = TrajectoryModel(1, 1, 1, (8,))
    x, clean, eps = torch.randn(4, 1, 1), torch.rand(4, 1, 1), torch.zeros(4, 1, 1)
    moved = model.reverse(x, clean, 6, 5, eps, lambda a: a.pow(3).sum((-2, -1))) - model.reverse(x, clean, 6, 5, eps)
    noisy, less = model.alpha_bar[6], model.alpha_bar[5]
    assert_close(moved, (1 - less) * (1 - noisy / less) / (1 - noisy) * 3 * clean**2)


def test_guidance_without_a_gradient_moves_nothing():
    model = TrajectoryModel(1, 1, 1, (8,))
    clean = torch.tensor([0.0, 0.25]).view(2, 1, 1)
    gradient = model.ascent(clean, lambda a: a.sqrt().sum((-2, -1)))  # infinite at 0
    assert_close(gradient.flatten(), torch.tensor([0.0, 1.0]))


def test_guidance_of_choices_goes_straight_through():
    """The function sees one-hot vectors; its gradient counts as that of what was rounded."""
    model, seen = TrajectoryModel(3, 1, 1, (8,), discrete=True), []
    value = torch.tensor([0.0, 1.0, 5.0])
    clean = torch.rand(4, 1, 3) * 2 - 1

    def worth(actions):
        seen.append(actions)
        return (actions * value).sum((-2, -1))

    assert_close(model.ascent(clean, worth), (value / 2).expand(4, 1, 3))
    assert_close(model.decode(clean), one_hot_argmax(clean))
