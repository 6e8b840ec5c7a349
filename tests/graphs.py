"""A stand-in for CUDA graphs, for machines without CUDA."""

from __future__ import annotations

import pytest
import torch

from worldmpc import functional


def stand_in_for_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let captured functions be computed again in the place of a graph: into the same results, from the same arguments."""

    def capture(self):
        with torch.random.fork_rng():
            outputs = functional.tree_map(torch.clone, self._inputs)  # only their structure matters before the first replay
        places = {}

        def replay():
            result = self._function(*self._inputs)
            places.setdefault("outputs", result)
            for place, value in zip(functional.tree_tensors(places["outputs"]), functional.tree_tensors(result), strict=True):
                place.copy_(value)
            self._outputs = places["outputs"]

        return replay, outputs

    monkeypatch.setattr(functional.Captured, "_capture", capture)
    monkeypatch.setattr(functional.Captured, "_warm_up", lambda self, args: self._function(*args))
