"""What critics learn: targets of values, without gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from worldmpc.config import ValueConfig
from worldmpc.models.world_model import WorldModel
from worldmpc.noise import NoiseSpec
from worldmpc.types import Noise, SequenceBatch


def target_noise(config: ValueConfig, model: WorldModel, length: int, batch_size: int) -> dict[str, NoiseSpec]:
    """Declare the noise of the targets of a batch of ``length`` steps."""
    steps = (config.td_horizon,) if config.target == "model" else ()
    specs = {"td_critics": NoiseSpec("subset", (2,), model.num_q)}
    if steps or not model.state_values:
        specs = {"td_policy": NoiseSpec("normal", (*steps, length, batch_size, model.action_dim)), **specs}
    return specs


@torch.no_grad()
def value_targets(
    config: ValueConfig, model: WorldModel, z: Tensor | None, next_z: Tensor, batch: SequenceBatch, discount: float, noise: Noise
) -> tuple[Tensor, Tensor | None]:
    """Return the targets of the critics, and the slow critics' values of the next latents, if the targets are made of them.

    Args:
        config: which targets.
        model: its slow critics are read, of ``model`` targets its policy, dynamics, reward and termination as well.
        z: encodings of the observations acted on [T, B, Z]; ``model`` targets alone need them.
        next_z: encodings of those that followed [T, B, Z].
        batch: windows.
        discount: per decision.
        noise: tensors of :func:`target_noise`.

    Returns:
        [T, B] and [T, B].
    """
    critics = noise["td_critics"]
    if config.target == "model":
        assert z is not None
        return _imagined_target(config, model, z, next_z, batch, discount, noise["td_policy"], critics), None
    values = slow_value(model, next_z, noise.get("td_policy"), critics, config.bootstrap)
    if config.target == "td":
        return td_target(batch, values, discount), values
    if config.target == "n_step":
        return n_step_target(batch, values, discount, config.n_step), values
    return td_lambda_target(batch, values, discount, config.lam), values


def slow_value(model: WorldModel, z: Tensor, eps: Tensor | None, critics: Tensor, reduce: str) -> Tensor:
    """Minimum or mean of the slow critics of given indices, at an action of the policy unless they read states: [..., Z] -> [...].

    One-hot actions are not sampled: the minimum is expected over all of them.
    """
    if model.state_values:
        return _reduced(model.v_values(z, critics, slow=True), reduce)
    if model.discrete:
        return model.expected(_reduced(model.choice_values(z, critics, slow=True), reduce), z)
    assert eps is not None
    return _reduced(model.target_q_values(z, model.propose(z, eps), critics), reduce)


def _reduced(values: Tensor, how: str) -> Tensor:
    return values.amin(0) if how == "min" else values.mean(0)


def td_target(batch: SequenceBatch, values: Tensor, discount: float) -> Tensor:
    """r + discount (1 - terminated) V of the next latent: values [T, B] -> [T, B] (TD-MPC2 eq. 4, without entropy)."""
    return batch.reward + discount * (1 - batch.terminated) * values


def n_step_target(batch: SequenceBatch, values: Tensor, discount: float, n: int) -> Tensor:
    """Sum of ``n`` discounted rewards, fewer at the end of window or episode, and a bootstrap: values [T, B] -> [T, B].

    The actions are those that were taken: the sum is not corrected for what the policy would do now (Sutton & Barto 2018, section 7.1).
    """
    going_on, one = _goes_on(batch), td_target(batch, values, discount)
    target = one
    for _ in range(n - 1):  # after k rounds: k + 1 steps; the last entry of the window always keeps what it has
        longer = batch.reward[:-1] + discount * (1 - batch.terminated[:-1]) * target[1:]
        target = torch.cat((torch.where(going_on, longer, one[:-1]), one[-1:]))
    return target


def td_lambda_target(batch: SequenceBatch, values: Tensor, discount: float, lam: float) -> Tensor:
    """Mean of all n-step targets within the window, weighted by lam**(n-1): values [T, B] -> [T, B] (Sutton & Barto 2018, section 12.1)."""
    going_on = _goes_on(batch)
    one = td_target(batch, values, discount)
    targets = [one[-1]]
    for step in reversed(range(len(one) - 1)):
        following = torch.lerp(values[step], targets[-1], lam)
        longer = batch.reward[step] + discount * (1 - batch.terminated[step]) * following
        targets.append(torch.where(going_on[step], longer, one[step]))
    return torch.stack(targets[::-1])


def _goes_on(batch: SequenceBatch) -> Tensor:
    """Whether the window has a real step behind each but the last: [T-1, B] bool; what terminates or is truncated there has none."""
    return (batch.mask[1:] > 0) & (batch.truncated[:-1] == 0) & (batch.terminated[:-1] == 0)


def _imagined_target(
    config: ValueConfig,
    model: WorldModel,
    z: Tensor,
    next_z: Tensor,
    batch: SequenceBatch,
    discount: float,
    eps: Tensor,
    critics: Tensor,
) -> Tensor:
    """Return of ``td_horizon`` steps of the present policy with a bootstrap (BMPC): on-policy, whoever collected the data.

    Where critics read actions, the first step is the replayed one, whose action they are asked about (Feinberg et al. 2018).
    """
    total, weight = torch.zeros_like(batch.reward), torch.ones_like(batch.reward)
    if not model.state_values:
        total, weight, z = batch.reward, discount * (1 - batch.terminated), next_z
    steps = eps if model.state_values else eps[:-1]
    for noise in steps:
        step = model.step(z, model.propose(z, noise))
        total, weight, z = total + weight * step.reward, weight * discount * step.cont, step.z
    return total + weight * slow_value(model, z, eps[-1], critics, config.bootstrap)
