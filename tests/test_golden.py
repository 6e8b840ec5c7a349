"""Agreement with the reference implementation, number by number. Tolerances: ``golden/README.md``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests import golden_data as golden
from worldmpc import losses
from worldmpc.models import heads, kernels, native, two_hot
from worldmpc.models.nets import SimNorm
from worldmpc.models.official import load_official
from worldmpc.planners import rollout_return
from worldmpc.types import Noise, PlanState


def close(ours: Tensor, theirs: Tensor, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    """Compare up to the trailing axis of one that the reference keeps on scalars."""
    assert_close(ours.reshape(theirs.shape), theirs, rtol=rtol, atol=atol)


@pytest.fixture(autouse=True, params=["by size", "native", "torch"])
def _arithmetic(request, monkeypatch) -> None:
    """The recorded networks are small: without this, the library that evaluates larger batches would not be checked."""
    if request.param == "native":
        if isinstance(native.library(), str):
            pytest.skip(native.library())
        monkeypatch.setattr(kernels, "NATIVE_FROM", 1)
    if request.param == "torch":
        monkeypatch.setattr(kernels, "NATIVE_FROM", 1 << 60)


@pytest.fixture(params=golden.SETS)
def name(request) -> str:
    return request.param


def first_two(agent, **eps: Tensor) -> Noise:
    """Noise of an update that uses critics 0 and 1 and the given policy noise, 0 by default."""
    specs = agent.objectives.noise_specs(3, 8)
    noise = {key: torch.zeros(spec.shape) for key, spec in specs.items()}
    return noise | {"td_critics": torch.tensor([0, 1]), "pi_critics": torch.tensor([0, 1])} | eps


# Maths.


def test_symlog_and_symexp():
    arrays = golden.load("math")
    close(two_hot.symlog(arrays["in/x"]), arrays["symlog"])
    close(two_hot.symexp(arrays["in/sym"]), arrays["symexp_of_sym"])


def test_two_hot():
    arrays, head = golden.load("math"), two_hot.TwoHot()
    x, logits = arrays["in/x"].squeeze(-1), arrays["in/logits"]
    close(head.encode(x), arrays["two_hot"])
    close(head.decode(logits), arrays["two_hot_inv"])
    close(head.loss(logits, x), arrays["soft_ce"], atol=1e-3)
    close(-(head.encode(x) * logits.log_softmax(-1)).sum(-1), arrays["soft_ce"], atol=1e-3)


def test_log_std():
    arrays = golden.load("math")
    raw = torch.cat((torch.zeros_like(arrays["log_std_in"]), arrays["log_std_in"]), -1)
    close(heads.split_gaussian(raw, -10, 2)[1], arrays["log_std"])


def test_simnorm():
    arrays = golden.load("math")
    close(SimNorm(8, "consecutive")(arrays["in/simnorm"]), arrays["simnorm"])


@pytest.mark.parametrize("suffix", ["", "256"])
def test_running_scale(suffix):
    arrays = golden.load("math")
    scale = torch.ones(())
    for values, expected in zip(arrays[f"in/scale_x{suffix}"], arrays[f"scale_values{suffix}"], strict=True):
        scale = losses.update_scale(scale, values.squeeze(-1), 0.01)
        close(scale, expected)


def test_termination_statistics():
    arrays = golden.load("math")
    rate, f1 = losses.termination_statistics(torch.logit(arrays["in/ts_pred"]), arrays["in/ts_target"])
    close(rate, arrays["ts_rate"])
    close(f1, arrays["ts_f1"])


def test_gumbel_choice():
    arrays = golden.load("math")
    chosen = (arrays["in/gumbel_p"] / arrays["in/gumbel_expo"]).argmax(-1)
    assert torch.equal(chosen, arrays["gumbel_idx"])


# Forward passes.


@torch.no_grad()
def test_forward(name):
    arrays, agent, batch = golden.load(name), golden.agent(name), golden.batch(name)
    model, two = agent.model, torch.tensor([0, 1])
    z = model.encode(batch.obs)
    close(z, arrays["fwd/z"])
    step = model.step(z[:-1], batch.action)
    close(step.z, arrays["fwd/next_z"])
    close(step.reward, arrays["fwd/reward"])
    close(model.reward(torch.cat((z[:-1], batch.action), -1)), arrays["fwd/reward_logits"])
    close(model.q_logits(z[:-1], batch.action), arrays["fwd/q_logits"])
    close(model.q_values(z[:-1], batch.action), arrays["fwd/q_values"])
    close(model.target_q_values(z[:-1], batch.action), arrays["fwd/target_q_values"])
    close(model.q_values(z[:-1], batch.action, two).mean(0), arrays["fwd/q_avg_h01"])
    close(model.target_q_values(z[:-1], batch.action, two).amin(0), arrays["fwd/target_q_min_h01"])
    if agent.terminates:
        close(model.termination_logit(z), arrays["fwd/termination_logits"])
        close(torch.sigmoid(model.termination_logit(z)), arrays["fwd/termination_prob"])
        close(step.cont, 1 - (torch.sigmoid(model.termination_logit(step.z)) > 0.5).float())
    else:
        assert (step.cont == 1).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pi_eps0", "pi_eps"])
def test_policy(name, kind):
    arrays, model = golden.load(name), golden.agent(name).model
    eps = arrays["in/eps_z"] * (kind == "pi_eps")
    sample = model.policy(arrays["fwd/z"], eps)
    for field in ("action", "mean", "log_std", "log_prob", "entropy", "scaled_entropy"):
        close(getattr(sample, field), arrays[f"fwd/{kind}/{field}"], rtol=1e-4)
    close(model.propose(arrays["fwd/z"], eps), sample.action)


@pytest.mark.parametrize("kind", ["td_target_eps0_h01", "td_target_eps"])
def test_td_target(name, kind):
    arrays, agent, batch = golden.load(name), golden.agent(name), golden.batch(name)
    noise = first_two(agent)
    if kind == "td_target_eps":
        noise |= {"td_policy": arrays["in/eps_td"], "td_critics": arrays["in/perm_td"][:2]}
    z = arrays["fwd/z"]
    target, _ = losses.value_targets(agent.config.value, agent.model, z[:-1], z[1:], batch, agent.discount, noise)
    close(target, arrays[f"fwd/{kind}"])


# Planning.


@torch.no_grad()
def test_rollout_return(name):
    arrays, agent = golden.load(name), golden.agent(name)
    z = agent.model.encode(arrays["plan/obs"])
    close(z, arrays["plan/z"])
    actions = arrays["plan/ev_actions"]
    values = rollout_return(agent.model, z.expand(16, -1), actions, agent.discount, torch.zeros(16, 3), torch.tensor([0, 1]))
    close(values, arrays["plan/ev_value_eps0_h01"])


@pytest.mark.parametrize("call", ["A", "B"])
def test_plan(name, call):
    """Call A: evaluation at the start of an episode. Call B: exploration with a warm start."""
    arrays, agent = golden.load(name), golden.agent(name)
    z = agent.model.encode(arrays["plan/obs"])
    noise = {
        "proposal": arrays["plan/in_eps_rollout_AB"][:, None],
        "samples": arrays["plan/in_r"][:, :, None],
        "terminal": torch.zeros(2, 1, 16, 3),
        "critics": torch.tensor([[0, 1], [0, 1]]),
        "elite": arrays[f"plan/in_expo_{call}"][None],
        "action": torch.zeros(1, 3),
    }
    state = agent.planner.init(1, torch.device("cpu"))
    if call == "B":
        noise["terminal"], noise["critics"] = arrays["plan/in_eps_terminal_B"][:, None], arrays["plan/in_perms_B"][:, :2]
        noise["action"] = arrays["plan/in_action_noise_B"][None]
        previous = arrays["plan/in_prev_mean_B"]
        mean = torch.cat((previous[1:], torch.zeros_like(previous[:1])))[None]
        state = PlanState(mean, mean[:, None][:, :0])
    plan = agent.planner.plan(agent.model, z, state, noise, call == "B")
    last = f"plan/{call}/iter1"
    close(plan.mean[0], arrays[f"{last}/mean"], rtol=1e-4)
    close(plan.mean[0], arrays[f"plan/{call}/new_prev_mean"], rtol=1e-4)
    close(plan.std[0], arrays[f"{last}/std"], rtol=1e-4)
    chosen = int(arrays[f"plan/{call}/selected_elite"])
    row = int(arrays[f"{last}/elite_idxs"][chosen])
    close(plan.value[0], arrays[f"{last}/value"][row], rtol=1e-4)
    close(plan.elite[0], arrays[f"{last}/actions"][0, row], rtol=1e-4)
    close(plan.action[0], arrays[f"plan/{call}/action"], rtol=1e-4)


# Updates.


def check_parameters(agent, expected: dict[str, Tensor]) -> None:
    """Adam's first step is about lr * sign(gradient), so that gradients near 0 are sensitive to rounding."""
    state = agent.model.state_dict()
    assert expected.keys() == state.keys()
    error = torch.cat([(state[key] - value).abs().flatten() for key, value in expected.items()])
    assert error.max() < 1e-4
    assert error.quantile(0.999) < 1e-6


def check_metrics(metrics: dict[str, Tensor], arrays: dict[str, Tensor], prefix: str) -> None:
    for key, expected in arrays.items():
        if key.startswith(prefix):
            ours = key.removeprefix(prefix)
            if ours in ("termination_rate", "termination_f1", "termination_loss") and ours not in metrics:
                assert expected == 0, key
                continue
            close(metrics[ours], expected, rtol=1e-4)


def test_gradients(name):
    arrays, agent, batch = golden.load(f"{name}_grads"), golden.agent(name), golden.batch(name)
    noise = first_two(agent)
    loss, zs, _ = agent.objectives.model_loss(batch, noise)
    gradients = agent.learner.model_optimizer.split(agent.learner.model_optimizer.gradients(loss))
    expected = {key: value for key, value in golden.parameters(arrays, "update/grad/").items() if not key.startswith("pi.")}
    assert expected.keys() == set(agent.learner.model_optimizer.names)
    for key, gradient in zip(agent.learner.model_optimizer.names, gradients, strict=True):
        close(gradient, expected[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("file", "prefix", "steps"),
    [("", "update", 1), ("_update2steps", "update2", 2), ("_update_eps", "update_eps", 1), ("_update_clip", "update_clip", 1)],
)
def test_update(name, file, prefix, steps):
    arrays, batch = golden.load(name + file), golden.batch(name)
    overrides = {"optim.grad_clip_norm": 0.05} if prefix == "update_clip" else {}
    agent = golden.agent(name, **overrides)
    noise = first_two(agent)
    if prefix == "update_eps":
        recorded = golden.load(name)
        noise |= {"td_policy": recorded["in/eps_td"], "td_critics": recorded["in/perm_td"][:2]}
        noise |= {"pi_policy": recorded["in/eps_z"], "pi_critics": recorded["in/perm_pi"][:2]}
    for step in range(steps):
        check_metrics(agent.update_with_noise(batch, noise), arrays, f"{prefix}/info{step}/")
    close(agent.learner.scale, arrays[f"{prefix}/scale"])
    check_parameters(agent, golden.parameters(arrays, f"{prefix}/after/"))


def test_policy_gradients(name):
    """The policy's gradient is taken after the model's step, so it is checked through one whole update."""
    arrays, agent, batch = golden.load(f"{name}_grads"), golden.agent(name), golden.batch(name)
    noise = first_two(agent)
    captured = {}
    original = agent.learner.policy_optimizer.gradients

    def capture(loss):
        gradients = original(loss)
        captured.update(
            zip(
                agent.learner.policy_optimizer.names,
                agent.learner.policy_optimizer.split([gradient.clone() for gradient in gradients]),
                strict=True,
            )
        )
        return gradients

    agent.learner.policy_optimizer.gradients = capture
    agent.update_with_noise(batch, noise)
    expected = {key: value for key, value in golden.parameters(arrays, "update/grad/").items() if key.startswith("pi.")}
    assert expected.keys() == captured.keys()
    for key, value in expected.items():
        close(captured[key], value, rtol=1e-4, atol=1e-6)


# Published checkpoints.


@torch.no_grad()
@pytest.mark.parametrize("kind", ["new", "old"])
def test_load_official(name, kind):
    arrays, batch = golden.load(name), golden.batch(name)
    model = load_official(golden.FOLDER / f"{name}_ckpt_{kind}.pt")
    z = model.encode(batch.obs)
    close(z, arrays["fwd/z"])
    step = model.step(z[:-1], batch.action)
    close(step.z, arrays["fwd/next_z"])
    close(step.reward, arrays["fwd/reward"])
    close(model.q_values(z[:-1], batch.action), arrays["fwd/q_values"])
    close(model.target_q_values(z[:-1], batch.action), arrays["fwd/target_q_values"])
    sample = model.policy(z, arrays["in/eps_z"])
    close(sample.action, arrays["fwd/pi_eps/action"])
    close(sample.mean, arrays["fwd/pi_eps/mean"])
    close(sample.log_std, arrays["fwd/pi_eps/log_std"])
    assert (model.termination is not None) == (name == "tiny_episodic")
