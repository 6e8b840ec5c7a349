"""Adam over groups of parameters, behind one gradient clip for all."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from worldmpc.config import OptimConfig
from worldmpc.models import native
from worldmpc.models.gradients import invoke
from worldmpc.models.networks import plain_float

BETA1, BETA2 = 0.9, 0.999


def learning_rate_scale(config: OptimConfig, update: int, total_updates: int) -> float:
    """Return the factor on the learning rate at an update, counted from 0.

    All but ``constant`` rise linearly over ``warmup_updates``; ``cosine`` and ``linear`` then fall to ``final_lr_scale``.
    """
    if config.schedule == "constant":
        return 1.0
    if update < config.warmup_updates:
        return (update + 1) / config.warmup_updates
    if config.schedule == "warmup":
        return 1.0
    progress = min((update - config.warmup_updates) / max(total_updates - config.warmup_updates, 1), 1.0)
    left = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.final_lr_scale + (1.0 - config.final_lr_scale) * left


class GroupOptimizer:
    """Adam over the parameters of a module whose names start with given prefixes, with one gradient clip for all.

    The parameters of a group become views of one flat tensor, so that clipping and Adam are a handful of operations however many
    there are. :meth:`stack` makes one optimizer out of those of several seeds: flat tensors [N, P], everything else per seed.

    Args:
        module: owner of the parameters.
        prefixes: prefix -> learning-rate factor of that group.
        config: learning rate, clip and schedule.
        eps: Adam's denominator constant.
        total_updates: length of the cosine schedule.
        apart: prefixes of those among them that :meth:`forget` is for.
    """

    def __init__(
        self,
        module: nn.Module,
        prefixes: Mapping[str, float],
        config: OptimConfig,
        *,
        eps: float = 1e-8,
        total_updates: int = 1,
        apart: Sequence[str] = (),
    ) -> None:
        self.config, self.total_updates, self.eps = config, total_updates, eps
        # One group per learning rate, and one for those of it that are apart.
        groups: dict[tuple[float, bool], list[tuple[str, Tensor]]] = {
            (rate, own): [] for rate in prefixes.values() for own in (False, True)
        }
        for name, value in module.named_parameters():
            rate = next((rate for prefix, rate in prefixes.items() if name.startswith(prefix)), None)
            if rate is not None:
                groups[rate, name.startswith(tuple(apart))].append((name, value))
        groups = {key: group for key, group in groups.items() if group}
        self.scales, self._apart, named = [rate for rate, _ in groups], [own for _, own in groups], groups.values()
        self.names = [name for group in named for name, _ in group]
        places = [name.rpartition(".") for name in self.names]
        self.owners = [(module.get_submodule(owner), leaf) for owner, _, leaf in places]
        self.params: list[Tensor] = [value for group in named for _, value in group]
        self.shapes = [[value.shape for _, value in group] for group in named]
        self.flats = self._tie()
        device = self.flats[0].device
        # Learning rates are tensors, so that a schedule never changes what a compiled function reads as a constant.
        self.lrs = [torch.tensor(config.lr * scale, device=device) for scale in self.scales]
        self.steps = [torch.zeros((), device=device) for _ in self.scales]
        self.exp_avgs, self.exp_avg_sqs = [torch.zeros_like(flat) for flat in self.flats], [torch.zeros_like(flat) for flat in self.flats]

    @classmethod
    def stack(cls, optimizers: Sequence[GroupOptimizer]) -> GroupOptimizer:
        """Return one optimizer over the parameters of all [N, ...], of which the given ones, and their modules, then hold views.

        Raises:
            ValueError: they have taken different numbers of steps.
        """
        first = optimizers[0]
        if any(not torch.equal(one, other) for optimizer in optimizers for one, other in zip(optimizer.steps, first.steps, strict=True)):
            raise ValueError("stack: the optimisers have taken different numbers of steps")
        stacked = copy.copy(first)
        for name in ("flats", "exp_avgs", "exp_avg_sqs"):
            groups = [torch.stack(parts) for parts in zip(*(getattr(optimizer, name) for optimizer in optimizers), strict=True)]
            setattr(stacked, name, groups)
            for index, optimizer in enumerate(optimizers):
                setattr(optimizer, name, [group[index] for group in groups])
        for optimizer in optimizers:
            optimizer.lrs, optimizer.steps = first.lrs, first.steps
            optimizer._point_at_flats()
        stacked.params = [view.requires_grad_() for view in stacked.split(stacked.flats)]
        stacked._places = [parameter.data_ptr() for parameter in stacked.params]
        return stacked

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Return the gradients of a loss [] for the parameters of these groups alone, one flat tensor [*N, P] per group.

        Raises:
            RuntimeError: a parameter was replaced, copied or moved since :meth:`begin`.
        """
        self._check_place()
        found = torch.autograd.grad(loss, self.params)
        lead = self.flats[0].shape[:-1]
        flat = [gradient.reshape(*lead, -1) for gradient in found] if lead else found
        ends = [0, *itertools.accumulate(len(shapes) for shapes in self.shapes)]
        return [torch.cat(flat[begin:end] if lead else _joined(flat[begin:end]), -1) for begin, end in itertools.pairwise(ends)]

    def begin(self, update: int) -> None:
        """Begin an update, counted from 0, before its loss is computed: find the parameters wherever they are, set the learning rates.

        What somebody has replaced, copied or moved since the last update is taken over: what the module holds now is what counts.
        """
        if self.flats[0].dim() == 1 and self._moved():  # a stack's parameters are its own
            self.params = [value for owner, leaf in self.owners if (value := owner._parameters[leaf]) is not None]
            self.flats = self._tie()
        if self.config.schedule == "constant":
            return
        factor = learning_rate_scale(self.config, update, self.total_updates)
        for lr, scale in zip(self.lrs, self.scales, strict=True):
            lr.fill_(self.config.lr * scale * factor)

    def step(self, gradients: list[Tensor], skip: Tensor) -> tuple[Tensor, Tensor]:
        """Clip the gradients of each seed and apply them, unless ``skip`` [*N] is 1, or their norm not finite, for any seed.

        Returns:
            The norm before clipping [*N], and 1 where a seed was the reason that nothing was applied, else 0 [*N].

        Raises:
            RuntimeError: see :meth:`gradients`.
        """
        self._check_place()
        library = native.library()
        ours = (*self.flats, *gradients, *self.exp_avgs, *self.exp_avg_sqs, skip)
        if isinstance(library, str) or len(self.flats) > native.MAX_GROUPS or not all(map(plain_float, ours)):
            return self._plain_step(gradients, skip)
        norm, skipped, skip = torch.empty_like(skip), torch.empty_like(skip), skip.contiguous()
        call = native.CAdam(groups=len(self.flats), seeds=skip.numel(), threads=torch.get_num_threads())
        call.beta1, call.beta2, call.eps, call.clip = BETA1, BETA2, self.eps, self.config.grad_clip_norm
        call.skip, call.norm, call.skipped = skip.data_ptr(), norm.data_ptr(), skipped.data_ptr()
        for index, flat in enumerate(self.flats):
            group = call.group[index]
            group.size = flat.shape[-1]
            group.param, group.exp_avg, group.exp_avg_sq, group.grad, group.step, group.lr = (
                values[index].data_ptr() for values in (self.flats, self.exp_avgs, self.exp_avg_sqs, gradients, self.steps, self.lrs)
            )
        invoke(library.adam, call)
        return norm, skipped

    def _plain_step(self, gradients: list[Tensor], skip: Tensor) -> tuple[Tensor, Tensor]:
        """Do what :meth:`step` does by PyTorch's functions."""
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient, dim=-1) for gradient in gradients]), dim=0)
        skip = torch.maximum(skip, (~norm.isfinite()).to(skip.dtype))
        factor = (self.config.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor[..., None])
        parts = self.flats, gradients, self.exp_avgs, self.exp_avg_sqs, self.steps, self.lrs
        for flat, gradient, exp_avg, exp_avg_sq, step, lr in zip(*parts, strict=True):
            adam(
                [flat],
                [gradient],
                [exp_avg],
                [exp_avg_sq],
                [],
                [step],
                fused=True,
                capturable=flat.is_cuda,
                found_inf=skip.amax(),  # the fused kernel leaves everything untouched where it is 1
                amsgrad=False,
                beta1=BETA1,
                beta2=BETA2,
                lr=lr,  # type: ignore[arg-type]
                weight_decay=0.0,
                eps=self.eps,
                maximize=False,
            )
        return norm, skip

    @torch.no_grad()
    def forget(self) -> None:
        """Begin anew with the parameters that are apart: their moments and steps are 0."""
        for apart, *state in zip(self._apart, self.exp_avgs, self.exp_avg_sqs, self.steps, strict=True):
            if apart:
                torch._foreach_zero_(state)  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict[str, Tensor]:
        """Return Adam's moments and step counts by parameter name."""
        state = {}
        for part, values in (
            ("step", self._step_of_each()),
            ("exp_avg", self.split(self.exp_avgs)),
            ("exp_avg_sq", self.split(self.exp_avg_sqs)),
        ):
            state |= {f"{part}.{name}": value for name, value in zip(self.names, values, strict=True)}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned; an empty state means that no step has been taken."""
        for part, values in (
            ("exp_avg", self.split(self.exp_avgs)),
            ("exp_avg_sq", self.split(self.exp_avg_sqs)),
            ("step", self._step_of_each()),
        ):
            for name, value in zip(self.names, values, strict=True):
                saved = state.get(f"{part}.{name}")
                value.copy_(saved) if saved is not None else value.zero_()

    def split(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """Return views of flat tensors [*N, P], one per group, in the shapes of the parameters [*N, ...], in the order of ``names``."""
        views = []
        for flat, shapes in zip(flats, self.shapes, strict=True):
            parts = flat.detach().split([shape.numel() for shape in shapes], -1)
            views += [part.view((*flat.shape[:-1], *shape)) for part, shape in zip(parts, shapes, strict=True)]
        return views

    def _moved(self) -> bool:
        """Return whether somebody has replaced, copied or moved parameters since they were tied."""
        same = all(owner._parameters[leaf] is value for (owner, leaf), value in zip(self.owners, self.params, strict=True))
        return not same or [parameter.data_ptr() for parameter in self.params] != self._places

    def _check_place(self) -> None:
        # Tying them only now would pull the memory away under a loss whose backward pass still reads it.
        if self.flats[0].dim() == 1 and self._moved():
            raise RuntimeError("optimizer: a parameter was replaced, copied or moved within an update; call begin(update) before its loss")

    def _tie(self) -> list[Tensor]:
        """Make the parameters of each group views of a flat tensor, and return these."""
        ends = [0, *itertools.accumulate(len(shapes) for shapes in self.shapes)]
        self.flats = [
            torch.cat([parameter.detach().reshape(-1) for parameter in self.params[begin:end]]) for begin, end in itertools.pairwise(ends)
        ]
        self._point_at_flats()
        return self.flats

    def _point_at_flats(self) -> None:
        for parameter, view in zip(self.params, self.split(self.flats), strict=True):
            parameter.data = view
        self._places = [parameter.data_ptr() for parameter in self.params]

    def _step_of_each(self) -> list[Tensor]:
        return [step for step, shapes in zip(self.steps, self.shapes, strict=True) for _ in shapes]


def _joined(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors flat, those that lie one behind the other in the same memory as one."""
    joined: list[Tensor] = []
    sizes: list[int] = []
    end = -1
    for tensor in tensors:
        if (
            tensor.data_ptr() == end
            and tensor.is_contiguous()
            and tensor.untyped_storage().data_ptr() == joined[-1].untyped_storage().data_ptr()
        ):
            sizes[-1] += tensor.numel()
        else:
            joined.append(tensor.contiguous())
            sizes.append(tensor.numel())
        end = joined[-1].data_ptr() + sizes[-1] * tensor.element_size()
    return [tensor.as_strided((size,), (1,)) for tensor, size in zip(joined, sizes, strict=True)]


def check_all_learn(module: nn.Module, optimizers: Sequence[GroupOptimizer], *, apart_from: tuple[str, ...] = ()) -> None:
    """Check that the optimizers hold all parameters of a module that want a gradient, as the module has them now.

    Args:
        module: owner of the parameters.
        optimizers: made for it.
        apart_from: prefixes of parameters that somebody else trains.

    Raises:
        ValueError: a parameter in none of them, or one whose network was replaced.
    """
    present = {name: value for name, value in module.named_parameters() if not name.startswith(apart_from)}
    held = {name: owner._parameters[leaf] for one in optimizers for name, (owner, leaf) in zip(one.names, one.owners, strict=True)}
    if replaced := [name for name, value in held.items() if present.get(name) is not value]:
        raise ValueError(f"model: {replaced[0]} and {len(replaced) - 1} others were replaced; call agent.begin_learning() after that")
    if left := [name for name, value in present.items() if value.requires_grad and name not in held]:
        group = f"groups['{left[0].split('.')[0]}.'] = 1.0"
        raise ValueError(
            f"model: no optimiser changes {', '.join(left)}; set agent.objectives.{group} and call agent.begin_learning(), or take their "
            "gradient away by requires_grad_(False)"
        )
