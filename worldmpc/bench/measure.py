"""Measuring one configuration."""

from __future__ import annotations

import dataclasses
import gc
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib import metadata
from typing import Any

import numpy as np
import torch

from worldmpc.agents.stack import Stack
from worldmpc.agents.tdmpc2 import TDMPC2
from worldmpc.bench.limits import LaunchFloor, Limit
from worldmpc.bench.products import Product, plan_products, total_flops, update_products
from worldmpc.config import ConfigError, RunConfig, lookup, resolve_model
from worldmpc.envs import canonical_task, make_envs
from worldmpc.report.benchmarks import SCHEMA
from worldmpc.report.provenance import command_line, git_commit, machine_info
from worldmpc.runtime import check_modes, keep_compiled_code, keep_freed_memory, resolve_device, set_threads, suggested_threads
from worldmpc.training.trainer import Solo, Team, collect_together, learn_together, make_state
from worldmpc.types import EnvSpec, SequenceBatch

_COUNTED = (
    *("agent", "policy.objective", "value.target", "reanalyze.interval", "multi_gamma.enabled"),
    *("model.value", "model.policy", "model.num_dynamics"),
)
"""Keys whose published values are those that matrix products are counted for."""
WARM_UP = 3
"""Rounds before measuring, behind the first call: memory is allocated, and graphs are captured."""
SEED_DECISIONS = 64
"""Random decisions before the end-to-end measurement."""


def record(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what ``worldmpc bench json=`` writes: rows of :func:`bench` (the very list), and what measures them."""
    return {
        "schema": SCHEMA,
        "command": command_line(),
        "commit": git_commit(),
        "machine": machine_info(),
        "versions": {name: metadata.version(name) for name in ("worldmpc", "torch", "numpy", "gymnasium", "mujoco", "dm-control")},
        "rows": rows,
    }


def check(config: RunConfig, *, obs_dim: int, action_dim: int, repeats: int, seconds: float) -> None:
    """Check what can be said about the arguments of :func:`bench` without measuring.

    Raises:
        ConfigError: a device or mode that cannot be used, an unknown task, or an argument out of range.
    """
    for name, value in (("obs_dim", obs_dim), ("action_dim", action_dim), ("repeats", repeats)):
        if value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}")
    if not 0 <= seconds < float("inf"):
        raise ConfigError(f"seconds: expected a finite number, 0 or more, got {seconds}")
    plain = RunConfig()
    for name in _COUNTED:
        if lookup(config, name) != lookup(plain, name):
            raise ConfigError(
                f"{name}: bench counts the matrix products of agent=tdmpc2 as published; leave it out, and measure variants by "
                "`python -m benchmarks.overhead`"
            )
    check_modes(config, resolve_device(config.device))
    if seconds:
        canonical_task(config.task)


def bench(config: RunConfig, *, obs_dim: int = 24, action_dim: int = 6, repeats: int = 20, seconds: float = 5.0) -> dict[str, Any]:
    """Measure plan, update, environment, and decisions per second of one configuration; return plain data for JSON.

    ``plan`` is acting in exploration and ``update`` an update, noise included, on synthetic data, of all seeds where they are stacked;
    ``plan`` is None without planning. In both, ``limit_ms`` is the best time of their matrix products in the same precision,
    ``limit_fp32_ms`` that in float32 (the lower one is the limit where bf16 is allowed), ``fraction`` is the limit over the
    median, and ``fraction_best`` the limit over the best time, which a disturbed machine changes less. ``compile_s`` is the first
    call where ``compile=true``; what the compiler finds in its cache on disk shortens it. ``launch_floor_us`` is the best time
    of an empty graph on a GPU.

    Args:
        config: sizes, device, threads, precision, compilation, and the task of the last two measurements.
        obs_dim: observation dimensions of the synthetic data.
        action_dim: action dimensions of the synthetic data.
        repeats: measured calls of each kind.
        seconds: length of the environment and of the end-to-end measurement each; 0 leaves both out.

    Raises:
        ConfigError: a device or a task that cannot be used, or an argument out of range.
    """
    check(config, obs_dim=obs_dim, action_dim=action_dim, repeats=repeats, seconds=seconds)
    keep_freed_memory()
    if config.compile:
        keep_compiled_code()
    set_threads(config.threads or suggested_threads(resolve_model(config.model).mlp_dim))
    device = torch.device(resolve_device(config.device))
    _forget_earlier(config, device)
    verbs, floor_us = _measure_verbs(config, device, obs_dim, action_dim, repeats)
    environment = end_to_end = None
    if seconds:
        environment = measure_environment(config, seconds)
        _forget_earlier(config, None)
        end_to_end = measure_training(config, device, seconds)
    return {
        "config": config.to_dict(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "obs_dim": obs_dim,
        "action_dim": action_dim,
        "repeats": repeats,
        "plan": verbs.get("plan"),
        "update": verbs["update"],
        "launch_floor_us": floor_us,
        "environment": environment,
        "end_to_end": end_to_end,
        "memory": _memory(device),
    }


def _measure_verbs(
    config: RunConfig, device: torch.device, obs_dim: int, action_dim: int, repeats: int
) -> tuple[dict[str, dict[str, Any]], float | None]:
    """Return the measurements of plan and update, and the launch floor in microseconds."""
    spec = EnvSpec("synthetic", (obs_dim,), action_dim, None, can_terminate=False)
    agents, team = _team(config, spec, device)
    obs = [torch.randn(config.env.num_envs, obs_dim, device=device) for _ in agents]
    carries = [agent.init_carry(config.env.num_envs) for agent in agents]
    batches = [synthetic_batch(config.window, config.loss.batch_size, obs_dim, action_dim, device) for _ in agents]
    calls: dict[str, Callable[[], Any]] = {"update": lambda: team.update(batches)}
    terminates, seeds = agents[0].terminates, len(agents)
    counted = {"update": _of_seeds(update_products(config, obs_dim, action_dim, terminates=terminates), seeds)}
    precisions: dict[str, str] = {"update": config.train.precision}
    if config.planner.mpc:
        calls["plan"] = lambda: team.act(carries, obs)
        counted["plan"] = _of_seeds(plan_products(config, obs_dim, action_dim, terminates=terminates), seeds)
        precisions["plan"] = config.planner.precision
    first = {name: _seconds(call, device) for name, call in calls.items()}
    verbs = list(calls)
    for name in verbs:
        for precision in dict.fromkeys(("fp32", precisions[name])):
            calls[f"{name} {precision}"] = Limit(counted[name], device, precision)
    if device.type == "cuda":
        calls["floor"] = LaunchFloor(device)
    times = interleave(calls, repeats, device)
    results: dict[str, dict[str, Any]] = {}
    for name in verbs:
        flops, limits, limits_fp32 = total_flops(counted[name]), times[f"{name} {precisions[name]}"], times[f"{name} fp32"]
        limit, median = min(*limits, *limits_fp32), float(np.median(times[name]))
        results[name] = {
            "precision": precisions[name],
            "compile_s": first[name] if config.compile else None,
            **summary(times[name]),
            "limit_ms": limit,
            "limit_median_ms": float(np.median(limits)),
            "limit_fp32_ms": min(limits_fp32),
            "fraction": limit / median,
            "fraction_best": limit / min(times[name]),
            "flops": flops,
            "limit_gflops_per_s": flops / limit / 1e6,
            "products": [product._asdict() for product in counted[name]],
        }
    return results, 1e3 * min(times["floor"]) if "floor" in times else None


def _team(config: RunConfig, spec: EnvSpec, device: torch.device) -> tuple[list[TDMPC2], Team]:
    """Return the agents of all seeds, and who acts and learns for them."""
    seeds = config.seeds or (config.seed,)
    agents = [TDMPC2(dataclasses.replace(config, seed=seed, seeds=None), spec, device) for seed in seeds]
    return agents, Solo(agents[0]) if len(agents) == 1 else Stack(agents)


def _of_seeds(products: list[Product], seeds: int) -> list[Product]:
    return [product._replace(count=product.count * seeds) for product in products]


def synthetic_batch(length: int, batch_size: int, obs_dim: int, action_dim: int, device: torch.device) -> SequenceBatch:
    """Return a batch of whole windows with random contents."""
    steps = (length, batch_size)
    return SequenceBatch(
        obs=torch.randn(length + 1, batch_size, obs_dim, device=device),
        action=torch.rand(*steps, action_dim, device=device) * 2 - 1,
        reward=torch.rand(steps, device=device),
        terminated=torch.zeros(steps, device=device),
        truncated=torch.zeros(steps, device=device),
        mask=torch.ones(steps, device=device),
        index=torch.zeros(steps, dtype=torch.int64, device=device),
    )


def measure_environment(config: RunConfig, seconds: float) -> dict[str, Any]:
    """Step the environments of ``config.task`` with random actions, drawn beforehand, for about ``seconds``."""
    with make_envs(config.task, config.env, seed=config.seed) as envs:
        generator = torch.Generator().manual_seed(config.seed)
        actions = torch.rand(64, envs.num_envs, envs.spec.action_dim, generator=generator) * 2 - 1
        envs.reset()
        for action in actions[:WARM_UP]:
            envs.step(action)
        times: list[float] = []
        begin = last = time.perf_counter()
        while last - begin < seconds:
            envs.step(actions[len(times) % len(actions)])
            now = time.perf_counter()
            times.append(1e3 * (now - last))
            last = now
        rate = len(times) * envs.num_envs / (last - begin)
        return {
            "task": envs.spec.name,
            "num_envs": envs.num_envs,
            "workers": config.env.workers,
            "seconds": last - begin,
            "vector_steps": len(times),
            **summary(times),
            "decisions_per_s": rate,
            "env_steps_per_s": rate * envs.spec.action_repeat,
        }


def measure_training(config: RunConfig, device: torch.device, seconds: float) -> dict[str, Any]:
    """Train on ``config.task`` for about ``seconds``: acting, environment, replay and updates, without evaluation and logging."""
    config = dataclasses.replace(
        config,
        replay=dataclasses.replace(config.replay, capacity=min(config.replay.capacity, 100_000)),
        train=dataclasses.replace(config.train, seed_decisions=SEED_DECISIONS),
    )
    with ExitStack() as stack:
        vectors = [stack.enter_context(make_envs(config.task, config.env, seed=seed)) for seed in config.seeds or (config.seed,)]
        envs = vectors[0]
        agents, team = _team(config, envs.spec, device)
        states = [make_state(agent, own) for agent, own in zip(agents, vectors, strict=True)]
        for own in vectors:
            own.reset()
        while states[0].source.decisions < SEED_DECISIONS or not all(state.source.ready() for state in states):
            collect_together(team, states)
        for state in states:  # the seed phase's updates come all at once; two of them, and then the steady state
            state.source.updates = max(int(state.decisions * config.train.utd) - 2, 0)

        def step() -> None:
            collect_together(team, states, config.train.overlap)
            if not config.train.overlap:
                learn_together(team, states)

        learn_together(team, states)
        for _ in range(WARM_UP):
            step()
        _synchronize(device)
        before, begin = [(state.decisions, state.updates) for state in states], time.perf_counter()
        while time.perf_counter() - begin < seconds:
            step()
        _synchronize(device)
        elapsed = time.perf_counter() - begin
        decisions = sum(state.decisions - old for state, (old, _) in zip(states, before, strict=True))
        updates = sum(state.updates - old for state, (_, old) in zip(states, before, strict=True))
    return {
        "task": envs.spec.name,
        "obs_dim": envs.spec.obs_shape[0],
        "action_dim": envs.spec.action_dim,
        "num_envs": envs.num_envs,
        "utd": config.train.utd,
        "seconds": elapsed,
        "decisions": decisions,
        "updates": updates,
        "decisions_per_s": decisions / elapsed,
        "env_steps_per_s": decisions * envs.spec.action_repeat / elapsed,
        "updates_per_s": updates / elapsed,
    }


def _forget_earlier(config: RunConfig, device: torch.device | None) -> None:
    """Free what was measured before, on the device as well, and let the compiler begin anew.

    The compiler keeps a few variants of a function, and leaves further ones uncompiled.
    """
    gc.collect()
    if config.compile:
        torch.compiler.reset()
    if device is not None and device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def interleave(functions: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Call all functions in turns, so that a disturbance of the machine meets all of them; return milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(WARM_UP + repeats):
        for name, function in functions.items():
            elapsed = 1e3 * _seconds(function, device)
            if repeat >= WARM_UP:
                times[name].append(elapsed)
    return times


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    _synchronize(device)
    begin = time.perf_counter()
    function()
    _synchronize(device)
    return time.perf_counter() - begin


def summary(times: Sequence[float]) -> dict[str, float]:
    """Return median, 10th and 90th percentile and the shortest of times in milliseconds."""
    p10, median, p90 = np.percentile(times, [10, 50, 90]).tolist()
    return {"median_ms": median, "p10_ms": p10, "p90_ms": p90, "best_ms": min(times)}


def _memory(device: torch.device) -> dict[str, float | None]:
    """Peak memory in MiB: of this process, with all that it measured before, and on the GPU, of this measurement alone."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return {"peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, "peak_cuda_mib": peak}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
