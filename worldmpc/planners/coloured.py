"""Temporally coloured noise: smooth action sequences reach further than white ones (Pinneri et al. 2020, section 3.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mixing_matrix(length: int, exponent: float, device: torch.device) -> Tensor:
    """Matrix [H, H] that turns white noise into noise with power spectral density f ** -exponent and unit variance at every step.

    The circular filter of Timmer and König (1995, "On generating power law noise"); the constant part gets the power of the lowest
    frequency 1 / length. Exponent 0 is the identity.
    """
    index = torch.arange(length, device=device)
    frequency = torch.minimum(index, length - index).clamp_min(1).float()
    gain = frequency ** (-0.5 * exponent)
    gain = gain / gain.square().mean().sqrt()
    phase = (index[:, None, None] - index[None, :, None]) * index % length  # integers: cosines of exact angles
    return (gain * torch.cos(phase * (2 * math.pi / length))).mean(-1)


def colour(eps: Tensor, exponent: float) -> Tensor:
    """Colour white noise along its first dimension: [H, ...] -> [H, ...]."""
    with torch.autocast(eps.device.type, enabled=False):  # noise is no place to save on digits
        return torch.tensordot(mixing_matrix(len(eps), exponent, eps.device), eps, 1)
