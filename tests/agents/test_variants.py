"""Relatives of TD-MPC2: every combination of slots acts, learns, stacks and goes on; what is off changes nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from tests.agents.test_stack import assert_same_state
from tests.agents.test_tdmpc2 import SPEC, make_batch
from tests.trees import differences
from worldmpc import functional
from worldmpc.agents.stack import Stack
from worldmpc.agents.tdmpc2 import TDMPC2
from worldmpc.config import ConfigError, make_config, updates_worth
from worldmpc.losses import BOX, DISCRETE
from worldmpc.models import kernels
from worldmpc.models.auxiliary import make_auxiliary

CHOICES = dataclasses.replace(SPEC, action_dim=3, discrete=True)
GAMMAS = {"multi_gamma.enabled": True, "multi_gamma.gammas": ["primary", 0.9, 0.995]}
STATES = {"model.value": "v", "model.policy": "clipped", "policy.objective": "kl_to_planner"}
VARIANTS = {
    "tdmpc_square": {"agent": "tdmpc_square", "policy.scale_threshold": 0.0},
    "boom": {"agent": "boom", "policy.scale_threshold": 0.0},
    "bmpc": {"agent": "bmpc", "reanalyze.interval": 2, "policy.skip_seed_updates": False},
    "bmpc, long targets": {"agent": "bmpc", "value.td_horizon": 3, "policy.skip_seed_updates": False},
    "state values, td": {**STATES, "value.target": "td"},
    "bc": {"policy.objective": "bc", "model.value": "v"},
    "max_q+bc": {"policy.objective": "max_q+bc"},
    "awac": {"policy.objective": "awac", "model.policy": "clipped"},
    "n_step": {"value.target": "n_step"},
    "td_lambda": {"value.target": "td_lambda", "value.bootstrap": "mean"},
    "model": {"value.target": "model", "value.td_horizon": 2},
    "multi_gamma self": GAMMAS,
    "multi_gamma primary": {**GAMMAS, "multi_gamma.bootstrap": "primary", "multi_gamma.head": "separate"},
    "multi_gamma hidden": {**GAMMAS, "multi_gamma.hidden_layers": 2},
    "dynamics": {"model.num_dynamics": 2, "planner.uncertainty_coef": 0.5},
    "resets": {"train.reset_every": 2},
}
BOX_ALONE = {"boom", "max_q+bc"}
CASES = [(name, spec) for name in VARIANTS for spec in (SPEC, CHOICES) if spec is SPEC or name not in BOX_ALONE]


def make(name, spec=SPEC, **overrides):
    """An agent whose networks say something, as untrained ones value everything alike."""
    over = {"seed": 1, "env.discount": 0.97, "optim.lr": 1e-3, **VARIANTS[name], **overrides}
    if spec.discrete and over.get("model.policy") == "clipped":
        del over["model.policy"]
    agent = TDMPC2(make_config("debug", **over), spec)
    generator = torch.Generator().manual_seed(agent.config.seed)
    with torch.no_grad():
        for part, parameter in agent.model.named_parameters():
            if part.split(".")[0] in ("reward", "q", "target_q", "v", "target_v", "auxiliary"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return agent


def batch_for(agent, seed=0):
    """Windows with a termination, padding behind an end, random decisions without a plan, and plans."""
    batch = make_batch(seed=seed)
    generator = torch.Generator().manual_seed(seed + 100)
    dim = agent.spec.action_dim
    action = torch.rand(3, 8, dim, generator=generator) * 2 - 1
    mean = action.clone()
    if agent.spec.discrete:
        action = torch.eye(dim)[torch.randint(dim, (3, 8), generator=generator)]
        mean = torch.rand(3, 8, dim, generator=generator)
        mean = mean / mean.sum(-1, keepdim=True)
    terminated, mask = batch.terminated.clone(), batch.mask.clone()
    terminated[0, 1] = 1
    mask[1:, 1] = 0
    extras = {"plan_mean": mean, "plan_elite": action.clone(), "plan_std": torch.full((3, 8, dim), 0.3), "plan_value": torch.zeros(3, 8)}
    for value in extras.values():
        value[:, 5] = torch.nan
        value[1:, 1] = 0
    return batch._replace(action=action, terminated=terminated, mask=mask, extras=extras)


@pytest.mark.parametrize(("name", "spec"), CASES, ids=[f"{name}-{'discrete' if spec.discrete else 'box'}" for name, spec in CASES])
def test_stacked_equals_solo_and_finite(name, spec):
    solo, stacked = ([make(name, spec, seed=seed) for seed in (3, 1)] for _ in range(2))
    stack = Stack(stacked)
    for step in range(3):
        batches = [batch_for(agent, step) for agent in solo]
        expected = [agent.update(batch) for agent, batch in zip(solo, batches, strict=True)]
        for theirs, ours in zip(expected, stack.update(batches), strict=True):
            assert theirs.keys() == ours.keys() and not theirs["skipped_updates"]
            for metric, value in theirs.items():
                assert value.isfinite(), metric
                assert_close(ours[metric], value, rtol=1e-3, atol=1e-4, msg=lambda text, metric=metric: f"{metric}: {text}")
    for one, two in zip(solo, stacked, strict=True):
        assert_same_state(one, two)
    obs = torch.randn(2, 5)
    for mode in solo[0].modes:
        answers = [agent.act(agent.init_carry(2), obs, mode) for agent in (solo[1], stacked[1])]
        assert answers[0].action.isfinite().all() and (answers[0].action.abs() <= 1).all()
        assert_close(answers[1].action, answers[0].action, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_state_goes_on(name):
    one, two = make(name), make(name, seed=2)
    one.update(batch_for(one))
    two.load_state_dict(one.state_dict())
    for agent in (one, two):
        agent.config = dataclasses.replace(agent.config, seed=1)
        agent.model.seed = 1
    metrics = [agent.update(batch_for(agent, 1)) for agent in (one, two)]
    assert not differences(*metrics) and not differences(one.state_dict(), two.state_dict())


def test_auxiliary_values_that_are_off_change_nothing():
    """Bit for bit: the same draws, parameters, and metrics, and no structures."""
    base = make("n_step")
    agent = make("n_step", **{"multi_gamma.enabled": True, "multi_gamma.gammas": [0.97], "multi_gamma.loss_weight": 9.0})
    assert agent.model.auxiliary is None and agent.state_dict()["multi_gamma"] is None
    assert agent.objectives.terms == base.objectives.terms and agent.learner.model_optimizer.names == base.learner.model_optimizer.names
    for step in range(2):
        assert not differences(*(one.update(batch_for(one, step)) for one in (base, agent)))
    assert not differences(base.state_dict(), agent.state_dict())


def test_auxiliary_values_leave_everything_else_as_it_begins():
    """Parameters and random draws of all other parts are those without auxiliary values, also after a first update."""
    agent = TDMPC2(make_config("debug", **{"seed": 1, "env.discount": 0.97, **GAMMAS}), SPEC)
    plain = TDMPC2(make_config("debug", **{"seed": 1, "env.discount": 0.97}), SPEC)
    theirs = agent.model.state_dict()
    assert not differences(plain.model.state_dict(), {name: value for name, value in theirs.items() if not name.startswith("auxiliary")})
    assert plain.objectives.noise_specs(3, 8) == agent.objectives.noise_specs(3, 8)
    obs = torch.randn(2, 5)
    answers = [one.act(one.init_carry(2), obs, "explore").action for one in (plain, agent)]
    assert torch.equal(*answers)
    for one in (plain, agent):
        one.update(batch_for(one))
    # Heads begin at 0: in the first update they learn, and what is below them does not feel them yet.
    ours, theirs = ({name: value for name, value in one.model.state_dict().items() if "auxiliary" not in name} for one in (plain, agent))
    assert not differences(ours, theirs) and agent.model.auxiliary.heads.layers[0].weight.abs().sum() > 0


def test_auxiliary_loss_reaches_encoder_and_dynamics_alone():
    agent = make("multi_gamma self")
    batch = batch_for(agent)
    for name in list(agent.objectives.weights):
        agent.objectives.weights[name] = 1.0 if name == "aux_value" else 0.0
    loss, _, _ = agent.objectives.model_loss(batch, agent.streams["update"].draw(agent.objectives.noise_specs(3, 8)))
    loss.backward()
    reached = {
        name.split(".")[0] for name, value in agent.model.named_parameters() if value.grad is not None and value.grad.abs().sum() > 0
    }
    assert reached == {"encoder", "dynamics", "auxiliary"}


def test_checkpoints_say_which_auxiliary_values_they_hold():
    with_heads, without = make("multi_gamma self"), make("n_step")
    record = with_heads.state_dict()["multi_gamma"]
    assert record == {"gammas": [0.9, 0.995], "head": "joint", "hidden_layers": 0, "bootstrap": "self"}
    del record["hidden_layers"]  # as checkpoints were before there was a choice
    with_heads.load_state_dict(with_heads.state_dict() | {"multi_gamma": record})
    with pytest.raises(ValueError, match="'hidden_layers': 2"):
        with_heads.load_state_dict(with_heads.state_dict() | {"multi_gamma": record | {"hidden_layers": 2}})
    old = without.state_dict()
    del old["multi_gamma"]
    without.load_state_dict(old)
    with pytest.raises(ValueError, match="multi_gamma: the checkpoint has no auxiliary values, the agent .*0.995"):
        with_heads.load_state_dict(old)
    with pytest.raises(ValueError, match="multi_gamma: the checkpoint has .*0.995.*, the agent none"):
        without.load_state_dict(with_heads.state_dict())


@pytest.mark.parametrize(
    ("gammas", "message"),
    [
        ([], "multi_gamma.gammas: empty although enabled"),
        ([0.9, 0.8], "multi_gamma.gammas: the first discount must be the task's, 0.97, got 0.9; write primary"),
        ([0.97 + 2e-6, 0.8], "the first discount must be the task's, 0.97, got 0.970002"),
        (["primary", 1.0], r"expected discounts in \(0, 1\), got 1"),
        (["primary", -0.1], r"expected discounts in \(0, 1\), got -0.1"),
        (["primary", 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "at most 6 discounts, got 7"),
        (["primary", 0.9, 0.9], "expected different auxiliary discounts"),
        (["primary", "primary"], "expected different auxiliary discounts"),
    ],
)
def test_discounts_that_cannot_be(gammas, message):
    with pytest.raises(ConfigError, match=message):
        make("n_step", **{"multi_gamma.enabled": True, "multi_gamma.gammas": gammas})


def test_first_discount_may_be_a_number():
    agent = make("n_step", **{"multi_gamma.enabled": True, "multi_gamma.gammas": [0.97 + 5e-7, 0.8]})
    assert agent.model.auxiliary.gammas == (0.8,)
    assert make_auxiliary(agent.config.multi_gamma, agent.model, 0.97).gammas == (0.8,)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.value": "v"}, "model.value: policy.objective=max_q needs values of actions.*policy.objective=kl_to_planner or bc"),
        ({"model.value": "v", "policy.objective": "awac"}, "policy.objective=awac needs values of actions"),
        ({"reanalyze.interval": 5}, "reanalyze.interval: policy.objective=max_q uses no stored plan"),
        ({"agent": "bmpc", "reanalyze.batch_size": 9}, r"reanalyze.batch_size: expected at most loss.batch_size \(8\), got 9"),
        ({"agent": "bmpc", "reanalyze.log_std_max": -3.0}, "reanalyze.log_std_max: expected more than log_std_min"),
        ({"agent": "bmpc", "planner.mpc": False}, "planner.mpc: policy.objective=kl_to_planner learns from plans"),
        ({"policy.objective": "kl_to_planner"}, "model.policy: .*closed form.*model.policy=clipped"),
        ({"planner.uncertainty_coef": 0.1}, "planner.uncertainty_coef: one dynamics model has no spread; use model.num"),
        ({"agent": "mbmpc", "planner.uncertainty_coef": 0.1}, "planner.uncertainty_coef: .* use dynamics=ensemble"),
        ({**GAMMAS, "value.target": "model", "multi_gamma.bootstrap": "primary"}, "multi_gamma.bootstrap: primary takes the bootstrap"),
        ({"policy.objective": "max_v"}, "policy.objective: expected one of max_q"),
        ({"value.target": "td_lambda", "value.lam": 1.5}, r"value.lam: expected in \[0, 1\]"),
        ({"value.lam": 0.5}, "value.lam: value.target=td never reads it; leave it out, or use value.target=td_lambda"),
        ({"agent": "bmpc", "value.n_step": 2}, "value.n_step: value.target=model never reads it"),
        ({"policy.prior_coef": 1.0}, r"policy.prior_coef: policy.objective=max_q never reads it; .* or max_q\+bc"),
        ({"policy.objective": "max_q+bc", "policy.scale_threshold": 1.0}, "policy.scale_threshold: .* never reads it"),
        ({"agent": "bmpc", "policy.awac_temperature": 1.0}, "policy.awac_temperature: .*use policy.objective=awac"),
        ({"reanalyze.batch_size": 5}, "reanalyze.batch_size: nothing is planned anew with reanalyze.interval=0"),
        ({"agent": "dqn", "policy.objective": "max_q"}, "policy.objective: agent=dqn never reads it"),
        ({"agent": "bmpc", "preset": "tuned"}, "preset: agent=bmpc has no tuned settings"),
    ],
)
def test_what_does_not_go_together(overrides, message):
    with pytest.raises(ConfigError, match=message):
        TDMPC2(make_config(**{"preset": "debug", **overrides}), SPEC).make_source(1, torch.Generator())


@pytest.mark.parametrize("objective", sorted(BOX.keys() - DISCRETE.keys()))
def test_objectives_of_box_actions_refuse_choices(objective):
    with pytest.raises(ConfigError, match=f"policy.objective: {objective.replace('+', '.')} is defined by distances"):
        TDMPC2(make_config("debug", **{"policy.objective": objective}), CHOICES)


@pytest.mark.parametrize(
    "how", [{}, {"multi_gamma.head": "separate"}, {"multi_gamma.bootstrap": "primary"}, {"multi_gamma.hidden_layers": 1}]
)
def test_auxiliary_values_with_products_in_bfloat16(how):
    """Linear heads too, which autocast leaves in bfloat16: losses are those of float32 within its rounding."""
    found = []
    for precision in ("fp32", "bf16"):
        agent = make("multi_gamma self", **{**how, "train.precision": precision})
        found.append(agent.update(batch_for(agent)))
        assert found[-1]["skipped_updates"] == 0
    assert found[0]["aux_value_loss"] != found[1]["aux_value_loss"]
    assert_close(found[1]["aux_value_loss"], found[0]["aux_value_loss"], rtol=0.01, atol=0.0)


@pytest.mark.parametrize(("decisions", "utd", "updates"), [(100, 0.29, 29), (2, 1.5, 3), (7, 0.5, 3)])
def test_the_seed_phase_is_worth_as_many_updates_as_the_source_does(decisions, utd, updates):
    """In floating point 100 * 0.29 is less than 29."""
    agent = make("bmpc", **{"policy.skip_seed_updates": True, "train.seed_decisions": decisions, "train.utd": utd})
    assert agent.learner.policy_from == updates_worth(decisions, utd) == updates


def test_policy_waits_for_plans():
    """Updates that the seed phase is worth leave the policy alone, later ones do not."""
    agent = make("bmpc", **{"policy.skip_seed_updates": True, "train.seed_decisions": 2, "train.utd": 1.5})
    assert agent.learner.policy_from == 3
    before = agent.model.pi[0].weight.clone()
    for step in range(4):
        metrics = agent.update(batch_for(agent, step))
        assert ("pi_loss" in metrics) == (step >= 3) == (not torch.equal(agent.model.pi[0].weight, before))


def test_compiled_equals_eager(monkeypatch):
    """Updates, plans and reanalysis through the compiler's front end; further ones must not compile again."""
    monkeypatch.setattr(functional, "COMPILE_BACKEND", "aot_eager")
    monkeypatch.setattr(kernels, "NATIVE_FROM", 1 << 60)
    obs = torch.randn(4, 5)

    def steps(agent, first):
        metrics = [agent.update(batch_for(agent, step)) for step in (first, first + 1)]
        return metrics[1], agent.act(agent.init_carry(2), obs[:2], "explore").action, agent.replan(obs)

    agents = [make("bmpc", compile=compiled, **GAMMAS) for compiled in (False, True)]
    assert_close(*(steps(agent, 0) for agent in agents[::-1]), rtol=1e-3, atol=1e-3)
    with torch.compiler.set_stance("fail_on_recompile"):
        steps(agents[1], 2)
