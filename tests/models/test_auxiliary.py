"""Auxiliary value heads: one layer for all discounts or one each, their slow copy, and what a checkpoint says about them."""

import pytest
import torch
from torch.testing import assert_close

from worldmpc.config import ConfigError, ModelConfig, MultiGammaConfig
from worldmpc.models.auxiliary import AuxiliaryValues, ValueHeads, check_record, make_auxiliary, record_of
from worldmpc.models.nets import MLP, SimNorm, init_weights
from worldmpc.models.two_hot import TwoHot
from worldmpc.models.world_model import WorldModel

Z, K, G = 16, 7, 3
GAMMAS = (0.5, 0.9, 0.97)


def world(**changes):
    sizes = {"enc_dim": 16, "mlp_dim": 16, "latent_dim": Z, "num_enc_layers": 2, "num_q": 2, "num_bins": K}
    return WorldModel(ModelConfig(**(sizes | changes)), 5, 2)


def disturbed(module, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def values(**changes):
    return AuxiliaryValues(**({"latent_dim": Z, "num_bins": K, "gammas": GAMMAS, "joint": True, "slow": True} | changes))


@pytest.mark.parametrize("lead", [(), (4,), (2, 5), (G, 2, K)], ids=str)
def test_joint_heads_are_separate_ones_side_by_side(lead):
    """The logits of each discount are those of its own layer, whatever the leading dimensions are."""
    separate, joint = disturbed(ValueHeads(Z, K, G, joint=False)), ValueHeads(Z, K, G, joint=True)
    with torch.no_grad():
        joint.layers[0].weight.copy_(torch.cat([layer.weight for layer in separate.layers]))
        joint.layers[0].bias.copy_(torch.cat([layer.bias for layer in separate.layers]))
    z = torch.randn(*lead, Z)
    one, other = separate(z), joint(z)
    assert one.shape == (*lead, G, K)
    assert_close(one, other)
    for index, layer in enumerate(separate.layers):
        assert_close(other[..., index, :], layer(z))


@pytest.mark.parametrize("joint", [True, False])
def test_one_head_and_as_many_parameters_as_there_should_be(joint):
    assert ValueHeads(Z, K, 1, joint)(torch.randn(2, 4, Z)).shape == (2, 4, 1, K)
    heads = ValueHeads(Z, K, G, joint)
    assert sum(parameter.numel() for parameter in heads.parameters()) == G * K * (Z + 1)
    assert len(heads.layers) == (1 if joint else G)


@pytest.mark.parametrize("head", ["joint", "separate"])
def test_heads_begin_at_zero_without_random_numbers(head):
    """Neither of the global generator: everything else is what it is without them."""
    config, model, before = MultiGammaConfig(enabled=True, gammas=("primary", *GAMMAS), head=head), world(), torch.get_rng_state()
    auxiliary = make_auxiliary(config, model, 0.99)
    assert all((parameter == 0).all() for parameter in auxiliary.parameters())
    assert (auxiliary.heads(torch.ones(3, Z)) == 0).all()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("joint", [True, False])
def test_hidden_layers(joint):
    """As wide as given, drawn from the seed alone; values begin at 0 all the same."""
    before = torch.get_rng_state()
    heads, again, other = (ValueHeads(Z, K, G, joint, [8, 8], seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    trunk, out = (Z * 8 + 3 * 8) + (8 * 8 + 3 * 8), 8 * K + K
    assert sum(parameter.numel() for parameter in heads.parameters()) == (trunk + G * out if joint else G * (trunk + out))
    assert (heads(torch.randn(4, Z)) == 0).all() and heads(torch.randn(2, 4, Z)).shape == (2, 4, G, K)
    weights = [module.layers[0][0].weight for module in (heads, again, other)]
    assert torch.equal(*weights[:2]) and not torch.equal(*weights[1:]) and 0.015 < weights[0].std() < 0.025
    assert make_auxiliary(MultiGammaConfig(True, ("primary", 0.9), hidden_layers=2), world(), 0.99).heads.layers[0][1].out_features == 16


def test_linear_heads_flatten_latents_where_values_are_all_the_same():
    """Why hidden layers are there: with targets of one number, what a linear head asks of the latent is to be one point."""
    spread = {}
    for hidden in ((), (64, 64)):
        torch.manual_seed(0)
        encoder, heads = MLP(8, [64], 32, SimNorm(8)), ValueHeads(32, 101, 2, True, hidden)
        init_weights(encoder, torch.Generator().manual_seed(0))
        optimizer = torch.optim.Adam([{"params": encoder.parameters(), "lr": 1e-4}, {"params": heads.parameters(), "lr": 3e-4}])
        two_hot, obs = TwoHot(101), torch.randn(128, 8)
        begin = encoder(obs).std(0).mean().item()
        for _ in range(400):
            loss = two_hot.loss(heads(encoder(obs)), torch.zeros(128, 2)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        spread[hidden] = encoder(obs).std(0).mean().item() / begin
    assert spread[()] < 0.05 and spread[64, 64] > 0.5, spread


def test_slow_heads_are_a_copy_that_learns_nothing():
    auxiliary = values()
    assert all(parameter.requires_grad for parameter in auxiliary.heads.parameters())
    assert not any(parameter.requires_grad for parameter in auxiliary.slow.parameters())
    disturbed(auxiliary.heads)
    assert all((parameter == 0).all() for parameter in auxiliary.slow.parameters())
    assert values(slow=False).slow is None


@pytest.mark.parametrize(("head", "bootstrap"), [("joint", "self"), ("separate", "primary")])
def test_made_as_configured(head, bootstrap):
    config = MultiGammaConfig(enabled=True, gammas=(0.99, *GAMMAS), head=head, bootstrap=bootstrap)
    auxiliary = make_auxiliary(config, world(), 0.99)
    assert auxiliary.gammas == GAMMAS and auxiliary.discounts.tolist() == pytest.approx(GAMMAS)
    assert (auxiliary.slow is None) == (bootstrap == "primary")
    assert auxiliary.heads(torch.randn(2, Z)).shape == (2, G, K) and len(auxiliary.heads.layers) == (1 if head == "joint" else G)
    assert not any("discounts" in name for name in auxiliary.state_dict())


@pytest.mark.parametrize(
    "config", [MultiGammaConfig(), MultiGammaConfig(gammas=("primary", 0.9)), MultiGammaConfig(enabled=True, gammas=("primary",))]
)
def test_none_where_there_is_nothing_to_learn(config):
    assert make_auxiliary(config, world(), 0.99) is None


def test_the_first_discount_is_the_tasks():
    config = MultiGammaConfig(enabled=True, gammas=(0.99, 0.9))
    assert make_auxiliary(config, world(), 0.99 + 5e-7) is not None
    with pytest.raises(ConfigError, match=r"multi_gamma\.gammas: the first"):
        make_auxiliary(config, world(), 0.99 + 2e-6)


def test_no_auxiliary_discount_twice():
    with pytest.raises(ConfigError, match="different"):
        make_auxiliary(MultiGammaConfig(enabled=True, gammas=("primary", 0.9, 0.9)), world(), 0.99)


def test_an_auxiliary_discount_may_be_the_tasks_own():
    """Lists of discounts fit tasks of any length; a value of states at the task's discount is no critic of actions."""
    assert make_auxiliary(MultiGammaConfig(enabled=True, gammas=("primary", 0.99, 0.9)), world(), 0.99).gammas == (0.99, 0.9)


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("value", ["q", "v"])
def test_slow_heads_follow_with_the_slow_critics(value, slow):
    model = world(value=value)
    model.auxiliary = values(slow=slow)
    disturbed(model)
    critics = "target_q" if value == "q" else "target_v"
    copies = {critics: value} | ({"auxiliary.slow": "auxiliary.heads"} if slow else {})
    assert model.slow_copies == copies
    before = {name: part.clone() for name, part in model.named_parameters()}
    model.update_target(torch.tensor(0.25))
    for name, part in model.named_parameters():
        copied = next((name.replace(copy, fast, 1) for copy, fast in copies.items() if name.startswith(f"{copy}.")), None)
        expected = before[name] if copied is None else 0.75 * before[name] + 0.25 * before[copied]
        assert_close(part, expected, msg=name)


@pytest.mark.parametrize("other", [None, {"gammas": (0.5, 0.97, 0.9)}, {"gammas": (0.5, 0.9)}, {"joint": False}, {"slow": False}], ids=str)
def test_records_tell_different_heads_apart(other):
    own, record = values(), record_of(None if other is None else values(**other))
    check_record(own, record_of(values()))
    check_record(None, None)
    with pytest.raises(ValueError, match="multi_gamma"):
        check_record(own, record)
    if record is not None:
        with pytest.raises(ValueError, match="the agent none"):
            check_record(None, record)


def test_records_are_plain():
    linear = {"gammas": list(GAMMAS), "head": "joint", "hidden_layers": 0, "bootstrap": "self"}
    assert record_of(values()) == linear
    assert record_of(values(joint=False, slow=False)) == linear | {"head": "separate", "bootstrap": "primary"}
    assert record_of(values(hidden=[8, 8])) == linear | {"hidden_layers": 2}
