"""The world model: sizes, interfaces, and which parameters learn from what."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from worldmpc.config import ConfigError, ModelConfig
from worldmpc.functional import parameter_table
from worldmpc.models import kernels, native
from worldmpc.models.nets import MLP
from worldmpc.models.two_hot import TwoHot
from worldmpc.models.world_model import WorldModel
from worldmpc.planners import rollout, rollout_return
from worldmpc.types import Model, ModelStep

SMALL = ModelConfig(enc_dim=16, mlp_dim=16, latent_dim=16, num_enc_layers=2, num_q=3)


@pytest.mark.parametrize(
    ("size", "millions"), [("1", (0.7, 1.4)), ("5", (4.2, 5.5)), ("19", (17, 21)), ("48", (45, 52)), ("317", (300, 330))]
)
def test_published_sizes(size, millions):
    """Counted on dog's 223 observations and 38 actions, where the published sizes are named after their parameters."""
    with torch.device("meta"):
        total = _count(ModelConfig(size=size), 223, 38)
    assert millions[0] <= total / 1e6 <= millions[1]


def _count(config, obs_dim, action_dim):
    from worldmpc.config import resolve_model

    c = resolve_model(config)
    hidden, joint = c.mlp_dim, c.latent_dim + action_dim

    def dense(i, o, norm=True):
        return i * o + o + 2 * o * norm

    trunk = lambda i: dense(i, hidden) + dense(hidden, hidden)  # noqa: E731
    encoder = dense(obs_dim, c.enc_dim) + (max(c.num_enc_layers - 1, 1) - 1) * dense(c.enc_dim, c.enc_dim) + dense(c.enc_dim, c.latent_dim)
    heads = trunk(joint) + dense(hidden, c.latent_dim) + (1 + c.num_q) * (trunk(joint) + dense(hidden, c.num_bins, False))
    return encoder + heads + trunk(c.latent_dim) + dense(hidden, 2 * action_dim, False)


def test_parameter_table_counts_what_is_there():
    model = WorldModel(SMALL, 7, 3, terminates=True)
    table = dict(parameter_table(model))
    assert table["total"] == sum(value for name, value in table.items() if name != "total")
    assert table["total"] == sum(p.numel() for name, p in model.named_parameters() if not name.startswith("target_q."))
    assert table["total"] - table["termination"] == _count(SMALL, 7, 3)


def test_satisfies_the_protocol_and_any_leading_dimensions():
    model = WorldModel(SMALL, 7, 3, terminates=True)
    assert isinstance(model, Model)
    z = model.encode(torch.randn(2, 5, 7))
    step = model.step(z, torch.randn(2, 5, 3))
    assert z.shape == step.z.shape == (2, 5, 16) and step.reward.shape == step.cont.shape == (2, 5)
    assert model.terminal_value(z, torch.randn(2, 5, 3), torch.tensor([0, 2])).shape == (2, 5)
    assert model.propose(z, torch.randn(2, 5, 3)).abs().max() <= 1


@torch.no_grad()
@pytest.mark.parametrize("terminates", [True, False])
@pytest.mark.parametrize("from_rows", [1, 1 << 60])
def test_rollout_equals_single_steps(terminates, from_rows, monkeypatch):
    monkeypatch.setattr(kernels, "NATIVE_FROM", from_rows)
    model = WorldModel(SMALL, 7, 3, terminates=terminates)
    torch.nn.init.normal_(model.reward[-1].weight)
    z, actions = model.encode(torch.randn(4, 7)), torch.randn(3, 4, 3).clamp(-1, 1)

    class StepByStep:
        step = staticmethod(model.step)

    for ours, expected in zip(model.rollout(z, actions), rollout(StepByStep(), z, actions), strict=True):
        assert_close(ours, expected)


def test_fresh_values_and_rewards_are_zero():
    model = WorldModel(SMALL, 7, 3)
    z, action = model.encode(torch.randn(4, 7)), torch.randn(4, 3)
    assert_close(model.q_values(z, action), torch.zeros(3, 4), rtol=0, atol=1e-5)
    assert_close(model.target_q_values(z, action), model.q_values(z, action))
    assert_close(model.step(z, action).reward, torch.zeros(4), rtol=0, atol=1e-5)


def test_hard_continuation_is_the_threshold_of_the_soft_one():
    soft = WorldModel(SMALL, 7, 3, terminates=True)
    hard = WorldModel(ModelConfig(**{**vars(SMALL), "continuation": "hard"}), 7, 3, terminates=True)
    torch.nn.init.normal_(soft.termination[-1].weight, std=5.0)
    hard.load_state_dict(soft.state_dict())
    z = torch.randn(200, 16)
    assert set(hard.cont(z).unique().tolist()) == {0.0, 1.0}
    assert_close(hard.cont(z), (soft.cont(z) >= 0.5).float())


def test_target_moves_by_tau():
    model = WorldModel(SMALL, 7, 3)
    before = [p.clone() for p in model.target_q.parameters()]
    with torch.no_grad():
        for parameter in model.q.parameters():
            parameter.add_(1.0)
    model.update_target(torch.tensor(0.25))
    for old, new in zip(before, model.target_q.parameters(), strict=True):
        assert_close(new, old + 0.25)
        assert not new.requires_grad


def test_same_seed_same_weights():
    one, two, other = (WorldModel(SMALL, 7, 3, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["dynamics.0.weight"], other["dynamics.0.weight"])


def test_termination_head_leaves_the_other_weights_alone():
    plain, with_head = WorldModel(SMALL, 7, 3).state_dict(), WorldModel(SMALL, 7, 3, terminates=True).state_dict()
    assert all(torch.equal(value, with_head[name]) for name, value in plain.items())


def test_widths_must_fit():
    with pytest.raises(ConfigError, match=r"model.latent_dim: expected a multiple of model.simnorm_dim \(8\), got 20"):
        WorldModel(ModelConfig(size="cpu", latent_dim=20), 7, 3)


def test_model_step_is_what_planners_expect():
    assert ModelStep._fields == ("z", "reward", "cont")


class _Half(nn.Module):
    """A reward network of one's own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.inner = network

    def forward(self, *parts: Tensor) -> Tensor:
        return 0.5 * self.inner(*parts)


class _Shifted(MLP):
    def forward(self, *parts: Tensor) -> Tensor:
        return super().forward(*parts) + torch.arange(101.0) / 50


class _Doubled(TwoHot):
    def decode(self, logits: Tensor) -> Tensor:
        return 2 * super().decode(logits)


def _replace_next(model: WorldModel) -> None:
    model.next = lambda z, action: model.dynamics(z, -action)


CHANGES = {
    "hook": lambda model: model.reward.register_forward_hook(lambda module, args, out: out + torch.arange(101.0) / 50),
    "pre-hook": lambda model: model.q.register_forward_pre_hook(lambda module, args: (args[0] * 0.5, *args[1:])),
    "class": lambda model: setattr(model.reward, "__class__", _Shifted),
    "method": lambda model: setattr(model.reward, "forward", lambda *parts: torch.zeros(*parts[0].shape[:-1], 101)),
    "own module": lambda model: setattr(model, "reward", _Half(model.reward)),
    "decoding": lambda model: setattr(model.two_hot, "__class__", _Doubled),
    "method of the model": _replace_next,
}


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_a_changed_part_is_what_plans(change, monkeypatch):
    """Whole returns in one call of the library are for the model as it is; whatever is changed in it counts."""
    model = WorldModel(ModelConfig(size="cpu"), 5, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    z, actions, eps = model.encode(torch.randn(1, 5))[:, None].expand(-1, 16, -1), torch.rand(3, 1, 16, 2), torch.randn(1, 16, 2)

    def value() -> Tensor:
        with torch.no_grad():
            return rollout_return(model, z, actions, 0.99, eps, torch.tensor([0, 1]))

    before = value()
    if change:
        CHANGES[change](model)
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda: "left out")
        expected = value()
    assert_close(value(), expected, rtol=1e-5, atol=1e-5)
    assert bool((expected - before).abs().max() > 1e-3) == bool(change)


def test_imagining_follows_a_changed_step():
    model, z, actions = WorldModel(ModelConfig(size="cpu"), 5, 2), torch.rand(16, 64), torch.rand(3, 16, 2)
    expected = model.imagine(z, -actions)
    _replace_next(model)
    assert_close(model.imagine(z, actions), expected)
    hooked = WorldModel(ModelConfig(size="cpu"), 5, 2)
    hooked.dynamics.register_forward_pre_hook(lambda module, args: (args[0], -args[1]))
    assert_close(hooked.imagine(z, actions), expected)


class Drift(nn.Module):
    """Dynamics of one's own."""

    def forward(self, z: Tensor, action: Tensor) -> Tensor:
        return z + action.mean(-1, keepdim=True)


def test_dynamics_of_ones_own_take_the_place_of_the_network():
    model = WorldModel(ModelConfig(size="cpu"), 5, 2)
    model.dynamics = Drift()
    z, actions = torch.rand(4, model.latent_dim), torch.ones(3, 4, 2)
    for latents in (model.rollout(z, actions).z, model.imagine(z, actions)):
        assert_close(latents[-1], z + 3)
    assert_close(model.step(z, actions[0]).z, z + 1)
