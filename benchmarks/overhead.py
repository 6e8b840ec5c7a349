"""What the variants of TD-MPC2 cost: parameters, memory, milliseconds per update and per decision, all of them measured in turns.

Run from the repository's root: ``python -m benchmarks.overhead results.json repeats [labels=a,b] [key=value ...]``, as in ``preset=cpu``
or ``device=cuda``. Labels are those of the named sets, and ``director``, which is measured only where it is asked for.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from worldmpc.agents import make_agent
from worldmpc.agents.director import Director
from worldmpc.agents.tdmpc2 import TDMPC2
from worldmpc.bench.measure import interleave, summary, synthetic_batch
from worldmpc.cli.words import override_values
from worldmpc.config import SWEEPS, RunConfig, make_config, network_width
from worldmpc.functional import parameter_table
from worldmpc.report.overhead import SCHEMA
from worldmpc.report.provenance import command_line, git_commit, machine_info
from worldmpc.runtime import keep_freed_memory, resolve_device, set_threads, suggested_threads
from worldmpc.types import Agent, EnvSpec, SequenceBatch

OBS, ACTIONS = 24, 6
SPEC = EnvSpec("synthetic", (OBS,), ACTIONS, 500, can_terminate=False)


def main() -> None:
    """Measure all labels of all named sets, and the most heads with the seed's bootstrap, and write them."""
    asked = [word.removeprefix("labels=").split(",") for word in sys.argv[3:] if word.startswith("labels=")]
    words = override_values([word for word in sys.argv[3:] if not word.startswith("labels=")])
    variants = {label: own for each in SWEEPS.values() for label, own in each.items()}
    variants["A4, bootstrap=primary"] = (*variants["A4"], "multi_gamma.bootstrap=primary")
    if asked:
        known = variants | {"director": ("agent=director",)}
        variants = {label: known[label] for label in asked[0]}
    learning = {"policy.skip_seed_updates": False}  # or the first updates of some would leave the policy out
    configs = {label: make_config(**(override_values(own) | words | learning)) for label, own in variants.items()}
    first = next(iter(configs.values()))
    device = torch.device(resolve_device(first.device))
    keep_freed_memory()
    set_threads(first.threads or suggested_threads(network_width(first)))
    agents = {label: make_agent(config, SPEC, device) for label, config in configs.items()}
    calls: dict[str, Callable[[], Any]] = {}
    for label, agent in agents.items():
        calls |= {f"{label} {name}": call for name, call in verbs(agent, device).items()}
    times = interleave(calls, int(sys.argv[2]), device)
    rows = [row(label, configs[label], agents[label], times) for label in agents]
    record = {
        "schema": SCHEMA,
        "command": command_line(),
        "commit": git_commit(),
        "machine": machine_info(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    Path(sys.argv[1]).write_text(json.dumps(record, indent=2) + "\n")


def verbs(agent: Agent, device: torch.device) -> dict[str, Callable[[], Any]]:
    """Return what is measured of an agent: its updates (as many as repeat), a decision, and a reanalysis where there is one."""
    assert isinstance(agent, TDMPC2 | Director)
    config, carry, obs = agent.config, agent.init_carry(1), torch.randn(1, OBS, device=device)
    window = agent.window if isinstance(agent, Director) else config.window
    batch = with_extras(synthetic_batch(window, config.loss.batch_size, OBS, ACTIONS, device), config)
    calls: dict[str, Callable[[], Any]] = {
        "update": lambda: [agent.update(batch) for _ in range(updates(config))],
        "plan": lambda: agent.act(carry, obs, "explore"),  # type: ignore[arg-type]
    }
    if isinstance(agent, TDMPC2) and config.reanalyze.interval:
        replayed = torch.randn(config.window * config.reanalyze.batch_size, OBS, device=device)
        calls["replan"] = lambda: agent.replan(replayed)
    return calls


def updates(config: RunConfig) -> int:
    """Return after how many updates all parts have learned as often as they should."""
    return config.manager.update_every if config.agent == "director" else 1


def with_extras(batch: SequenceBatch, config: RunConfig) -> SequenceBatch:
    """Return a batch with a plan and a goal at every step."""
    std, code = torch.full_like(batch.action, 0.3), torch.zeros(*batch.reward.shape, config.goal_vae.n_latents, device=batch.reward.device)
    extras = {"plan_mean": batch.action, "plan_elite": batch.action, "plan_std": std, "plan_value": torch.zeros_like(batch.reward)}
    return batch._replace(extras={**extras, "goal_code": code})


def row(label: str, config: RunConfig, agent: Agent, times: dict[str, list[float]]) -> dict[str, Any]:
    """Return the measurements of one variant; ``update`` holds its share of the reanalyses."""
    parameters = dict(parameter_table(agent.model))
    # Parameters, slow copies, and Adam's two moments of what learns.
    state = sum(value.numel() * value.element_size() for value in agent.model.state_dict().values())
    moments = 2 * 4 * parameters["total"]
    update = summary([time / updates(config) for time in times[f"{label} update"]])
    replan = summary(times[f"{label} replan"]) if f"{label} replan" in times else None
    share = 0.0 if replan is None else replan["median_ms"] / config.reanalyze.interval
    return {
        "label": label,
        "agent": config.agent,
        "preset": config.preset,
        "multi_gamma": dataclasses.asdict(config.multi_gamma),
        "parameters": parameters,
        "memory_mib": (state + moments) / 2**20,
        "update": update,
        "replan": replan,
        "update_ms": update["median_ms"] + share,
        "plan": summary(times[f"{label} plan"]),
    }


if __name__ == "__main__":
    main()
