"""Scalars as categorical distributions over bins that are evenly spaced in symlog space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from worldmpc.models import kernels, native
from worldmpc.models.gradients import Mapped, differentiate, mapped, transforming, with_seeds
from worldmpc.models.networks import plain_float


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|) (Hafner et al. 2023)."""
    return x.sign() * torch.log(1 + x.abs())


def symexp(x: Tensor) -> Tensor:
    """sign(x) (exp|x| - 1), the inverse of :func:`symlog`."""
    return x.sign() * (torch.exp(x.abs()) - 1)


class TwoHot(nn.Module):
    """Scalars as distributions over ``num_bins`` bins, each scalar between its two neighbours (TD-MPC2 section 3)."""

    bins: Tensor

    def __init__(self, num_bins: int = 101, vmin: float = -10.0, vmax: float = 10.0) -> None:
        super().__init__()
        self.num_bins, self.vmin, self.vmax = num_bins, vmin, vmax
        self.width = (vmax - vmin) / (num_bins - 1)
        self.register_buffer("bins", torch.linspace(vmin, vmax, num_bins), persistent=False)

    def position(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return lower bin [...] int64 and the weight of the upper neighbour [...], for scalars [...]."""
        place = (symlog(x).clamp(self.vmin, self.vmax) - self.vmin) / self.width
        # NaN keeps a valid bin, because an index out of range would end the process on a GPU; the weight stays NaN.
        lower = place.nan_to_num().floor().clamp(max=self.num_bins - 2)
        return lower.long(), place - lower

    def encode(self, x: Tensor) -> Tensor:
        """Two-hot distribution: [...] -> [..., K]."""
        lower, weight = self.position(x)
        target = torch.zeros(*x.shape, self.num_bins, dtype=x.dtype, device=x.device)
        target.scatter_(-1, lower[..., None], (1 - weight)[..., None])
        return target.scatter_(-1, lower[..., None] + 1, weight[..., None])

    def decode(self, logits: Tensor) -> Tensor:
        """symexp of the expected bin: [..., K] -> [...]."""
        if not self._can(logits) or mapped(self.bins):
            return self.plain_decode(logits)
        rows = logits.reshape(-1, self.num_bins).contiguous()
        if mapped(rows):
            values: Tensor = _MappedValues.apply(rows, self)  # type: ignore[assignment]
        elif torch.is_grad_enabled() and rows.requires_grad:
            values = _Values.apply(rows, self)  # type: ignore[assignment]
        else:
            values = _values(rows, self, None)
        return values.view(logits.shape[:-1])

    def loss(self, logits: Tensor, x: Tensor) -> Tensor:
        """Cross-entropy of logits [..., K] against the two-hot distribution of scalars [...] -> [...]."""
        if not self._can(logits, x) or not plain_float(x) or x.requires_grad:
            return self.plain_loss(logits, x)
        rows = logits.reshape(-1, self.num_bins).contiguous()
        scalars = x.expand(logits.shape[:-1]).reshape(-1).contiguous()
        if scalars.is_inference():
            scalars = scalars.clone()  # which may be saved for a backward pass
        if mapped(rows, scalars):
            losses: Tensor = _MappedLosses.apply(rows, scalars, self)  # type: ignore[assignment]
        else:
            losses = _Losses.apply(rows, scalars, self)  # type: ignore[assignment]
        return losses.view(logits.shape[:-1])

    def _can(self, *inputs: Tensor) -> bool:
        """Return whether the library can do it for logits, the first of the inputs."""
        logits = inputs[0]
        if logits.shape[-1] != self.num_bins or not plain_float(self.bins) or kernels.library_for(logits) is None:
            return False
        return not transforming() or mapped(*inputs)

    def plain_decode(self, logits: Tensor) -> Tensor:
        """Do what :meth:`decode` does by PyTorch's functions."""
        return symexp((self._exact(logits).softmax(-1) * self.bins).sum(-1))  # no matrix product, which autocast would round

    def plain_loss(self, logits: Tensor, x: Tensor) -> Tensor:
        """Do what :meth:`loss` does by PyTorch's functions."""
        lower, weight = self.position(x)
        pair = torch.stack((lower, lower + 1), -1).expand(*logits.shape[:-1], 2)
        low, high = self._exact(logits).log_softmax(-1).gather(-1, pair).unbind(-1)
        return -torch.lerp(low, high, weight)

    def _exact(self, logits: Tensor) -> Tensor:
        """Logits at least as exact as the bins: what autocast rounded is not rounded any more."""
        return logits.to(torch.promote_types(logits.dtype, self.bins.dtype))


def _prepare(logits: Tensor, head: TwoHot) -> tuple[native.Library, native.CTwoHot]:
    library = native.library()
    assert not isinstance(library, str)
    call = native.CTwoHot(rows=len(logits), bins=head.num_bins, threads=torch.get_num_threads())
    call.vmin, call.vmax, call.width = head.vmin, head.vmax, head.width
    call.support, call.logits = head.bins.data_ptr(), logits.data_ptr()
    return library, call


def _values(logits: Tensor, head: TwoHot, saved: Tensor | None) -> Tensor:
    """[M, K] -> [M]; ``saved`` [M, 3], if any, is filled for the backward pass."""
    library, call = _prepare(logits, head)
    out = logits.new_empty(len(logits))
    call.out, call.saved = out.data_ptr(), None if saved is None else saved.data_ptr()
    library.two_hot_values(call)
    return out


class _Values(torch.autograd.Function):
    """Values with their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, head: TwoHot) -> Tensor:
        saved = logits.new_empty(len(logits), 3)
        ctx.save_for_backward(logits, saved)
        ctx.head = head
        return _values(logits, head, saved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, saved = ctx.saved_tensors
        if torch.is_grad_enabled() or mapped(grad):
            with torch.enable_grad():
                return differentiate(ctx, ctx.head.plain_decode(logits), (logits, None), grad)
        library, call = _prepare(logits, ctx.head)
        grad, found = grad.contiguous(), torch.empty_like(logits)
        call.grad, call.saved, call.dlogits = grad.data_ptr(), saved.data_ptr(), found.data_ptr()
        library.two_hot_values_back(call)
        return found, None


class _Losses(torch.autograd.Function):
    """Losses with their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, x: Tensor, head: TwoHot) -> Tensor:
        library, call = _prepare(logits, head)
        out, saved = logits.new_empty(len(logits)), logits.new_empty(len(logits), 2)
        call.x, call.out, call.saved = x.data_ptr(), out.data_ptr(), saved.data_ptr()
        library.two_hot_losses(call)
        ctx.save_for_backward(logits, x, saved)
        ctx.head = head
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, x, saved = ctx.saved_tensors
        if torch.is_grad_enabled() or mapped(grad):
            with torch.enable_grad():
                return differentiate(ctx, ctx.head.plain_loss(logits, x), (logits, None, None), grad)
        library, call = _prepare(logits, ctx.head)
        grad, found = grad.contiguous(), torch.empty_like(logits)
        call.x, call.grad, call.saved, call.dlogits = x.data_ptr(), grad.data_ptr(), saved.data_ptr(), found.data_ptr()
        library.two_hot_losses_back(call)
        return found, None, None


class _MappedValues(Mapped):
    """:class:`_Values` under ``torch.vmap``: rows are rows."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], logits: Tensor, head: TwoHot) -> tuple[Tensor, int]:
        rows = with_seeds(logits, in_dims[0], info.batch_size)
        return head.decode(rows), 0


class _MappedLosses(Mapped):
    """:class:`_Losses` under ``torch.vmap``."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], logits: Tensor, x: Tensor, head: TwoHot) -> tuple[Tensor, int]:
        rows, scalars = (with_seeds(each, dim, info.batch_size) for each, dim in zip((logits, x), in_dims, strict=False))
        return head.loss(rows, scalars), 0
