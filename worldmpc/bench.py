"""How fast planning and updating are, beside what this machine's matrix products alone allow.

Speed by itself says little: it is the machine's as much as the code's. So the matrix products that the algorithm cannot do
without are timed in the same process, in turns with the code, and the share of time that they explain is the result.
"""

from __future__ import annotations

import itertools
import resource
import sys
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from worldmpc.agents.tdmpc2 import TDMPC2
from worldmpc.config import ConfigError, ModelConfig, RunConfig, resolve_model
from worldmpc.envs import make_envs
from worldmpc.models import kernels
from worldmpc.report.provenance import command_line, git_commit, machine_info
from worldmpc.runtime import keep_freed_memory, resolve_device, set_threads, suggested_threads
from worldmpc.training.trainer import collect, learn, make_state
from worldmpc.types import Batch, EnvSpec

WARM_UP = 3
"""Rounds before measuring: memory is allocated, and compiled functions are compiled."""
SEED_DECISIONS = 64
"""Random decisions before the end-to-end measurement."""


class Product(NamedTuple):
    """Matrix products [m, k] x [k, n] -> [m, n], ``count`` of them."""

    name: str
    kind: Literal["forward", "weights", "inputs"]
    """Which factor is read transposed: the weights in ``forward``, the gradient in ``weights``, none in ``inputs``."""
    m: int
    n: int
    k: int
    count: int = 1

    @property
    def flops(self) -> int:
        """Floating-point operations, a multiplication and an addition each counting one."""
        return 2 * self.m * self.n * self.k * self.count


def plan_products(config: RunConfig, obs_dim: int, action_dim: int, *, terminates: bool = False) -> list[Product]:
    """Return the matrix products of one plan in every one of ``E = env.num_envs`` environments.

    Counted are forward products only, of rows x layer:

    - once: the encoder (E rows); the policy at ``H`` steps and the dynamics between them (``H - 1``) for the ``P`` proposals (E P rows);
    - per iteration: ``H`` dynamics steps and ``H`` rewards of all ``S`` candidates (E S rows; the rewards do not wait for each other
      and are one product of H E S rows), termination likewise where there is such a head, then the policy and **two** critics
      at the last latent.

    Savings that change the formula's evaluation are not assumed: that candidates share their first latent, or that proposals stay the
    same in every iteration.
    """
    nets = _networks(config.model, obs_dim, action_dim)
    planner, envs = config.planner, config.env.num_envs
    iterations = planner.iterations + (planner.extra_iterations if action_dim >= 20 else 0)
    rows, proposals, horizon = envs * planner.num_samples, envs * planner.num_pi_trajs, planner.horizon
    products = list(_forward("encoder", nets["encoder"], envs))
    if proposals:
        products += _forward("proposals: policy", nets["pi"], proposals, horizon)
        products += _forward("proposals: dynamics", nets["dynamics"], proposals, horizon - 1)
    products += _forward("dynamics", nets["dynamics"], rows, iterations * horizon)
    products += _forward("reward", nets["reward"], horizon * rows, iterations)
    if terminates:
        products += _forward("termination", nets["termination"], horizon * rows, iterations)
    products += _forward("terminal policy", nets["pi"], rows, iterations)
    products += _forward("terminal critics", nets["q"], rows, 2 * iterations)
    return [product for product in products if product.count]


def update_products(config: RunConfig, obs_dim: int, action_dim: int, *, terminates: bool = False) -> list[Product]:
    """Return the matrix products of one update on windows of ``T = planner.horizon`` steps and ``B`` of them.

    A forward product of a layer is rows x out x in. Behind it, where gradients flow, come one product of the same size for the
    gradient of the weights, and one for the gradient of the inputs; a first layer needs the latter only for the columns of its
    input that carry gradient.

    - Targets, forward alone: encoder, policy and **two** slow critics on T B rows.
    - World model, forward and both gradients: the encoder on B rows (nothing behind the observation), ``T`` dynamics steps of B rows
      (their weight gradients are one product over T B rows), reward and all ``Q`` critics on T B rows, termination likewise where
      there is such a head. First layers of all but the encoder: gradient for the latent, none for the recorded action.
    - Policy on (T + 1) B rows: forward and both gradients (nothing behind the latent, which is detached); **two** critics
      forward, and backward for their inputs alone, of which the first layer's are the columns of the action.
    """
    nets = _networks(config.model, obs_dim, action_dim)
    model = resolve_model(config.model)
    assert model.latent_dim is not None and model.num_q is not None
    horizon, batch, latent = config.planner.horizon, config.loss.batch_size, model.latent_dim
    rows, policy_rows = horizon * batch, (horizon + 1) * batch
    products = [
        *_forward("target: encoder", nets["encoder"], rows),
        *_forward("target: policy", nets["pi"], rows),
        *_forward("target: critics", nets["q"], rows, 2),
        *_forward("encoder", nets["encoder"], batch),
        *_inputs("encoder", nets["encoder"], batch, 0),
        *_weights("encoder", nets["encoder"], batch),
        *_forward("dynamics", nets["dynamics"], batch, horizon),
        *_inputs("dynamics", nets["dynamics"], batch, latent, horizon),
        *_weights("dynamics", nets["dynamics"], rows),
    ]
    heads = {"reward": 1, "q": model.num_q} | ({"termination": 1} if terminates else {})
    for name, count in heads.items():
        products += _forward(name, nets[name], rows, count)
        products += _inputs(name, nets[name], rows, latent, count)
        products += _weights(name, nets[name], rows, count)
    products += _forward("policy", nets["pi"], policy_rows)
    products += _inputs("policy", nets["pi"], policy_rows, 0)
    products += _weights("policy", nets["pi"], policy_rows)
    products += _forward("policy: critics", nets["q"], policy_rows, 2)
    products += _inputs("policy: critics", nets["q"], policy_rows, action_dim, 2)
    return products


def total_flops(products: Sequence[Product]) -> int:
    """Return the floating-point operations of all products."""
    return sum(product.flops for product in products)


class Limit:
    """The products of a verb, back to back.

    On a CPU each is done by the faster of the libraries that PyTorch offers, on a GPU all are captured as one graph, so that no
    launch overhead counts.
    """

    def __init__(self, products: Sequence[Product], device: torch.device) -> None:
        self._calls: list[tuple[Callable[[], object], int]] = []
        buffers: dict[tuple[str, int, int], Tensor] = {}

        def buffer(role: str, rows: int, columns: int) -> Tensor:
            # Equal shapes share memory: real weights and activations would be read from farther away, so the limit is a generous one.
            if (role, rows, columns) not in buffers:
                buffers[role, rows, columns] = torch.randn(rows, columns, device=device)
            return buffers[role, rows, columns]

        for _, kind, m, n, k, count in products:
            left = buffer("left", k, m).t() if kind == "weights" else buffer("left", m, k)
            right = buffer("right", n, k).t() if kind == "forward" else buffer("right", k, n)
            self._calls.append((_fastest_product(left, right, buffer("out", m, n)), count))
        self._graph: Any = None
        if device.type == "cuda":
            self._run()
            torch.cuda.synchronize(device)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._run()

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


def _fastest_product(left: Tensor, right: Tensor, out: Tensor) -> Callable[[], object]:
    """Return a function that multiplies [m, k] x [k, n] in the fastest way found in a short trial."""
    calls: list[Callable[[], object]] = [lambda: torch.mm(left, right, out=out)]
    if not kernels.ONEDNN or not left.is_cpu:
        return calls[0]
    calls.append(lambda: kernels.onednn_product(left, right.t()))
    return min(calls, key=lambda call: min(timeit.repeat(call, number=1, repeat=10)))


def bench(config: RunConfig, *, obs_dim: int = 24, action_dim: int = 6, repeats: int = 20, seconds: float = 5.0) -> dict[str, Any]:
    """Measure plan, update, and decisions per second; return plain data for JSON.

    ``plan`` is :meth:`TDMPC2.act` in exploration and ``update`` is :meth:`TDMPC2.update`, noise included, on synthetic data.
    ``limit_ms`` is the best time of their matrix products, and ``fraction`` is the limit over the median; ``fraction_best`` is
    the limit over the best time, which a disturbed machine changes less.

    Args:
        config: sizes, device, threads, compilation, and the task of the end-to-end measurement.
        obs_dim: observation dimensions of the synthetic data.
        action_dim: action dimensions of the synthetic data.
        repeats: measured calls of each kind.
        seconds: length of the end-to-end measurement; 0 leaves it out.

    Raises:
        ConfigError: a device or a task that cannot be used, or an argument out of range.
    """
    for name, value in (("obs_dim", obs_dim), ("action_dim", action_dim), ("repeats", repeats)):
        if value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}")
    if not seconds >= 0:
        raise ConfigError(f"seconds: expected 0 or more, got {seconds}")
    keep_freed_memory()
    set_threads(config.threads or suggested_threads(resolve_model(config.model).mlp_dim))
    device = torch.device(resolve_device(config.device))
    end_to_end = measure_training(config, device, seconds) if seconds else None
    agent = TDMPC2(config, EnvSpec("synthetic", (obs_dim,), action_dim, None, can_terminate=False), device)
    obs, carry = torch.randn(config.env.num_envs, obs_dim, device=device), agent.init_carry(config.env.num_envs)
    batch = synthetic_batch(config.planner.horizon, config.loss.batch_size, obs_dim, action_dim, device)
    counted = {
        "plan": plan_products(config, obs_dim, action_dim, terminates=agent.terminates),
        "update": update_products(config, obs_dim, action_dim, terminates=agent.terminates),
    }
    verbs: dict[str, Callable[[], Any]] = {"plan": lambda: agent.act(carry, obs, "explore"), "update": lambda: agent.update(batch)}
    if not config.planner.mpc:
        del counted["plan"], verbs["plan"]
    limits = {name: Limit(products, device) for name, products in counted.items()}
    times = _interleave(verbs | {f"{name} limit": limit for name, limit in limits.items()}, repeats, device)
    return {
        "command": command_line(),
        "commit": git_commit(),
        "machine": machine_info(),
        "versions": {name: metadata.version(name) for name in ("worldmpc", "torch", "numpy", "gymnasium", "mujoco", "dm-control")},
        "threads": torch.get_num_threads(),
        "device": str(device),
        "obs_dim": obs_dim,
        "action_dim": action_dim,
        "repeats": repeats,
        "config": config.to_dict(),
        **{name: _summary(times[name], times[f"{name} limit"], products) for name, products in counted.items()},
        "end_to_end": end_to_end,
        "memory": _memory(device),
    }


def synthetic_batch(length: int, batch_size: int, obs_dim: int, action_dim: int, device: torch.device) -> Batch:
    """Return a batch of whole windows with random contents."""
    steps = (length, batch_size)
    return Batch(
        obs=torch.randn(length + 1, batch_size, obs_dim, device=device),
        action=torch.rand(*steps, action_dim, device=device) * 2 - 1,
        reward=torch.rand(steps, device=device),
        terminated=torch.zeros(steps, device=device),
        truncated=torch.zeros(steps, device=device),
        mask=torch.ones(steps, device=device),
        index=torch.zeros(steps, dtype=torch.int64, device=device),
    )


def measure_training(config: RunConfig, device: torch.device, seconds: float) -> dict[str, Any]:
    """Train on ``config.task`` for about ``seconds``: acting, environment, replay and updates, without evaluation and logging."""
    with make_envs(config.task, config.env, seed=config.seed) as envs:
        agent = TDMPC2(config, envs.spec, device)
        state = make_state(agent, envs, capacity=min(config.replay.capacity, 100_000), seed_decisions=SEED_DECISIONS)
        envs.reset()
        while state.source.decisions < SEED_DECISIONS or not state.source.replay.num_windows():
            collect(state)
        # The seed phase's updates come all at once; two of them, and then the steady state.
        state.source.updates = max(int(state.decisions * config.train.utd) - 2, 0)
        learn(state)
        for _ in range(WARM_UP):
            collect(state)
            learn(state)
        _synchronize(device)
        decisions, updates, begin = state.decisions, state.updates, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            collect(state)
            learn(state)
        _synchronize(device)
        elapsed = time.perf_counter() - begin
        decisions, updates = state.decisions - decisions, state.updates - updates
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


def _networks(config: ModelConfig, obs_dim: int, action_dim: int) -> dict[str, list[int]]:
    """Width of every layer, input first, as :class:`worldmpc.models.world_model.WorldModel` builds them."""
    model = resolve_model(config)
    assert model.enc_dim and model.mlp_dim and model.latent_dim and model.num_enc_layers
    joint, hidden = model.latent_dim + action_dim, [model.mlp_dim] * 2
    return {
        "encoder": [obs_dim, *[model.enc_dim] * max(model.num_enc_layers - 1, 1), model.latent_dim],
        "dynamics": [joint, *hidden, model.latent_dim],
        "reward": [joint, *hidden, model.num_bins],
        "pi": [model.latent_dim, *hidden, 2 * action_dim],
        "q": [joint, *hidden, model.num_bins],
        "termination": [model.latent_dim, *hidden, 1],
    }


def _layers(dims: Sequence[int]) -> Iterator[tuple[int, int]]:
    return itertools.pairwise(dims)


def _forward(name: str, dims: Sequence[int], rows: int, count: int = 1) -> Iterator[Product]:
    for before, after in _layers(dims):
        yield Product(name, "forward", rows, after, before, count)


def _inputs(name: str, dims: Sequence[int], rows: int, first: int, count: int = 1) -> Iterator[Product]:
    """Gradients of the inputs of all layers, last first; of the network's own input only ``first`` columns."""
    for index, (before, after) in reversed(list(enumerate(_layers(dims)))):
        columns = before if index else first
        if columns:
            yield Product(name, "inputs", rows, columns, after, count)


def _weights(name: str, dims: Sequence[int], rows: int, count: int = 1) -> Iterator[Product]:
    for before, after in _layers(dims):
        yield Product(name, "weights", after, before, rows, count)


def _interleave(functions: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Call all functions in turns, so that a disturbance of the machine meets all of them; return milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(WARM_UP + repeats):
        for name, function in functions.items():
            _synchronize(device)
            begin = time.perf_counter()
            function()
            _synchronize(device)
            if repeat >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def _summary(times: Sequence[float], limits: Sequence[float], products: Sequence[Product]) -> dict[str, Any]:
    p10, median, p90 = np.percentile(times, [10, 50, 90]).tolist()
    limit, flops = min(limits), total_flops(products)
    return {
        "median_ms": median,
        "p10_ms": p10,
        "p90_ms": p90,
        "best_ms": min(times),
        "limit_ms": limit,
        "limit_median_ms": float(np.median(limits)),
        "fraction": limit / median,
        "fraction_best": limit / min(times),
        "flops": flops,
        "limit_gflops_per_s": flops / limit / 1e6,
        "products": [product._asdict() for product in products],
    }


def _memory(device: torch.device) -> dict[str, float | None]:
    """Peak memory of this process in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return {"peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, "peak_cuda_mib": peak}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
