"""TD-MPC2 on one-hot actions: a categorical prior, its objective in closed form, every planner, checkpoints and stacks."""

from __future__ import annotations

import pytest
import torch

from worldmpc import losses
from worldmpc.agents.stack import Stack
from worldmpc.agents.tdmpc2 import TDMPC2
from worldmpc.config import make_config
from worldmpc.noise import NoiseStream
from worldmpc.types import EnvSpec, SequenceBatch

SPEC = EnvSpec("x", (4,), 3, 50, discrete=True)


def make(seed=1, **overrides) -> TDMPC2:
    return TDMPC2(make_config("debug", seed=seed, **overrides), SPEC)


def batch_of(length=3, batch_size=8, seed=0) -> SequenceBatch:
    generator = torch.Generator().manual_seed(seed)
    choices = torch.randint(3, (length, batch_size), generator=generator)
    return SequenceBatch(
        obs=torch.randn(length + 1, batch_size, 4, generator=generator),
        action=torch.eye(3)[choices],
        reward=torch.randn(length, batch_size, generator=generator),
        terminated=torch.zeros(length, batch_size),
        truncated=torch.zeros(length, batch_size),
        mask=torch.ones(length, batch_size),
        index=torch.zeros(length, batch_size, dtype=torch.int64),
    )


@pytest.mark.parametrize("mode", ["explore", "eval", "prior"])
def test_actions_are_one_hot(mode):
    agent = make()
    output = agent.act(agent.init_carry(5), torch.randn(5, 4), mode)
    assert output.action.shape == (5, 3) and set(output.action.unique().tolist()) <= {0.0, 1.0} and (output.action.sum(-1) == 1).all()


def test_prior_samples_its_own_probabilities_and_evaluates_by_its_mode():
    model = make().model
    with torch.no_grad():
        for parameter in model.pi.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    z = model.encode(torch.randn(1, 4))
    eps = NoiseStream(0, "x").generator
    samples = model.propose(z.expand(20_000, -1), torch.randn(20_000, 3, generator=eps)).mean(0)
    probs = model.action_probs(z)[0]
    torch.testing.assert_close(samples, probs, atol=0.02, rtol=0)  # about six standard errors
    assert model.propose(z, torch.zeros(1, 3)).argmax() == probs.argmax()


def test_policy_learns_the_boltzmann_distribution_of_values():
    agent = make()
    model, zs = agent.model, torch.softmax(torch.randn(4, 8, 16), -1)
    noise = {"pi_critics": torch.tensor([1, 0])}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    loss, metrics = losses.DISCRETE["max_q"](model, zs, batch_of(), torch.tensor(2.0), losses.Coefficients(0.5, 0.1, 0.01), noise)
    values = torch.stack([model.q_values(zs, torch.eye(3)[choice].expand(4, 8, 3)).mean(0) for choice in range(3)], -1)
    best = (values / (0.1 * metrics["pi_scale"])).exp()
    best = best / best.sum(-1, keepdim=True)
    logits = model.pi(zs)
    by_hand = -(best * torch.log_softmax(logits, -1)).sum(-1) * 0.5 ** torch.arange(4)[:, None]
    torch.testing.assert_close(loss, by_hand.mean())
    gradients = torch.autograd.grad(loss, list(model.pi.parameters()) + list(model.q.parameters()), allow_unused=True)
    count = len(list(model.pi.parameters()))
    assert all(gradient is not None for gradient in gradients[:count]) and all(gradient is None for gradient in gradients[count:])
    # It is what maximises the published objective: nothing in its neighbourhood is better.
    scale = metrics["pi_scale"]

    def objective(probs):
        return (probs * values).sum(-1) / scale - 0.1 * torch.xlogy(probs, probs).sum(-1)

    for seed in range(20):
        other = torch.softmax(best.log() + 0.05 * torch.randn(best.shape, generator=torch.Generator().manual_seed(seed)), -1)
        assert (objective(other) <= objective(best) + 1e-6).all()


@pytest.mark.parametrize("entropy_coef", [0.0, 1e-4, 1e-2])
def test_a_policy_that_is_sure_of_the_wrong_choice_changes_its_mind(entropy_coef):
    agent = make()
    model, zs, coefs = agent.model, torch.softmax(torch.randn(4, 8, 16), -1), losses.Coefficients(0.5, entropy_coef, 0.01)
    logits = torch.full((4, 8, 3), -20.0, requires_grad=True)
    sure = torch.eye(3)[0] * 40 + logits
    model.pi.forward = lambda z: sure[: z.shape[0]]
    values = torch.tensor([0.0, 1.0, 0.5])
    model.choice_values = lambda z, critics: values.expand(2, *z.shape[:-1], 3)
    loss, _ = losses.DISCRETE["max_q"](model, zs, batch_of(), torch.tensor(1.0), coefs, {"pi_critics": torch.tensor([1, 0])})
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[0, :, 0] > 0.9 / 32).all() and (gradient[0, :, 1] < -0.9 / 32).all()  # of 32 rows, the sure one down, the best up


def test_values_are_expected_over_all_choices():
    agent = make()
    model, batch = agent.model, batch_of()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    batch = batch._replace(terminated=(torch.arange(24).reshape(3, 8) % 5 == 0).float())
    critics, noise = torch.tensor([1, 0]), {"td_critics": torch.tensor([1, 0]), "td_policy": torch.zeros(3, 8, 3)}
    z = model.encode(batch.obs[1:])
    probs = torch.softmax(model.pi(z), -1)
    fast, slow = torch.zeros(3, 8), torch.zeros(3, 8)
    for choice in range(3):
        action = torch.eye(3)[choice].expand(3, 8, 3)
        fast = fast + probs[..., choice] * model.q_values(z, action, critics).mean(0)
        slow = slow + probs[..., choice] * model.target_q_values(z, action, critics).amin(0)
    for eps in (torch.zeros(3, 8, 3), torch.randn(3, 8, 3)):
        torch.testing.assert_close(model.terminal_value(z, eps, critics), fast)
    targets, _ = losses.value_targets(agent.config.value, model, z, z, batch, 0.9, noise)
    torch.testing.assert_close(targets, batch.reward + 0.9 * (1 - batch.terminated) * slow)


def test_evaluation_executes_the_most_likely_choice_and_exploration_draws():
    agent = make()
    carry, obs = agent.init_carry(64), torch.randn(1, 4).expand(64, -1)
    for _ in range(3):
        output = agent.act(carry, obs, "eval")
        carry = output.carry
        assert (output.extras["plan_mean"].argmax(-1) == output.action.argmax(-1)).all()
    drawn = agent.act(carry, obs, "explore")
    assert (drawn.extras["plan_mean"].argmax(-1) != drawn.action.argmax(-1)).any()


def test_updates_repeat_and_survive_saving():
    agent, other = make(), make()
    for seed in range(3):
        agent.update(batch_of(seed=seed))
    other.load_state_dict(agent.state_dict())
    one, two = agent.update(batch_of(seed=9)), other.update(batch_of(seed=9))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_stacked_seeds_equal_solo_ones():
    solo, stacked = [make(seed) for seed in (1, 2)], [make(seed) for seed in (1, 2)]
    stack = Stack(stacked)
    for step in range(3):
        batches = [batch_of(seed=10 * step + index) for index in range(2)]
        alone = [agent.update(batch) for agent, batch in zip(solo, batches, strict=True)]
        together = stack.update(batches)
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(other["total_loss"], one["total_loss"], rtol=1e-4, atol=1e-5)
    stack.batched_acting = True
    obs = [torch.randn(2, 4) for _ in stacked]
    answers = stack.act([agent.init_carry(2) for agent in stacked], obs)
    for agent, own, answer in zip(solo, obs, answers, strict=True):
        torch.testing.assert_close(answer.action, agent.act(agent.init_carry(2), own, "explore").action)


@pytest.mark.parametrize("name", ["mppi", "cem", "icem", "random_shooting", "policy_guided", "diffusion", "mcts"])
def test_every_planner_in_the_latent_space(name):
    agent = make(**{"planner.name": name, **({"planner.num_simulations": 8} if name == "mcts" else {})})
    carry = agent.init_carry(2)
    for mode in ("explore", "eval"):
        output = agent.act(carry, torch.randn(2, 4), mode)
        assert (output.action.sum(-1) == 1).all() and output.extras["plan_value"].isfinite().all()
        carry = output.carry
