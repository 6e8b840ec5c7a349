"""Policies as stateless functions of a network's output: the squashed Gaussian, and one-hot choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from worldmpc.models import kernels, native
from worldmpc.models.gradients import Mapped, differentiate, mapped, transforming, with_seeds
from worldmpc.models.networks import plain_float
from worldmpc.types import PolicySample

LARGEST_SQUASHED = 1 - 1e-4
"""Actions beyond are taken for this, as the inverse of the squash is infinite at 1."""


def squashed_gaussian(raw: Tensor, eps: Tensor, log_std_min: float, log_std_max: float) -> PolicySample:
    """Sample tanh(mean + eps std) from the policy network's output.

    ``scaled_entropy`` follows the published code, where the squash correction cancels: it equals ``-A`` times the
    log-density before squashing.

    Args:
        raw: [..., 2 A] mean, then unbounded log standard deviation.
        eps: [..., A] standard normal noise.
        log_std_min: lower bound of the log standard deviation.
        log_std_max: upper bound of the log standard deviation.
    """
    if (sample := _by_library(raw, eps, log_std_min, log_std_max)) is not None:
        return sample
    return plain_squashed_gaussian(raw, eps, log_std_min, log_std_max)


def plain_squashed_gaussian(raw: Tensor, eps: Tensor, log_std_min: float, log_std_max: float) -> PolicySample:
    """Do what :func:`squashed_gaussian` does by PyTorch's functions."""
    mean, log_std = split_gaussian(raw, log_std_min, log_std_max)
    gaussian = (-0.5 * eps.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
    action = torch.tanh(mean + eps * log_std.exp())
    log_prob = gaussian - torch.log(torch.relu(1 - action.square()) + 1e-6).sum(-1)
    scaled = -log_prob * (gaussian * eps.shape[-1] / (log_prob + 1e-8))
    return PolicySample(action, torch.tanh(mean), log_std, log_prob, -log_prob, scaled)


def clipped_gaussian(raw: Tensor, eps: Tensor, log_std_min: float, log_std_max: float) -> PolicySample:
    """Sample clip(tanh(mean) + eps std, -1, 1) from the policy network's output: a Gaussian in the space of actions (BMPC).

    Densities are those before clipping; shapes are those of :func:`squashed_gaussian`.
    """
    mean, log_std = split_gaussian(raw, log_std_min, log_std_max)
    mean = torch.tanh(mean)
    log_prob = (-0.5 * eps.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
    action = (mean + eps * log_std.exp()).clamp(-1, 1)
    return PolicySample(action, mean, log_std, log_prob, -log_prob, -log_prob * eps.shape[-1])


def gaussian_log_prob(raw: Tensor, action: Tensor, log_std_min: float, log_std_max: float, clipped: bool) -> Tensor:
    """Log-density of given actions under the squashed or the clipped Gaussian: [..., 2 A], [..., A] -> [...]."""
    mean, log_std = split_gaussian(raw, log_std_min, log_std_max)
    if clipped:
        mean, place, correction = torch.tanh(mean), action, torch.zeros_like(action)
    else:
        action = action.clamp(-LARGEST_SQUASHED, LARGEST_SQUASHED)
        place, correction = torch.atanh(action), torch.log(1 - action.square() + 1e-6)
    return (-0.5 * ((place - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi) - correction).sum(-1)


def split_gaussian(raw: Tensor, log_std_min: float, log_std_max: float) -> tuple[Tensor, Tensor]:
    """Return mean [..., A] and bounded log standard deviation [..., A] from [..., 2 A]."""
    mean, log_std = raw.chunk(2, dim=-1)
    return mean, log_std_min + 0.5 * (log_std_max - log_std_min) * (torch.tanh(log_std) + 1)


def one_hot_argmax(scores: Tensor) -> Tensor:
    """Return the choice with the largest score, the first of equal ones, as a one-hot vector: [..., A] -> [..., A]."""
    numbers = torch.arange(scores.shape[-1], device=scores.device)
    return (numbers == scores.argmax(-1, keepdim=True)).to(scores.dtype)


def _by_library(raw: Tensor, eps: Tensor, log_std_min: float, log_std_max: float) -> PolicySample | None:
    """Return the sample by the library of :mod:`worldmpc.models.native`, or None where it cannot do it."""
    dims = eps.shape[-1]
    if raw.shape != (*eps.shape[:-1], 2 * dims) or eps.requires_grad or not plain_float(eps) or kernels.library_for(raw) is None:
        return None
    if transforming() and not mapped(raw, eps):
        return None
    rows, noise = raw.reshape(-1, 2 * dims).contiguous(), eps.reshape(-1, dims).contiguous()
    function = _MappedGaussian if mapped(rows, noise) else _Gaussian
    action, mean, log_std, log_prob, scaled = function.apply(rows, noise, log_std_min, log_std_max)  # type: ignore[misc]
    action, mean, log_std = (part.view(eps.shape) for part in (action, mean, log_std))
    log_prob, scaled = log_prob.view(eps.shape[:-1]), scaled.view(eps.shape[:-1])
    return PolicySample(action, mean, log_std, log_prob, -log_prob, scaled)


class _Gaussian(torch.autograd.Function):
    """The library's squashed Gaussian with its gradient."""

    @staticmethod
    def forward(ctx: Any, raw: Tensor, eps: Tensor, log_std_min: float, log_std_max: float) -> tuple[Tensor, ...]:
        per_action, per_row = [torch.empty_like(eps) for _ in range(3)], [eps.new_empty(eps.shape[0]) for _ in range(2)]
        outputs, bounds = (*per_action, *per_row), (log_std_min, log_std_max)
        library, call = _prepare(raw, eps, bounds, outputs)
        library.gaussian(call)
        ctx.save_for_backward(raw, eps, *outputs)
        ctx.bounds = bounds
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raw, eps, *outputs = ctx.saved_tensors
        given = [grad for grad in grads if grad is not None]
        if not given:
            return None, None, None, None
        if torch.is_grad_enabled() or mapped(*given):
            with torch.enable_grad():
                sample = plain_squashed_gaussian(raw, eps, *ctx.bounds)
                parts = (sample.action, sample.mean, sample.log_std, sample.log_prob, sample.scaled_entropy)
                wanted = [part for part, grad in zip(parts, grads, strict=True) if grad is not None]
                return differentiate(ctx, wanted, (raw, None, None, None), given)
        library, call = _prepare(raw, eps, ctx.bounds, outputs)
        found, grads = torch.empty_like(raw), tuple(None if grad is None else grad.contiguous() for grad in grads)
        call.d_action, call.d_mean, call.d_log_std, call.d_log_prob, call.d_scaled = (
            None if grad is None else grad.data_ptr() for grad in grads
        )
        call.d_raw = found.data_ptr()
        library.gaussian_back(call)
        return found, None, None, None


def _prepare(raw: Tensor, eps: Tensor, bounds: tuple[float, float], outputs: Sequence[Tensor]) -> tuple[native.Library, native.CGaussian]:
    library = native.library()
    assert not isinstance(library, str)
    call = native.CGaussian(rows=eps.shape[0], dims=eps.shape[1], threads=torch.get_num_threads())
    call.log_std_min, call.log_std_max = bounds
    call.raw, call.eps = raw.data_ptr(), eps.data_ptr()
    call.action, call.mean, call.log_std, call.log_prob, call.scaled = (output.data_ptr() for output in outputs)
    return library, call


class _MappedGaussian(Mapped):
    """:class:`_Gaussian` under ``torch.vmap``: rows are rows."""

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], raw: Tensor, eps: Tensor, log_std_min: float, log_std_max: float
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        rows, noise = (with_seeds(part, dim, info.batch_size) for part, dim in zip((raw, eps), in_dims, strict=False))
        sample = squashed_gaussian(rows, noise, log_std_min, log_std_max)
        return (sample.action, sample.mean, sample.log_std, sample.log_prob, sample.scaled_entropy), (0,) * 5
