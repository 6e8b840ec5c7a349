"""The TD-MPC2 agent around the golden numbers: invariances, switches, and what must not leak."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from tests import golden_data as golden
from tests.trees import differences, leaves
from worldmpc import functional, losses
from worldmpc.agents.tdmpc2 import TDMPC2
from worldmpc.config import ConfigError, OptimConfig, discount_from_episode_length, make_config
from worldmpc.models import kernels
from worldmpc.optim import learning_rate_scale
from worldmpc.types import EnvSpec, SequenceBatch

SPEC = EnvSpec("test", (5,), 2, 50)


def make(spec=SPEC, **overrides):
    return TDMPC2(make_config("debug", **overrides), spec)


def make_batch(length=3, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    zeros = torch.zeros(length, size)
    return SequenceBatch(
        obs=torch.randn(length + 1, size, 5, generator=generator),
        action=torch.rand(length, size, 2, generator=generator) * 2 - 1,
        reward=torch.randn(length, size, generator=generator),
        terminated=zeros,
        truncated=zeros,
        mask=zeros + 1,
        index=zeros.long(),
    )


def test_model_loss_never_reaches_policy_or_targets():
    agent, batch = make(), make_batch()
    loss, _, _ = agent.objectives.model_loss(batch, agent.streams["update"].draw(agent.objectives.noise_specs(3, 8)))
    others = [p for name, p in agent.model.named_parameters() if name.startswith("pi.")]
    assert all(gradient is None for gradient in torch.autograd.grad(loss, others, allow_unused=True))
    learned = set(agent.learner.model_optimizer.names) | set(agent.learner.policy_optimizer.names)
    assert learned == {name for name, p in agent.model.named_parameters() if p.requires_grad}
    assert not set(agent.learner.model_optimizer.names) & set(agent.learner.policy_optimizer.names)


def test_padding_has_no_influence():
    """What stands behind an episode's end changes no parameter."""
    batches = []
    for seed in (1, 2):
        batch, junk = make_batch(), make_batch(seed=seed)
        mask = batch.mask.clone()
        mask[1:, :3], mask[2:, 3:5] = 0, 0
        gone = mask == 0
        batches.append(
            batch._replace(
                obs=torch.cat((batch.obs[:1], torch.where(gone[..., None], junk.obs[1:], batch.obs[1:]))),
                reward=torch.where(gone, junk.reward, batch.reward),
                terminated=torch.where(gone, (junk.reward > 0).float(), batch.terminated),
                mask=mask,
            )
        )
    agents = [make() for _ in batches]
    for agent, batch in zip(agents, batches, strict=True):
        agent.update(batch)
    assert differences(agents[0].state_dict(), agents[1].state_dict()) == []


def test_masked_steps_weigh_nothing():
    """A window whose last step is masked learns rewards like a shorter window does."""
    agent, batch = make(), make_batch()
    noise = agent.streams["update"].draw(agent.objectives.noise_specs(3, 8))
    cut = batch._replace(mask=torch.cat((torch.ones(2, 8), torch.zeros(1, 8))))
    _, _, long = agent.objectives.model_loss(cut, noise)
    short_noise = {name: value[:2] if name == "td_policy" else value for name, value in noise.items()}
    short_noise["q_keep"] = noise["q_keep"][:, :2]
    short = SequenceBatch(batch.obs[:3], *(value[:2] for value in batch[1:7]))
    _, _, expected = agent.objectives.model_loss(short, short_noise)
    for name in ("consistency_loss", "reward_loss", "value_loss"):
        assert_close(long[name] * 3 / 2, expected[name])


def test_bad_losses_change_nothing():
    agent = make()
    agent.update(make_batch())
    before = dict(leaves(agent.state_dict()))
    metrics = agent.update(make_batch()._replace(reward=torch.full((3, 8), torch.nan)))
    after = dict(leaves(agent.state_dict()))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert metrics["skipped_updates"] == 1 and not metrics["total_loss"].isfinite()
    assert all(name.startswith("streams.") or name in ("updates", "skipped") for name in changed)


def test_an_infinite_gradient_is_not_applied():
    agent = make()
    agent.objectives.terms["cliff"] = lambda model, rollout, batch, noise: (
        (rollout.zs[1:, :, 0] * 0).sqrt() * 1.0,
        {},
    )  # 0, with gradient 0 * inf
    agent.objectives.weights["cliff"] = 1.0
    before = dict(leaves(agent.state_dict()))
    metrics = agent.update(make_batch())
    assert metrics["total_loss"].isfinite() and not metrics["grad_norm"].isfinite() and metrics["skipped_updates"] == 1
    after = dict(leaves(agent.state_dict()))
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("model."))


def test_policy_learns_from_real_states_alone():
    """Latents behind an episode's end weigh nothing in the policy's loss."""
    agent = make()
    noise = agent.streams["update"].draw(agent.objectives.noise_specs(3, 8))
    zs, junk = agent.model.encode(torch.randn(4, 8, 5)).detach(), agent.model.encode(torch.randn(4, 8, 5)).detach()
    batch, mask, scale = make_batch(), torch.ones(3, 8), torch.ones(())
    mask[1:, :5] = 0
    cut = batch._replace(mask=mask)
    real = torch.cat((torch.ones(1, 8), mask))[..., None] > 0
    values = [agent.objectives.policy_loss(torch.where(real, zs, other), cut, scale, noise)[0] for other in (zs, junk)]
    assert torch.equal(*values) and not torch.equal(values[0], agent.objectives.policy_loss(zs, batch, scale, noise)[0])


def test_termination_statistics_look_at_the_last_real_step():
    """Half of the windows end early; a head that is right everywhere has an F1 score of 1."""
    agent, batch = make(), make_batch()
    mask, terminated = batch.mask.clone(), batch.terminated.clone()
    mask[1:, :4], terminated[0, :4], terminated[2, 4:6] = 0, 1, 1
    batch = batch._replace(mask=mask, terminated=terminated)
    agent.model.termination_logit = lambda z: (terminated * 2 - 1) * 5
    rollout = losses.roll(agent.model, batch, 0.9, 0.5, agent.streams["update"].draw(agent.objectives.noise_specs(3, 8)))
    metrics = losses.termination(agent.model, rollout, batch, {})[1]
    assert metrics["termination_f1"] == 1 and metrics["termination_rate"] == 6 / 8


@pytest.mark.parametrize("episodic", [True, False])
def test_state_continues_exactly(episodic):
    spec = dataclasses.replace(SPEC, can_terminate=episodic)
    agent, carry, obs = make(spec), None, torch.randn(2, 5)
    for seed in range(2):
        agent.update(make_batch(seed=seed))
    carry = agent.act(agent.init_carry(2), obs, "explore").carry
    resumed = make(spec, seed=1)
    resumed.load_state_dict(agent.state_dict())
    for one in (agent, resumed):
        one.update(make_batch(seed=7))
    assert differences(agent.state_dict(), resumed.state_dict()) == []
    assert torch.equal(agent.act(carry, obs, "explore").action, resumed.act(carry, obs, "explore").action)


def test_evaluation_repeats_and_disturbs_nothing():
    agent, obs = make(), torch.randn(3, 5)
    carry = agent.init_carry(3)
    actions = []
    for index in (4, 4, 5):
        agent.reset_eval_noise(index)
        actions.append(agent.act(carry, obs, "eval").action)
    assert torch.equal(actions[0], actions[1]) and not torch.equal(actions[0], actions[2])
    explored = agent.act(carry, obs, "explore").action
    assert torch.equal(explored, make().act(carry, obs, "explore").action)


def test_prior_acts_with_the_mean_of_the_policy():
    agent, obs = make(), torch.randn(3, 5)
    z = agent.model.encode(obs)
    expected = agent.model.policy(z, torch.zeros(3, 2)).mean
    assert_close(agent.act(agent.init_carry(3), obs, "prior").action, expected)
    plain = make(**{"planner.mpc": False})
    assert_close(plain.act(plain.init_carry(3), obs, "eval").action, expected)
    assert not torch.equal(plain.act(plain.init_carry(3), obs, "explore").action, expected)


def test_plan_records_describe_the_executed_plan():
    agent = make()
    output = agent.act(agent.init_carry(4), torch.randn(4, 5), "explore")
    shapes = {name: tuple(value.shape) for name, value in output.extras.items()}
    assert shapes == {"plan_mean": (4, 2), "plan_std": (4, 2), "plan_value": (4,), "plan_elite": (4, 2)}


@pytest.mark.parametrize(
    ("length", "expected"), [(500, 0.99), (1000, 0.995), (100, 0.95), (50, 0.95), (200, 0.975), (None, 0.99), (5000, 0.995), (1, 0.95)]
)
def test_discount_heuristic(length, expected):
    assert discount_from_episode_length(length) == pytest.approx(expected)
    assert make(dataclasses.replace(SPEC, episode_length=length)).discount == pytest.approx(expected)
    assert make(dataclasses.replace(SPEC, episode_length=length), **{"env.discount": 0.9}).discount == 0.9


def test_termination_head_follows_the_environment_unless_told():
    fixed = dataclasses.replace(SPEC, can_terminate=False)
    assert make().model.termination is not None and make(fixed).model.termination is None
    assert make(**{"model.termination": "off"}).model.termination is None
    assert make(fixed, **{"model.termination": "on"}).model.termination is not None


def test_learning_rate_schedules():
    warm = OptimConfig(schedule="warmup", warmup_updates=4)
    assert [learning_rate_scale(warm, update, 10) for update in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1, 1, 1]
    cosine = OptimConfig(schedule="cosine", warmup_updates=2, final_lr_scale=0.1)
    assert [learning_rate_scale(cosine, update, 12) for update in (0, 2, 7, 12, 99)] == pytest.approx([0.5, 1, 0.55, 0.1, 0.1])
    assert learning_rate_scale(OptimConfig(), 5, 10) == 1


def test_encoder_learns_at_its_own_rate_and_schedules_reach_the_optimiser():
    agent = make(**{"optim.schedule": "warmup", "optim.warmup_updates": 2, "optim.lr": 1e-3})
    agent.update(make_batch())
    assert [lr.item() for lr in agent.learner.model_optimizer.lrs] == pytest.approx(
        [1.5e-4, *[5e-4] * (len(agent.learner.model_optimizer.lrs) - 1)]
    )
    agent.update(make_batch())
    assert agent.learner.policy_optimizer.lrs[0].item() == pytest.approx(1e-3)


def test_terms_and_weights_must_agree():
    agent = make()
    agent.objectives.weights.pop("reward")
    with pytest.raises(ValueError, match="reward"):
        agent.update(make_batch())


def test_an_additional_loss_term_is_one_entry():
    agent, plain = make(), make()
    agent.objectives.terms["flat"] = lambda model, rollout, batch, noise: (rollout.zs[1:].square().mean(-1), {"flat_seen": torch.ones(())})
    agent.objectives.weights["flat"] = 0.0
    metrics = agent.update(make_batch())
    plain.update(make_batch())
    assert metrics["flat_loss"] > 0 and metrics["flat_seen"] == 1
    for name, value in plain.model.state_dict().items():
        assert_close(agent.model.state_dict()[name], value)


def test_only_vector_observations():
    with pytest.raises(ConfigError, match=r"observations of shape \[3, 64, 64\]"):
        make(dataclasses.replace(SPEC, obs_shape=(3, 64, 64)))


@pytest.mark.parametrize("from_rows", [1, 1 << 60])
def test_compiled_equals_eager(from_rows, monkeypatch):
    """One update and one plan through the compiler's front end; the next ones must not compile again.

    The code generator behind it takes minutes on two cores: ``benchmarks/compiled.py`` checks that.
    """
    monkeypatch.setattr(functional, "COMPILE_BACKEND", "aot_eager")
    monkeypatch.setattr(kernels, "NATIVE_FROM", from_rows)
    golden.check_compiled("tiny_episodic")
