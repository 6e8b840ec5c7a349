"""Parameter groups and their optimisers, masked trees, and compilation."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
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
    parts = [tree_where(mask, one, other) for one, other in zip(yes, no, strict=True)]
    return type(yes)(*parts) if hasattr(yes, "_fields") else type(yes)(parts)  # type: ignore[return-value]


COMPILE_BACKEND = "inductor"
"""What ``compile=true`` compiles with."""


def maybe_compile(function: FunctionT, enabled: bool) -> FunctionT:
    """Compile a pure function of static shapes, or return it as it is."""
    return Compiled(function) if enabled else function  # type: ignore[return-value]


class Compiled:
    """A function compiled by ``torch.compile``, and how long that took."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = torch.compile(function, dynamic=False, backend=COMPILE_BACKEND)
        self.seconds: float | None = None
        """Seconds of the first call, nearly all of them compilation; None before it."""

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        if self.seconds is not None:
            return self._function(*args)
        begin = time.perf_counter()
        result = self._function(*args)
        self.seconds = time.perf_counter() - begin
        return result


def tree_map(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply a function to every tensor of nested (named) tuples and dicts; anything else stays."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {name: tree_map(function, value) for name, value in tree.items()}
    if isinstance(tree, tuple):
        parts = [tree_map(function, value) for value in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree


def tree_tensors(tree: Any) -> list[Tensor]:
    """Return the tensors of nested tuples and dicts in order."""
    found: list[Tensor] = []
    tree_map(found.append, tree)
    return found


class Captured:
    """A function of tensors as one CUDA graph: a call copies its arguments into fixed places and replays all kernels with one launch.

    The first calls run as they are, on a stream of their own, as capturing needs memory and libraries to be warm; then the function is
    captured, and from there on only replayed: it may change tensors in place, but no other state. Results are copies.

    Raises:
        RuntimeError: arguments of other shapes than the first ones.
    """

    WARM_UP = 3
    """Calls before the capture."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._calls = 0
        self._inputs: Any = None
        self._outputs: Any = None
        self._replay: Callable[[], None] | None = None
        self._shapes: list[tuple[torch.Size, torch.dtype]] = []

    def __call__(self, *args: Any) -> Any:
        """Call it with nested tuples and dicts of tensors."""
        shapes = [(tensor.shape, tensor.dtype) for tensor in tree_tensors(args)]
        if not self._calls:
            self._shapes = shapes
        elif shapes != self._shapes:
            raise RuntimeError(f"cuda_graph: the shapes changed from {self._shapes} to {shapes}; a captured graph has fixed ones")
        self._calls += 1
        if self._calls <= self.WARM_UP:
            return self._warm_up(args)
        if self._replay is None:
            self._inputs = tree_map(torch.clone, args)
            self._replay, self._outputs = self._capture()
        for place, value in zip(tree_tensors(self._inputs), tree_tensors(args), strict=True):
            place.copy_(value, non_blocking=True)
        self._replay()
        return tree_map(torch.clone, self._outputs)

    def _warm_up(self, args: Any) -> Any:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = self._function(*args)
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def _capture(self) -> tuple[Callable[[], None], Any]:
        """Return what replays the function on the fixed inputs, and where its results then lie."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._function(*self._inputs)
        return graph.replay, outputs


class CapturedByShape:
    """:class:`Captured` for a few sets of shapes, as training and evaluation have different numbers of environments.

    Raises:
        RuntimeError: more than :attr:`MOST` different sets of shapes.
    """

    MOST = 8

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._graphs: dict[tuple[Any, ...], Captured] = {}

    def __call__(self, *args: Any) -> Any:
        """Call it with nested tuples and dicts of tensors."""
        key = tuple(tensor.shape for tensor in tree_tensors(args))
        if key not in self._graphs:
            if len(self._graphs) == self.MOST:
                raise RuntimeError(f"cuda_graph: more than {self.MOST} different shapes; use cuda_graph=false where they change")
            self._graphs[key] = Captured(self._function)
        return self._graphs[key](*args)


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

    The parameters of a group become views of one flat tensor, so that clipping and Adam are a handful of operations however many
    there are. :meth:`stack` makes one optimizer out of those of several seeds: flat tensors [N, P], everything else per seed.

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
        # One group per learning rate.
        self.scales = list(dict.fromkeys(prefixes.values()))
        prefixes_of = [tuple(prefix for prefix, own in prefixes.items() if own == scale) for scale in self.scales]
        named = [[(name, value) for name, value in module.named_parameters() if name.startswith(group)] for group in prefixes_of]
        self.names = [name for group in named for name, _ in group]
        places = [name.rpartition(".") for name in self.names]
        self._owners = [(module.get_submodule(owner), leaf) for owner, _, leaf in places]
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
        """Return the gradients of a loss [] for the parameters of these groups alone, one flat tensor [*N, P] per group."""
        self._follow()
        found = torch.autograd.grad(loss, self.params)
        lead = self.flats[0].shape[:-1]
        flat = [gradient.reshape(*lead, -1) for gradient in found]
        ends = [0, *itertools.accumulate(len(shapes) for shapes in self.shapes)]
        return [torch.cat(flat[begin:end], -1) for begin, end in itertools.pairwise(ends)]

    def schedule(self, update: int) -> None:
        """Set the learning rates of an update, counted from 0."""
        if self.config.schedule == "constant":
            return
        factor = learning_rate_scale(self.config, update, self.total_updates)
        for lr, scale in zip(self.lrs, self.scales, strict=True):
            lr.fill_(self.config.lr * scale * factor)

    def step(self, gradients: list[Tensor], skip: Tensor) -> tuple[Tensor, Tensor]:
        """Clip the gradients of each seed and apply them, unless ``skip`` [*N] is 1, or their norm not finite, for any seed.

        Returns:
            The norm before clipping [*N], and 1 where a seed was the reason that nothing was applied, else 0 [*N].
        """
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient, dim=-1) for gradient in gradients]), dim=0)
        skip = torch.maximum(skip, (~norm.isfinite()).to(skip.dtype))
        factor = (self.config.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor[..., None])
        self._follow()
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
            views += [part.view(*flat.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True)]
        return views

    def _follow(self) -> None:
        """Take over parameters that somebody has replaced, copied or moved: what the module holds now is what counts."""
        if self.flats[0].dim() > 1:
            return  # a stack's parameters are its own
        now = [owner._parameters[leaf] for owner, leaf in self._owners]
        same = all(one is other for one, other in zip(now, self.params, strict=True))
        if not same or [parameter.data_ptr() for parameter in self.params] != self._places:
            self.params = [parameter for parameter in now if parameter is not None]
            self.flats = self._tie()

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
