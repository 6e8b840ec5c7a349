"""What the machine allows: matrix products back to back, and on a GPU the launch of a graph that does nothing."""

from __future__ import annotations

import platform
import timeit
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from worldmpc.bench.products import Product

Call = Callable[[], object]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Type of both factors and of the result, for each precision that a configuration knows."""
ONEDNN = (
    platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
"""Whether PyTorch offers oneDNN's products besides those of its BLAS on this kind of processor."""


class Limit:
    """The products of a verb, back to back.

    On a CPU each is done by the fastest of the libraries that PyTorch offers, where bf16 is allowed in either type, as small
    products are faster in float32. On a GPU all are captured as one graph, so that no launch overhead counts.

    Args:
        products: what to multiply; the contents are random, and conversions between types are left out.
        device: where.
        precision: ``fp32`` or ``bf16``.
    """

    def __init__(self, products: Sequence[Product], device: torch.device, precision: str = "fp32") -> None:
        dtypes = [DTYPES[precision]]
        if precision == "bf16" and device.type == "cpu":
            dtypes.append(torch.float32)
        buffers: dict[tuple[str, int, int, torch.dtype], Tensor] = {}
        fastest: dict[tuple[str, int, int, int], Call] = {}

        def buffer(role: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
            # Equal shapes share memory: real weights and activations would be read from farther away, so the limit is a generous one.
            key = (role, rows, columns, dtype)
            if key not in buffers:
                buffers[key] = torch.randn(rows, columns, device=device).to(dtype)
            return buffers[key]

        self._calls: list[tuple[Call, int]] = []
        for _, kind, m, n, k, count in products:
            if (kind, m, n, k) not in fastest:
                ways: list[Call] = []
                for dtype in dtypes:
                    left = buffer("left", k, m, dtype).t() if kind == "weights" else buffer("left", m, k, dtype)
                    right = buffer("right", n, k, dtype).t() if kind == "forward" else buffer("right", k, n, dtype)
                    ways += _ways(left, right, buffer("out", m, n, dtype))
                fastest[kind, m, n, k] = _fastest(ways)
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
    """A CUDA graph of one kernel that counts its calls in ``calls`` []: what starting any graph and waiting for its end costs."""

    def __init__(self, device: torch.device) -> None:
        self.calls = torch.zeros((), device=device)
        self._graph = _capture(lambda: self.calls.add_(1), device)

    def __call__(self) -> None:
        """Start it; whoever measures waits for its end."""
        self._graph.replay()


def onednn_product(left: Tensor, right: Tensor) -> Tensor:
    """[M, K], [N, K] (its rows are the columns of the factor) -> [M, N] on the CPU by oneDNN, without gradient."""
    return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")


def _ways(left: Tensor, right: Tensor, out: Tensor) -> list[Call]:
    """Return functions that multiply [m, k] x [k, n]."""
    ways: list[Call] = [lambda: torch.mm(left, right, out=out)]
    if ONEDNN and left.is_cpu:
        columns = right.t()
        ways.append(lambda: onednn_product(left, columns))
    return ways


def _fastest(ways: Sequence[Call]) -> Call:
    """Return the fastest function of a short trial."""
    return ways[0] if len(ways) == 1 else min(ways, key=lambda way: min(timeit.repeat(way, number=1, repeat=10)))


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
