"""Functions of nested tensors: masks, compilation, capture as CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from worldmpc.config import ConfigError

TreeT = TypeVar("TreeT")
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def tree_where(mask: Tensor, yes: TreeT, no: TreeT) -> TreeT:
    """Choose between two equal nested tuples of tensors [E, ...] by a mask [E], wherever that is."""
    if isinstance(yes, Tensor) and isinstance(no, Tensor):
        return torch.where(mask.to(yes.device).view(-1, *[1] * (yes.dim() - 1)), yes, no)  # type: ignore[return-value]
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


def seconds_compiling(*functions: Callable[..., Any]) -> float:
    """Return how long compiling those of the functions took that are compiled."""
    return sum(function.seconds or 0.0 for function in functions if isinstance(function, Compiled))


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


def tree_fill(tree: TreeT, tensors: Sequence[Tensor]) -> TreeT:
    """Return a tree of the same structure with other tensors, in the order of :func:`tree_tensors`.

    Raises:
        ValueError: another number of tensors, or one of another shape.
    """
    found = [tuple(tensor.shape) for tensor in tree_tensors(tree)]
    if found != [tuple(tensor.shape) for tensor in tensors]:
        raise ValueError(f"expected tensors of shapes {found}, got {[tuple(tensor.shape) for tensor in tensors]}")
    given = iter(tensors)
    return tree_map(lambda _: next(given), tree)


def tree_rows(tree: TreeT, where: Tensor) -> TreeT:
    """Return some rows of all tensors of a tree: [E, ...] and numbers [n] -> [n, ...]."""
    return tree_map(lambda tensor: tensor[where.to(tensor.device)], tree)


def tree_put(tree: TreeT, where: Tensor, rows: TreeT) -> TreeT:
    """Return a tree [E, ...] with other rows [n, ...] at the places of numbers [n]."""
    pairs = zip(tree_tensors(tree), tree_tensors(rows), strict=True)
    return tree_fill(tree, [old.index_copy(0, where.to(old.device), new.to(old)) for old, new in pairs])


def parameter_table(module: nn.Module) -> list[tuple[str, int]]:
    """Return (component, learned parameters) rows, the last one the total."""
    rows = [
        (name, sum(parameter.numel() for parameter in child.parameters() if parameter.requires_grad))
        for name, child in module.named_children()
    ]
    rows = [row for row in rows if row[1]]
    return [*rows, ("total", sum(count for _, count in rows))]


class Captured:
    """A function of tensors as one CUDA graph: a call copies its arguments into fixed places and replays all kernels with one launch.

    The first calls run as they are, on a stream of their own, as capturing needs memory and libraries to be warm; then the function is
    captured, and from there on only replayed: it may change tensors in place, but no other state. Results are copies.

    Raises:
        ConfigError: arguments of other shapes than the first ones.
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
            raise ConfigError(
                f"cuda_graph: the shapes changed from {self._shapes} to {shapes}; a captured graph has fixed ones; use cuda_graph=false"
            )
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
        ConfigError: more than :attr:`MOST` different sets of shapes.
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
                raise ConfigError(f"cuda_graph: more than {self.MOST} different shapes; use cuda_graph=false where they change")
            self._graphs[key] = Captured(self._function)
        return self._graphs[key](*args)
