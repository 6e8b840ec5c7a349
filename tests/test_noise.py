"""Named streams of noise."""

import math

import torch

from worldmpc.noise import NoiseSpec, NoiseStream, derive_seed, gumbel

SPECS = {
    "normal": NoiseSpec("normal", (4, 5000)),
    "uniform": NoiseSpec("uniform", (4, 5000)),
    "exponential": NoiseSpec("exponential", (4, 5000)),
    "subset": NoiseSpec("subset", (3000, 2), 5),
    "keep": NoiseSpec("keep", (50, 4000), 0.01),
}


def test_moments():
    noise = NoiseStream(1, "a").draw(SPECS)
    assert abs(noise["normal"].mean()) < 0.03 and abs(noise["normal"].std() - 1) < 0.03
    assert noise["uniform"].min() >= 0 and noise["uniform"].max() < 1 and abs(noise["uniform"].mean() - 0.5) < 0.01
    assert noise["exponential"].min() > 0 and abs(noise["exponential"].mean() - 1) < 0.03


def test_subsets_are_distinct_and_uniform():
    subset = NoiseStream(1, "a").draw(SPECS)["subset"]
    assert (subset[:, 0] != subset[:, 1]).all()
    counts = torch.bincount(subset.flatten(), minlength=5).float() / subset.numel()
    assert (counts - 0.2).abs().max() < 0.02


def test_keep_drops_each_entry_independently():
    """200k entries at rate 0.01: the standard deviation of the rate is 0.00022; pairs are dropped together at rate squared."""
    stream = NoiseStream(1, "a")
    keep = stream.draw(SPECS)["keep"]
    assert set(keep.unique().tolist()) == {0.0, torch.tensor(1 / 0.99).item()}
    assert abs((keep == 0).float().mean() - 0.01) < 0.001
    rate = NoiseSpec("keep", (1000, 400), 0.3)
    dropped = (stream.draw({"x": rate})["x"] == 0).float()
    assert abs(dropped.mean() - 0.3) < 0.005
    assert abs((dropped[:, 1:] * dropped[:, :-1]).mean() - 0.09) < 0.005
    assert abs(dropped.sum(1).var() - 400 * 0.3 * 0.7) < 15  # binomial per row, not a fixed count


def test_streams_are_reproducible_and_independent():
    same = [NoiseStream(1, "a").draw(SPECS) for _ in range(2)]
    assert all(torch.equal(same[0][name], same[1][name]) for name in SPECS)
    for other in (NoiseStream(2, "a"), NoiseStream(1, "b"), NoiseStream(1, "a", 0)):
        assert not torch.equal(same[0]["normal"], other.draw(SPECS)["normal"])
    assert len({derive_seed(seed, purpose) for seed in range(50) for purpose in ("a", "b", "ab")}) == 150


def test_state_continues():
    stream = NoiseStream(3, "x")
    stream.draw(SPECS)
    state = {name: value.clone() for name, value in stream.state_dict().items()}
    expected = stream.draw(SPECS)
    resumed = NoiseStream(99, "y")
    resumed.load_state_dict(state)
    assert all(torch.equal(expected[name], value) for name, value in resumed.draw(SPECS).items())


def test_gumbel_numbers_are_exact_and_ordered():
    normal = torch.linspace(-8, 5, 400)
    exact = -torch.log(-torch.special.log_ndtr(normal.double()))
    torch.testing.assert_close(gumbel(normal).double(), exact, rtol=2e-6, atol=2e-6)
    assert (gumbel(normal).diff() > 0).all()
    samples = gumbel(torch.randn(200_000, generator=torch.Generator().manual_seed(0)))
    assert abs(float(samples.mean()) - 0.57722) < 0.01 and abs(float(samples.var()) - math.pi**2 / 6) < 0.03
