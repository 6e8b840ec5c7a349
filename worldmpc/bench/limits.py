"""What the machine allows: matrix products back to back, and on a GPU the launch of a graph that does nothing."""

from __future__ import annotations

import platform
import timeit
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from worldmpc.bench.products import Product

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Type of both factors and of the result, for each precision of the configuration."""
ONEDNN = (
    platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
"""Whether PyTorch offers oneDNN's products besides those of its BLAS on this kind of processor."""


class Limit:
    """The products of a verb, back to back.

    On a CPU each is done by the faster of the libraries that PyTorch offers, on a GPU all are captured as one graph, so that no
    launch overhead counts.

    Args:
        products: what to multiply; the contents are random.
        device: where.
        precision: ``fp32`` or ``bf16``.
    """

    def __init__(self, products: Sequence[Product], device: torch.device, precision: str = "fp32") -> None:
        dtype = DTYPES[precision]
        buffers: dict[tuple[str, int, int], Tensor] = {}
        fastest: dict[tuple[str, int, int, int], Callable[[], object]] = {}

        def buffer(role: str, rows: int, columns: int) -> Tensor:
            # Equal shapes share memory: real weights and activations would be read from farther away, so the limit is a generous one.
            if (role, rows, columns) not in buffers:
                buffers[role, rows, columns] = torch.randn(rows, columns, device=device).to(dtype)
            return buffers[role, rows, columns]

        self._calls: list[tuple[Callable[[], object], int]] = []
        for _, kind, m, n, k, count in products:
            if (kind, m, n, k) not in fastest:
                left = buffer("left", k, m).t() if kind == "weights" else buffer("left", m, k)
                right = buffer("right", n, k).t() if kind == "forward" else buffer("right", k, n)
                fastest[kind, m, n, k] = _fastest_product(left, right, buffer("out", m, n))
            self._calls.append((fastest[kind, m, n, k], count))
        self._graph = _capture(self._run, device) if device.type == "cuda" else None

    def __call__(self) -> None:
        """Do all products once."""
        if self._graph is None:
            self._run()
        else:
            self._graph.replay()

    def _run(self) -> None:
        for call, count in self._calls:
            for _ in range(count):
                call()


class LaunchFloor:
    """A CUDA graph of one kernel that sets one number: what starting any graph, and waiting for its end, costs at least."""

    def __init__(self, device: torch.device) -> None:
        self._number = torch.ones(1, device=device)
        self._graph = _capture(self._number.zero_, device)

    def __call__(self) -> None:
        """Start it; whoever measures waits for its end."""
        self._graph.replay()


def onednn_product(left: Tensor, right: Tensor) -> Tensor:
    """[M, K], [N, K] (its rows are the columns of the factor) -> [M, N] on the CPU by oneDNN, without gradient."""
    return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")


def _fastest_product(left: Tensor, right: Tensor, out: Tensor) -> Callable[[], object]:
    """Return a function that multiplies [m, k] x [k, n] in the fastest way found in a short trial."""
    calls: list[Callable[[], object]] = [lambda: torch.mm(left, right, out=out)]
    if not ONEDNN or not left.is_cpu:
        return calls[0]
    columns = right.t()
    calls.append(lambda: onednn_product(left, columns))
    return min(calls, key=lambda call: min(timeit.repeat(call, number=1, repeat=10)))


def _capture(function: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """Capture a function as CUDA graph, after calling it once on the stream of the capture, where libraries prepare themselves."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            function()
    return graph
