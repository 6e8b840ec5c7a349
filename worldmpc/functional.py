"""Parameter groups and their optimisers, masked trees, and compilation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

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
        self.config, self.total_updates = config, total_updates
        # One group per learning rate, as each costs a call of the fused kernel.
        self.scales = list(dict.fromkeys(prefixes.values()))
        prefixes_of = [tuple(prefix for prefix, own in prefixes.items() if own == scale) for scale in self.scales]
        named = [[(name, value) for name, value in module.named_parameters() if name.startswith(group)] for group in prefixes_of]
        self.names = [name for group in named for name, _ in group]
        self.params = [value for group in named for _, value in group]
        # Learning rates are tensors, so that a schedule never changes what a compiled function reads as a constant.
        self.lrs = [torch.tensor(config.lr * scale, device=self.params[0].device) for scale in self.scales]
        groups = [{"params": [value for _, value in group], "lr": lr} for group, lr in zip(named, self.lrs, strict=True)]
        self.adam = torch.optim.Adam(groups, eps=eps, fused=True)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Return the gradients of a loss [] for the parameters of these groups alone."""
        return list(torch.autograd.grad(loss, self.params))

    def step(self, gradients: list[Tensor], update: int, skip: Tensor) -> tuple[Tensor, Tensor]:
        """Clip the gradients and apply them, unless ``skip`` [] is 1 or their norm is not finite.

        Returns:
            The norm before clipping [], and 1 where nothing was applied, else 0 [].
        """
        norm = torch.nn.utils.get_total_norm(gradients)
        skip = torch.maximum(skip, (~norm.isfinite()).to(skip.dtype))
        factor = (self.config.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
        if self.config.schedule != "constant":
            factor = learning_rate_scale(self.config, update, self.total_updates)
            for lr, scale in zip(self.lrs, self.scales, strict=True):
                lr.fill_(self.config.lr * scale * factor)
        for parameter, gradient in zip(self.params, gradients, strict=True):
            parameter.grad = gradient
        self.adam.found_inf = skip  # type: ignore[attr-defined]  # the fused kernel leaves everything untouched where it is 1
        self.adam.step()
        return norm, skip

    def state_dict(self) -> dict[str, Tensor]:
        """Return Adam's moments and step counts by parameter name."""
        state = {}
        for name, parameter in zip(self.names, self.params, strict=True):
            for part, value in self.adam.state.get(parameter, {}).items():
                state[f"{part}.{name}"] = value
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned; an empty state means that no step has been taken."""
        for name, parameter in zip(self.names, self.params, strict=True):
            parts = {part: state[f"{part}.{name}"] for part in ("step", "exp_avg", "exp_avg_sq") if f"{part}.{name}" in state}
            if parts:
                self.adam.state[parameter] = {part: value.to(parameter.device, copy=True) for part, value in parts.items()}
            else:
                self.adam.state.pop(parameter, None)
