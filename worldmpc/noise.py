"""Randomness as an argument: one generator per (seed, purpose), and tensors of noise filled from it.

A part declares the noise that it needs as a dict of :class:`NoiseSpec`; :class:`NoiseStream` fills it outside of
compiled code. Hence seed *i* gives the same numbers alone or in a stack, compiled equals eager, a resumed run
continues the stream, and tests can feed recorded noise.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from worldmpc.types import Noise


class NoiseSpec(NamedTuple):
    """Kind and shape of one noise tensor.

    ``normal``, ``uniform`` and ``exponential`` are the standard distributions. ``subset``: the first ``shape[-1]``
    entries of a random permutation of ``argument`` items (int64). ``keep``: inverted-dropout factors, 0 with
    probability ``argument`` and 1 / (1 - argument) otherwise.
    """

    kind: Literal["normal", "uniform", "exponential", "subset", "keep"]
    shape: tuple[int, ...]
    argument: float = 0.0


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for a purpose; different purposes give independent streams."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in purpose]
    # The count of words goes in as well: numpy takes trailing zeros for padding.
    state = np.random.SeedSequence([len(words), seed, *words]).generate_state(2, np.uint32)
    return (int(state[0]) << 31) ^ int(state[1])


def gumbel(normal: Tensor) -> Tensor:
    """Turn standard normal numbers into standard Gumbel ones, entry by entry and in the same order.

    So one kind of noise serves both kinds of actions: ``argmax(logits + gumbel(eps))`` is a sample of the softmax, and its mode
    where ``eps`` is constant.
    """
    tail = 0.5 * torch.erfc(normal.abs() * math.sqrt(0.5))
    # log Phi(normal), accurate on both sides; torch.special.log_ndtr has no rule for torch.vmap.
    return -torch.log(-torch.where(normal > 0, torch.log1p(-tail), torch.log(tail)))


class NoiseStream:
    """Random numbers of one (seed, purpose), on one device."""

    def __init__(self, seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.generator = torch.Generator(device=self.device)
        self.generator.manual_seed(derive_seed(seed, *purpose))

    def draw(self, specs: Mapping[str, NoiseSpec]) -> Noise:
        """Return a fresh tensor for every spec, drawn in the order of ``specs``."""
        return {name: self._draw(spec) for name, spec in specs.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the generator's state [bytes] uint8."""
        return {"state": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a saved state."""
        self.generator.set_state(state["state"].cpu())

    def _draw(self, spec: NoiseSpec) -> Tensor:
        if spec.kind == "subset":
            items = int(spec.argument)
            return self._empty((*spec.shape[:-1], items)).uniform_(generator=self.generator).argsort(-1)[..., : spec.shape[-1]]
        noise = self._empty(spec.shape)
        if spec.kind == "normal":
            return noise.normal_(generator=self.generator)
        if spec.kind == "uniform":
            return noise.uniform_(generator=self.generator)
        if spec.kind == "exponential":
            return noise.exponential_(generator=self.generator)
        return self._fill_keep(noise, spec.argument)

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, device=self.device)

    def _fill_keep(self, keep: Tensor, rate: float) -> Tensor:
        scale = 1.0 / (1.0 - rate)
        if self.device.type != "cpu":
            return keep.bernoulli_(1.0 - rate, generator=self.generator).mul_(scale)
        # A Poisson number of uniformly placed hits makes the hits of each entry independent Poisson variables, so every
        # entry is dropped independently with probability 1 - exp(-mean) = rate. Far cheaper than one draw per entry.
        mean = torch.tensor(-math.log1p(-rate) * keep.numel(), dtype=torch.float64)
        hits = int(torch.poisson(mean, generator=self.generator))
        keep.fill_(scale)
        keep.view(-1)[torch.randint(keep.numel(), (hits,), generator=self.generator)] = 0.0
        return keep
