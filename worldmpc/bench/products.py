"""The matrix products that planning and updating cannot do without."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from worldmpc.config import ModelConfig, RunConfig, resolve_model


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

    All sequences of an environment begin at the same latent, which does not change while planning. What depends on it alone is
    counted for E rows, once: the first policy step, and the latent's columns of the first layers of dynamics and reward, whose
    first step then needs the columns of the action only. Counted are forward products, of rows x layer:

    - once: the encoder and what depends on the first latent alone (E rows); the policy at the other ``H - 1`` steps and the dynamics
      before them for the ``P`` proposals (E P rows);
    - per iteration: ``H`` dynamics steps and ``H`` rewards of all ``S`` candidates (E S rows; the rewards do not wait for each other
      and are one product of H E S rows, of (H - 1) E S rows in the first layer), termination likewise where there is such a head,
      then the policy and **two** critics at the last latent.

    Not assumed is that the proposals, which stay the same in every iteration, are imagined only once.
    """
    nets = _networks(config.model, obs_dim, action_dim)
    planner, envs = config.planner, config.env.num_envs
    iterations = planner.iterations + (planner.extra_iterations if action_dim >= 20 else 0)
    rows, proposals, horizon = envs * planner.num_samples, envs * planner.num_pi_trajs, planner.horizon
    products = list(_forward("encoder", nets["encoder"], envs))
    for name in ("dynamics", "reward"):
        products += _first_latent(f"first latent: {name}", nets[name], envs, action_dim)
    if proposals:
        products += _forward("proposals: first policy step", nets["pi"], envs)
        products += _forward("proposals: policy", nets["pi"], proposals, horizon - 1)
        products += _steps("proposals: dynamics", nets["dynamics"], proposals, action_dim, horizon - 1)
    products += _steps("dynamics", nets["dynamics"], rows, action_dim, horizon, iterations)
    products += _all_steps_at_once("reward", nets["reward"], rows, action_dim, horizon, iterations)
    if terminates:
        products += _forward("termination", nets["termination"], horizon * rows, iterations)
    products += _forward("terminal policy", nets["pi"], rows, iterations)
    products += _forward("terminal critics", nets["q"], rows, 2 * iterations)
    return [product for product in products if product.flops]


def update_products(config: RunConfig, obs_dim: int, action_dim: int, *, terminates: bool = False) -> list[Product]:
    """Return the matrix products of one update on windows of ``T = config.window`` steps and ``B`` of them.

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
    horizon, batch, latent = config.window, config.loss.batch_size, model.latent_dim
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


def _first_latent(name: str, dims: Sequence[int], rows: int, action_dim: int) -> Iterator[Product]:
    """The latent's columns of a first layer."""
    yield Product(name, "forward", rows, dims[1], dims[0] - action_dim)


def _steps(name: str, dims: Sequence[int], rows: int, action_dim: int, steps: int, count: int = 1) -> Iterator[Product]:
    """Steps one after the other, of which the first one's latent has been multiplied."""
    if steps:
        yield Product(f"{name}, first step", "forward", rows, dims[1], action_dim, count)
        yield from _forward(f"{name}, first step", dims[1:], rows, count)
        yield from _forward(name, dims, rows, count * (steps - 1))


def _all_steps_at_once(name: str, dims: Sequence[int], rows: int, action_dim: int, steps: int, count: int) -> Iterator[Product]:
    """All steps in one product per layer, of which the first one's latent has been multiplied."""
    yield Product(f"{name}, first step", "forward", rows, dims[1], action_dim, count)
    yield from _forward(name, dims[:2], rows * (steps - 1), count)
    yield from _forward(name, dims[1:], rows * steps, count)


def _inputs(name: str, dims: Sequence[int], rows: int, first: int, count: int = 1) -> Iterator[Product]:
    """Gradients of the inputs of all layers, last first; of the network's own input only ``first`` columns."""
    for index, (before, after) in reversed(list(enumerate(_layers(dims)))):
        columns = before if index else first
        if columns:
            yield Product(name, "inputs", rows, columns, after, count)


def _weights(name: str, dims: Sequence[int], rows: int, count: int = 1) -> Iterator[Product]:
    for before, after in _layers(dims):
        yield Product(name, "weights", after, before, rows, count)
