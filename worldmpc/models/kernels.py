"""The arithmetic of one layer, as fast as PyTorch can do it on the device at hand.

On a GPU, for other types than float32, under autocast and ``torch.func``, for second derivatives, and where PyTorch has no
oneDNN, these are plain compositions of PyTorch's functions. On an x86 CPU two things are worth autograd functions of their
own. oneDNN multiplies float32 matrices up to twice as fast as the BLAS that PyTorch calls (MKL leaves half the vector width
of AMD processors unused), but PyTorch offers its products without gradients only. And Mish can do without the tanh that
makes PyTorch's slow.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ONEDNN = (
    platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
"""Whether PyTorch offers oneDNN's products on this kind of processor (measured on an AMD one with AVX-512)."""
ONEDNN_FROM = 1 << 20
"""Multiplications from which a oneDNN product is faster than a BLAS one, which starts sooner."""
NORM_EPS = 1e-5
"""What LayerNorm adds to the variance."""


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """X W^T + b: [..., in], [out, in], [out] -> [..., out]."""
    if not _fast_on_cpu(x, weight, bias):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else _rows(x, product(_flat(x), weight, bias))


def normed_mish(x: Tensor, weight: Tensor, bias: Tensor, ln_weight: Tensor, ln_bias: Tensor, keep: Tensor | None = None) -> Tensor:
    """Linear, dropout, LayerNorm, Mish: [..., in], [out, in], [out], [out], [out], [..., out] -> [..., out]."""
    if not _fast_on_cpu(x, weight, bias, ln_weight, ln_bias, *(() if keep is None else (keep,))):
        return _plain_normed_mish(x, weight, bias, ln_weight, ln_bias, keep)
    if torch.is_grad_enabled():
        return _NormedMish.apply(x, weight, bias, ln_weight, ln_bias, keep)
    return _rows(x, _mish(_normed(_flat(x), weight, bias, ln_weight, ln_bias, keep)[1])[0])


def _plain_normed_mish(x: Tensor, weight: Tensor, bias: Tensor, ln_weight: Tensor, ln_bias: Tensor, keep: Tensor | None) -> Tensor:
    hidden = F.linear(x, weight, bias)
    return F.mish(F.layer_norm(hidden if keep is None else hidden * keep, ln_weight.shape, ln_weight, ln_bias, NORM_EPS))


def _fast_on_cpu(x: Tensor, weight: Tensor, *others: Tensor) -> bool:
    """Whether the functions of this file can do it; what they cannot, PyTorch can, or refuses with its own words."""
    if not ONEDNN or not x.is_cpu or x.shape[-1] != weight.shape[-1] or torch.is_autocast_enabled("cpu"):
        return False
    tensors = (x, weight, *others)
    if any(tensor.dtype is not torch.float32 for tensor in tensors):
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore[reportAttributeAccessIssue]
    return torch.compiler.is_compiling() or not any(wrapped(tensor) for tensor in tensors)


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Faster one of two products: [M, K], [N, K], [N] -> [M, N] float32 on the CPU, without gradient."""
    if not ONEDNN or left.shape[0] * left.shape[1] * right.shape[0] < ONEDNN_FROM:
        return F.linear(left, right, bias)
    return onednn_product(left, right, bias)


def onednn_product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """[M, K], [N, K], [N] -> [M, N] float32 on the CPU by oneDNN, without gradient."""
    if torch.compiler.is_compiling():
        return _opaque_product(left, right, bias)
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")


@torch.library.custom_op("worldmpc::onednn_product", mutates_args=())
def _opaque_product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """The same for compiled code: the compiler takes PyTorch's operator for constant weights only, and leaves this one alone."""
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")


@_opaque_product.register_fake
def _(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[0])


def _flat(x: Tensor) -> Tensor:
    """[..., in] -> [M, in] contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _rows(x: Tensor, y: Tensor) -> Tensor:
    """[M, out] -> [..., out] with the leading dimensions of x; no view, so that results may be changed in place."""
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))


def _normed(
    x: Tensor, weight: Tensor, bias: Tensor, ln_weight: Tensor, ln_bias: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return linear (after dropout) [M, out], its LayerNorm [M, out], and mean and reciprocal deviation [M, 1]."""
    hidden = product(x, weight, bias)
    if keep is not None:
        hidden.mul_(keep.reshape(hidden.shape))
    return hidden, *torch.native_layer_norm(hidden, ln_weight.shape, ln_weight, ln_bias, NORM_EPS)


def _mish(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mish(x), q = sigmoid(-x) and p = 1 + q^2, all [...]; mish(x) = 2 x / p - x, five times faster than with tanh."""
    negative = x.neg()
    q = torch.sigmoid(negative)
    p = torch.addcmul(x.new_ones(()), q, q)
    return negative.addcdiv_(negative, p, value=-2), q, p


def _mish_slope(x: Tensor, q: Tensor, p: Tensor) -> Tensor:
    """d mish / dx = 2 / p - 1 + 4 x (1 - q) (q / p)^2, from dq/dx = -q (1 - q); overwrites q and p."""
    second = torch.addcmul(x, x, q, value=-1).mul_(q.div_(p)).mul_(q)
    return p.reciprocal_().mul_(2).sub_(1).add_(second, alpha=4)


def _linear_gradients(ctx: Any, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias, the first three inputs of ``ctx``: x [..., in], [out, in], grad [M, out]."""
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    return (
        _rows(x, product(grad, weight.t())) if need_x else None,
        product(grad.t(), _flat(x).t()) if need_weight else None,
        grad.sum(0) if need_bias else None,
    )


def _gradients_of_plain(
    ctx: Any, function: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated again, by PyTorch's own functions."""
    wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad, strict=True) if needed and x is not None]
    found = iter(torch.autograd.grad(function(*inputs), wanted, grad, create_graph=True))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return _rows(x, product(_flat(x), weight, bias))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _gradients_of_plain(ctx, F.linear, (x, weight, bias), grad)
        return _linear_gradients(ctx, x, weight, _flat(grad))


class _NormedMish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, ln_weight: Tensor, ln_bias: Tensor, keep: Tensor | None) -> Tensor:
        hidden, normed, mean, rstd = _normed(_flat(x), weight, bias, ln_weight, ln_bias, keep)
        y, q, p = _mish(normed)
        ctx.save_for_backward(x, weight, bias, ln_weight, ln_bias, keep, hidden, mean, rstd, _mish_slope(normed, q, p))
        return _rows(x, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, ln_weight, ln_bias, keep, hidden, mean, rstd, slope = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _gradients_of_plain(ctx, _plain_normed_mish, (x, weight, bias, ln_weight, ln_bias, keep), grad)
        grad, grad_ln_weight, grad_ln_bias = torch.ops.aten.native_layer_norm_backward(
            _flat(grad) * slope, hidden, ln_weight.shape, mean, rstd, ln_weight, ln_bias, [True, *ctx.needs_input_grad[3:5]]
        )
        if keep is not None:
            grad.mul_(keep.reshape(hidden.shape))
        return *_linear_gradients(ctx, x, weight, grad), grad_ln_weight, grad_ln_bias, None
