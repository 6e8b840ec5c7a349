"""Named sets of configurations that are trained to be held against each other: ``worldmpc train sweep=<name>``."""

from __future__ import annotations

from worldmpc.config.base import ConfigError

_MULTI_GAMMA = ("multi_gamma.enabled=true", "multi_gamma.gammas=[primary,0.97,0.995]")

SWEEPS: dict[str, dict[str, tuple[str, ...]]] = {
    "multi_gamma_ablation": {
        "A0": (),
        "A1": ("multi_gamma.enabled=true", "multi_gamma.gammas=[primary,0.97]"),
        "A2": _MULTI_GAMMA,
        "A3": (*_MULTI_GAMMA, "multi_gamma.head=separate"),
        "A4": ("multi_gamma.enabled=true", "multi_gamma.gammas=[primary,0.9,0.95,0.97,0.995,0.998]"),
    },
    "variants": {
        "tdmpc2": (),
        "tdmpc_square": ("agent=tdmpc_square",),
        "bmpc": ("agent=bmpc",),
        "boom": ("agent=boom",),
        "multi_gamma_self": (*_MULTI_GAMMA, "multi_gamma.bootstrap=self"),
        "multi_gamma_primary": (*_MULTI_GAMMA, "multi_gamma.bootstrap=primary"),
        "multi_gamma_mlp": (*_MULTI_GAMMA, "multi_gamma.hidden_layers=2"),
        "multi_gamma_mlp_primary": (*_MULTI_GAMMA, "multi_gamma.hidden_layers=2", "multi_gamma.bootstrap=primary"),
    },
}
"""Name -> label of each configuration -> its overrides. ``multi_gamma_ablation``: baseline, one and two auxiliary discounts, separate
heads, five auxiliary heads. ``variants``: the relatives of TD-MPC2, and auxiliary values of every kind."""


def sweep_overrides(name: str) -> dict[str, tuple[str, ...]]:
    """Return label -> overrides of a named set.

    Raises:
        ConfigError: there is no such set.
    """
    if name not in SWEEPS:
        raise ConfigError(f"sweep: unknown set '{name}'; one of {', '.join(SWEEPS)}")
    return SWEEPS[name]
