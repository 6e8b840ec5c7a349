"""Coloured noise has the spectrum that it promises."""

import math

import pytest
import torch
from torch.testing import assert_close

from worldmpc.planners.coloured import colour, mixing_matrix

CPU = torch.device("cpu")


@pytest.mark.parametrize("length", [1, 2, 3, 8, 31])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 2.0, 4.0])
def test_every_step_has_unit_variance(length, exponent):
    """Exactly, as the covariance is the matrix times its transpose."""
    matrix = mixing_matrix(length, exponent, CPU)
    assert_close((matrix @ matrix.T).diagonal(), torch.ones(length))


@pytest.mark.parametrize("length", [1, 2, 5, 16])
def test_exponent_0_is_white(length):
    assert_close(mixing_matrix(length, 0.0, CPU), torch.eye(length), atol=1e-6, rtol=0)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("length", [32, 33])
def test_slope_of_the_spectrum(length, exponent):
    """A line in the double logarithm of power over frequency, measured on samples."""
    noise = colour(torch.randn(length, 20_000), exponent)
    assert noise.var().item() == pytest.approx(1, rel=0.03)
    assert abs(noise.mean().item()) < 0.02
    power = torch.fft.rfft(noise, dim=0).abs().square().mean(1)[1:]
    frequency = torch.arange(1, len(power) + 1).float().log()
    centered = frequency - frequency.mean()
    slope = (centered * power.log()).sum() / centered.square().sum()
    assert slope.item() == pytest.approx(-exponent, abs=0.03)
    straight = power.log().mean() + slope * centered
    assert (power.log() - straight).abs().max() < 0.1


def test_the_constant_part_has_the_power_of_the_lowest_frequency():
    spectrum = torch.fft.rfft(mixing_matrix(16, 2.0, CPU), dim=0).abs().square().sum(1)
    assert_close(spectrum[0], spectrum[1])
    assert_close(spectrum[1], 4 * spectrum[2])


def test_neighbours_are_correlated_and_all_else_is_independent():
    noise = colour(torch.randn(10, 3, 50_000), 2.0)
    assert (noise[:-1] * noise[1:]).mean() > 0.6
    assert abs((noise[:, 0] * noise[:, 1]).mean().item()) < 0.02
    assert_close(colour(torch.zeros(10, 3), 2.0), torch.zeros(10, 3))


def test_shape_and_precision_stay():
    """Within autocast as well."""
    eps = torch.randn(6, 2, 5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = colour(eps, 1.0)
    assert found.shape == eps.shape and found.dtype == torch.float32
    matrix = mixing_matrix(6, 1.0, CPU)
    assert_close(found[:, 1, 4, 2], matrix @ eps[:, 1, 4, 2])
    assert math.isclose(matrix[0, 1], matrix[3, 4], rel_tol=1e-5), "a circular filter"
