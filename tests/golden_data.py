"""Recorded numbers of the reference implementation (see ``golden/README.md``), as agents and batches of ours."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.testing import assert_close

from worldmpc.agents.tdmpc2 import TDMPC2
from worldmpc.config import make_config
from worldmpc.types import EnvSpec, SequenceBatch

FOLDER = Path(__file__).parent / "golden"
SETS = ("tiny", "tiny_episodic")


@cache
def load(name: str) -> dict[str, Tensor]:
    """Return the arrays of one recorded file."""
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


def our_name(name: str) -> str:
    """Rename a recorded parameter to ours."""
    network, rest = name.split(".", 1)
    return f"{network}.layers.{rest}" if network in ("q", "target_q") else name


def parameters(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return recorded parameters below a prefix under our names."""
    return {our_name(key.removeprefix(prefix)): value for key, value in arrays.items() if key.startswith(prefix)}


def agent(name: str, **overrides) -> TDMPC2:
    """Return an agent with the recorded configuration and parameters."""
    recorded = json.loads((FOLDER / f"{name}.json").read_text())
    theirs = recorded["config"]
    model = {
        key: theirs[key] for key in ("enc_dim", "mlp_dim", "latent_dim", "num_enc_layers", "num_q", "num_bins", "dropout", "simnorm_dim")
    }
    planner = {key: theirs[key] for key in ("horizon", "iterations", "num_samples", "num_elites", "num_pi_trajs", "temperature")}
    config = make_config(
        model=model | {"simnorm_layout": "consecutive", "continuation": "hard"},
        planner=planner | {"min_std": float(theirs["min_std"]), "max_std": float(theirs["max_std"])},
        **{"loss.batch_size": theirs["batch_size"], **overrides},
    )
    spec = EnvSpec(
        "x", tuple(theirs["obs_shape"]["state"]), theirs["action_dim"], theirs["episode_length"], can_terminate=theirs["episodic"]
    )
    result = TDMPC2(config, spec)
    missing = result.model.load_state_dict(parameters(load(name), "param/"))
    assert not missing.missing_keys
    return result


def batch(name: str) -> SequenceBatch:
    """Return the recorded batch."""
    arrays = load(name)
    flags = arrays["batch/terminated"].squeeze(-1)
    return SequenceBatch(
        obs=arrays["batch/obs"],
        action=arrays["batch/action"],
        reward=arrays["batch/reward"].squeeze(-1),
        terminated=flags,
        truncated=torch.zeros_like(flags),
        mask=torch.ones_like(flags),
        index=torch.zeros(flags.shape, dtype=torch.int64),
    )


def check_compiled(name: str) -> None:
    """Assert that a compiled update and plan equal the eager ones, and that the next ones do not compile again."""
    recorded = batch(name)
    agents = [agent(name, compile=compiled, **{"model.dropout": 0.01}) for compiled in (False, True)]
    noise = agents[0].streams["update"].draw(agents[0].objectives.noise_specs(3, 8))
    plan_noise = agents[0].streams["explore"].draw(agents[0].planner.noise_specs(2))
    obs, start = recorded.obs[0, :2], agents[0].init_carry(2).plan

    def step(one: TDMPC2):
        plan = one._plan(one.model, one.model.encode(obs).detach(), start, plan_noise, True)
        one.update_with_noise(recorded, noise)
        return plan

    expected, compiled = (step(one) for one in agents)
    for ours, theirs in zip(compiled[:5], expected[:5], strict=True):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    state = agents[1].model.state_dict()
    for key, value in agents[0].model.state_dict().items():
        assert (state[key] - value).abs().max() < 1e-4, key
    with torch.compiler.set_stance("fail_on_recompile"):
        step(agents[1])
