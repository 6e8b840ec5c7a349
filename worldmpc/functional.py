"""Parameter groups and their optimisers, masked trees, and compilation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from worldmpc.config import OptimConfig

TreeT = TypeVar("TreeT")
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def tree_where(mask: Tensor, yes: TreeT, no: TreeT) -> TreeT:
    """Choose between two equal nested tuples of tensors [E, ...] by a mask [E]."""
    if isinstance(yes, Tensor) and isinstance(no, Tensor):
        return torch.where(mask.view(-1, *[1] * (yes.dim() - 1)), yes, no)  # type: ignore[return-value]
    assert isinstance(yes, tuple) and isinstance(no, tuple)
    return type(yes)(*[tree_where(mask, one, other) for one, other in zip(yes, no, strict=True)])  # type: ignore[return-value]


COMPILE_BACKEND = "inductor"
"""What ``compile=true`` compiles with."""


def maybe_compile(function: FunctionT, enabled: bool) -> FunctionT:
    """Compile a pure function of static shapes, or return it as it is."""
    return torch.compile(function, dynamic=False, backend=COMPILE_BACKEND) if enabled else function  # type: ignore[return-value]


def learning_rate_scale(config: OptimConfig, update: int, total_updates: int) -> float:
    """Return the factor on the learning rate at an update, counted from 0.

    ``warmup`` and ``cosine`` rise linearly over ``warmup_updates``; ``cosine`` then falls to ``final_lr_scale``.
    """
    if config.schedule == "constant":
        return 1.0
    if update < config.warmup_updates:
        return (update + 1) / config.warmup_updates
    if config.schedule == "warmup":
        return 1.0
    progress = min((update - config.warmup_updates) / max(total_updates - config.warmup_updates, 1), 1.0)
    return config.final_lr_scale + (1.0 - config.final_lr_scale) * 0.5 * (1.0 + math.cos(math.pi * progress))


class GroupOptimizer:
    """Adam over the parameters of a module whose names start with given prefixes, with one gradient clip for all.

    The parameters become views of one flat tensor, so that clipping and Adam are a handful of operations however many there are.

    Args:
        module: owner of the parameters.
        prefixes: prefix -> learning-rate factor of that group.
        config: learning rate, clip and schedule.
        eps: Adam's denominator constant.
        total_updates: length of the cosine schedule.
    """

    def __init__(
        self, module: nn.Module, prefixes: Mapping[str, float], config: OptimConfig, *, eps: float = 1e-8, total_updates: int = 1
    ) -> None:
        self.config, self.total_updates, self.eps = config, total_updates, eps
        # One group per learning rate, side by side.
        self.scales = list(dict.fromkeys(prefixes.values()))
        prefixes_of = [tuple(prefix for prefix, own in prefixes.items() if own == scale) for scale in self.scales]
        named = [[(name, value) for name, value in module.named_parameters() if name.startswith(group)] for group in prefixes_of]
        self.names = [name for group in named for name, _ in group]
        self.params = [value for group in named for _, value in group]
        self.sizes = [sum(value.numel() for _, value in group) for group in named]
        self.flat = self._tie()
        device = self.flat.device
        # Learning rates are tensors, so that a schedule never changes what a compiled function reads as a constant.
        self.lrs = [torch.tensor(config.lr * scale, device=device) for scale in self.scales]
        self.steps = [torch.zeros((), device=device) for _ in self.scales]
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.flat), torch.zeros_like(self.flat)

    def gradients(self, loss: Tensor) -> Tensor:
        """Return the gradients of a loss [] for the parameters of these groups alone, flat [P]."""
        return torch.cat([gradient.reshape(-1) for gradient in torch.autograd.grad(loss, self.params)])

    def step(self, gradients: Tensor, update: int, skip: Tensor) -> tuple[Tensor, Tensor]:
        """Clip the gradients [P] and apply them, unless ``skip`` [] is 1 or their norm is not finite.

        Returns:
            The norm before clipping [], and 1 where nothing was applied, else 0 [].
        """
        norm = torch.linalg.vector_norm(gradients)
        skip = torch.maximum(skip, (~norm.isfinite()).to(skip.dtype))
        gradients.mul_((self.config.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0))
        if self.config.schedule != "constant":
            factor = learning_rate_scale(self.config, update, self.total_updates)
            for lr, scale in zip(self.lrs, self.scales, strict=True):
                lr.fill_(self.config.lr * scale * factor)
        if [parameter.data_ptr() for parameter in self.params] != self._places:
            self.flat = self._tie()  # copied or moved by somebody: what the module holds now is what counts
        parts = [tensor.split(self.sizes) for tensor in (self.flat, gradients, self.exp_avg, self.exp_avg_sq)]
        for flat, gradient, exp_avg, exp_avg_sq, step, lr in zip(*parts, self.steps, self.lrs, strict=True):
            adam(
                [flat],
                [gradient],
                [exp_avg],
                [exp_avg_sq],
                [],
                [step],
                fused=True,
                found_inf=skip,  # the fused kernel leaves everything untouched where it is 1
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=lr,  # type: ignore[arg-type]
                weight_decay=0.0,
                eps=self.eps,
                maximize=False,
            )
        return norm, skip

    def state_dict(self) -> dict[str, Tensor]:
        """Return Adam's moments and step counts by parameter name."""
        state = {}
        for part, values in (("step", self._each_step()), ("exp_avg", self.split(self.exp_avg)), ("exp_avg_sq", self.split(self.exp_avg_sq))):
            state |= {f"{part}.{name}": value for name, value in zip(self.names, values, strict=True)}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned; an empty state means that no step has been taken."""
        for part, values in (("exp_avg", self.split(self.exp_avg)), ("exp_avg_sq", self.split(self.exp_avg_sq)), ("step", self._each_step())):
            for name, value in zip(self.names, values, strict=True):
                saved = state.get(f"{part}.{name}")
                value.copy_(saved) if saved is not None else value.zero_()

    def _tie(self) -> Tensor:
        """Make the parameters views of one flat tensor, group by group, and return it."""
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in self.params])
        for parameter, view in zip(self.params, self.split(flat), strict=True):
            parameter.data = view
        self._places = [parameter.data_ptr() for parameter in self.params]
        return flat

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return views of a flat tensor [P] in the shapes of the parameters, in the order of ``names``."""
        parts = flat.split([parameter.numel() for parameter in self.params])
        return [part.view(parameter.shape) for part, parameter in zip(parts, self.params, strict=True)]

    def _each_step(self) -> list[Tensor]:
        ends = list(itertools.accumulate(self.sizes))
        at = itertools.accumulate((parameter.numel() for parameter in self.params))
        return [self.steps[next(index for index, end in enumerate(ends) if place <= end)] for place in at]
