"""Objectives of Director: goal autoencoder, worker, manager (Hafner et al. 2022, "Deep Hierarchical Planning from Pixels").

The world model is read by all of them, and changed by none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from worldmpc.config import ManagerConfig, WorkerConfig
from worldmpc.losses.policy import GREEDY, Coefficients, update_scale
from worldmpc.models.goal_autoencoder import GoalAutoencoder, classes_in_use
from worldmpc.models.goal_directed import Weights, with_goal
from worldmpc.models.hierarchy import EXPLORATION, EXTRINSIC, Hierarchy, Worker
from worldmpc.models.world_model import WorldModel
from worldmpc.noise import NoiseSpec
from worldmpc.types import Metrics, Noise, SequenceBatch

BONUS_CANDIDATES = 4
"""Actions among which an imagined planner with a bonus for goals chooses."""
LEAST_STD = 1e-3
"""Least standard deviation that advantages are divided by."""


def autoencoder_noise(goals: GoalAutoencoder, rows: int) -> dict[str, NoiseSpec]:
    """Declare the noise of :func:`autoencoder_loss`."""
    return {"goal_codes": NoiseSpec("normal", (rows, goals.codes, goals.classes))}


def autoencoder_loss(goals: GoalAutoencoder, z: Tensor, real: Tensor, temperature: Tensor, noise: Noise) -> tuple[Tensor, Metrics]:
    """Cross-entropy of reconstructed latents, summed over groups, plus the weighted divergence of their codes from uniform ones.

    Args:
        goals: the autoencoder.
        z: [N, Z] latents of the replay, without gradient.
        real: [N] 1 where there is a latent, else 0.
        temperature: [] of Gumbel-softmax codes.
        noise: tensors of :func:`autoencoder_noise`.

    Returns:
        The loss [], and metrics: ``recon_loss`` is the mean over groups in nats, which ``marginal_entropy``, that of the mean latent,
        bounds for codes that say nothing; ``perplexity`` is the mean over codes of how many of their classes are
        in use as most likely ones.
    """
    log_probs = goals.log_probs(z)
    code = goals.sample(log_probs, noise["goal_codes"], temperature)
    weight = real / real.sum().clamp(min=1)
    recon = (goals.cross_entropy(z, goals.decode(code)) * weight).sum()
    kl = (goals.kl(log_probs) * weight).sum()
    loss = recon * (z.shape[-1] // goals.group_dim) + goals.beta * kl
    with torch.no_grad():
        metrics = {
            "goal_vae/total_loss": loss,
            "goal_vae/recon_loss": recon,
            "goal_vae/marginal_entropy": goals.entropy((z * weight[:, None]).sum(0)),
            "goal_vae/latent_entropy": (goals.entropy(z) * weight).sum(),
            "goal_vae/kl": kl,
            "goal_vae/beta": goals.beta.clone(),
            "goal_vae/temperature": temperature,
            "goal_vae/perplexity": classes_in_use(log_probs, weight),
        }
    return loss, {name: value.detach() for name, value in metrics.items()}


class WorkerBatch(NamedTuple):
    """Replayed steps, each with a goal."""

    zg: Tensor  # [H, B, 2 Z] latent and goal
    action: Tensor  # [H, B, A]
    next_zg: Tensor  # [H, B, 2 Z]
    terminated: Tensor  # [H, B]
    real: Tensor  # [H, B] 1 where the step is real, as all first ones are, else 0


def goal_noise(goals: GoalAutoencoder, length: int, batch_size: int) -> dict[str, NoiseSpec]:
    """Declare the noise of :func:`choose_goals`."""
    uniform = {name: NoiseSpec("uniform", (length, batch_size)) for name in ("goal_kind", "goal_future")}
    return uniform | {"goal_random": NoiseSpec("normal", (length, batch_size, goals.codes, goals.classes))}


@torch.no_grad()
def choose_goals(
    config: WorkerConfig, goals: GoalAutoencoder, model: WorldModel, batch: SequenceBatch, length: int, noise: Noise
) -> Tensor:
    """Choose a goal for each of the first steps of windows: the manager's at the time, a later latent, or that of random codes.

    Args:
        config: shares of the three.
        goals: decodes codes as they mean now.
        model: encodes the observation that a later latent is of.
        batch: windows of T steps with ``goal_code`` [T, B, L], classes of the manager's goals, NaN where there was none: random codes
            stand for it.
        length: steps to choose goals for, H.
        noise: tensors of :func:`goal_noise`.

    Returns:
        [H, B, Z].
    """
    kind, codes, (from_manager, from_future, _) = noise["goal_kind"], batch.extras["goal_code"][:length], config.goals
    last = batch.mask.sum(0)  # [B] place of the last real observation
    now = torch.arange(length, device=last.device, dtype=last.dtype)[:, None]
    ahead = (now + 1 + (noise["goal_future"] * (last - now)).floor()).minimum(last).long()
    future = model.encode(batch.obs.gather(0, ahead[..., None].expand(-1, -1, batch.obs.shape[-1])))
    one_hot = torch.nn.functional.one_hot(codes.nan_to_num().long(), goals.classes)
    random = torch.nn.functional.one_hot(noise["goal_random"].argmax(-1), goals.classes)
    of_manager = codes.isfinite().all(-1) & (kind < from_manager)
    decoded = goals.decode(torch.where(of_manager[..., None, None], one_hot, random).to(future.dtype))
    return torch.where(((kind >= from_manager) & (kind < from_manager + from_future))[..., None], future, decoded)


def worker_noise(worker: Worker, model: WorldModel, length: int, batch_size: int) -> dict[str, NoiseSpec]:
    """Declare the noise of :func:`worker_value_loss` and :func:`worker_policy_loss`."""
    specs = {"worker_critics": NoiseSpec("subset", (2,), model.num_q)}
    if worker.discrete:
        return specs
    return specs | {name: NoiseSpec("normal", (length, batch_size, worker.action_dim)) for name in ("worker_next", "worker_policy")}


def worker_value_loss(hierarchy: Hierarchy, model: WorldModel, batch: WorkerBatch, gamma: float, noise: Noise) -> tuple[Tensor, Metrics]:
    """Two-hot cross-entropy of all critics against goal reward plus discounted minimum of the slow ones, mean over real steps -> []."""
    worker = hierarchy.worker
    assert worker is not None
    with torch.no_grad():
        latent, goal = batch.next_zg.chunk(2, -1)
        reward = hierarchy.similarity(latent, goal)
        target = reward + gamma * (1 - batch.terminated) * worker.value(batch.next_zg, noise.get("worker_next"), model.two_hot, slow=True)
    share = batch.real / batch.real.sum().clamp(min=1)
    loss = (model.two_hot.loss(worker.q_logits(batch.zg, batch.action), target).mean(0) * share).sum()
    metrics = {"goal_reward": (reward * share).sum(), "value_target": (target * share).sum(), "value_loss": loss.detach()}
    return loss, {f"worker/{name}": value for name, value in metrics.items()}


def worker_policy_loss(
    weights: Weights, worker: Worker, model: WorldModel, batch: WorkerBatch, coefs: Coefficients, scale: Tensor, noise: Noise
) -> tuple[Tensor, Metrics]:
    """Minus values of the policy's actions over their running range, minus entropy, mean over real steps -> [].

    Values are those that plans end in: of the goal and of the task, weighted, so that what the manager imagines is what the worker does.
    Of one-hot actions they are expected over all of them. Of the windows' first steps are the new running ranges, ``worker/pi_scale`` of
    these values and ``worker/task_range`` of the task's.
    """
    z, share = batch.zg.chunk(2, -1)[0], batch.real / batch.real.sum().clamp(min=1)
    critics, decode, task_range = noise["worker_critics"], model.two_hot.decode, worker.task_range.clone()
    if worker.discrete:
        log_probs = torch.log_softmax(worker.pi(batch.zg), -1)
        probs = log_probs.detach().exp()
        with torch.no_grad():
            values = weights.goal * decode(worker.choice_logits(batch.zg)).mean(0)
            if weights.task:
                of_task = model.choice_values(z, critics).mean(0)
                values = values + weights.task * of_task
                task_range = update_scale(worker.task_range, (probs * of_task).sum(-1)[0], coefs.tau, worker.config.task_range)
        scale = update_scale(scale, (probs * values).sum(-1)[0], coefs.tau)
        best = torch.softmax(values / (scale * max(coefs.entropy, GREEDY)), -1)  # what the objective is largest at
        loss, entropy = (-(best * log_probs).sum(-1) * share).sum(), -(log_probs.exp() * log_probs).sum(-1)
    else:
        sample = worker.policy(batch.zg, noise["worker_policy"])
        values = weights.goal * decode(worker.q_logits(batch.zg, sample.action, frozen=True)).mean(0)
        if weights.task:
            of_task = model.q_values(z, sample.action, critics, frozen=True).mean(0)
            values = values + weights.task * of_task
            task_range = update_scale(worker.task_range, of_task[0].detach(), coefs.tau, worker.config.task_range)
        scale = update_scale(scale, values[0].detach(), coefs.tau)
        loss, entropy = (-(values / scale + coefs.entropy * sample.scaled_entropy) * share).sum(), sample.entropy
    metrics = {"pi_loss": loss.detach(), "pi_scale": scale, "task_range": task_range, "pi_entropy": (entropy.detach() * share).sum()}
    return loss, {f"worker/{name}": value for name, value in metrics.items()}


class Imagined(NamedTuple):
    """Trajectories over ``M`` goals of the manager's, imagined with the present worker; without gradient."""

    z: Tensor  # [M+1, N, Z] latents where goals are chosen, and the last one
    code: Tensor  # [M, N, L, C] one-hot
    reward: Tensor  # [2, M, N] of task and of exploration: means over the decisions of a goal
    cont: Tensor  # [M, N] probability that the episode goes on until the next goal


def imagination_noise(config: ManagerConfig, hierarchy: Hierarchy, action_dim: int, rows: int) -> dict[str, NoiseSpec]:
    """Declare the noise of :func:`imagine`."""
    goals, codes = config.imagined_goals, (hierarchy.manager.codes, hierarchy.manager.classes)
    candidates = (BONUS_CANDIDATES,) if hierarchy.worker is None else ()
    return {
        "manager_codes": NoiseSpec("normal", (goals, rows, *codes)),
        "manager_worker": NoiseSpec("normal", (goals, config.goal_interval, *candidates, rows, action_dim)),
    }


@torch.no_grad()
def imagine(weights: Weights, hierarchy: Hierarchy, model: WorldModel, z: Tensor, noise: Noise) -> Imagined:
    """Follow the manager's goals with the worker's policy through the world model, or without a worker as :func:`best_proposal` does.

    A goal's reward is the mean over its decisions, each weighted by the probability that the episode has got so far, that of the task
    predicted, that of exploration what the goal autoencoder loses of the latents reached.

    Args:
        weights: of goal and task.
        hierarchy: manager, worker and goal autoencoder.
        model: the world model.
        z: [N, Z] where to begin.
        noise: tensors of :func:`imagination_noise`.
    """
    goals = hierarchy.goals
    zs, codes, rewards, conts = [z], [], [], []
    for eps_code, eps_action in zip(noise["manager_codes"], noise["manager_worker"], strict=True):
        code = hierarchy.manager.choose(z, eps_code)
        goal, weight, reached, task = goals.decode(code), torch.ones_like(z[..., 0]), [], []
        got_so_far = []
        for eps in eps_action:
            step = model.step(z, _imagined_action(weights, hierarchy, model, z, goal, eps))
            z = step.z
            reached.append(z)
            task.append(step.reward)
            got_so_far.append(weight)
            weight = weight * step.cont
        share = torch.stack(got_so_far) / len(got_so_far)
        novelty = goals.novelty(torch.stack(reached))
        rewards.append(torch.stack(((torch.stack(task) * share).sum(0), (novelty * share).sum(0))))
        zs.append(z)
        codes.append(code)
        conts.append(weight)
    return Imagined(torch.stack(zs), torch.stack(codes), torch.stack(rewards, 1), torch.stack(conts))


def _imagined_action(weights: Weights, hierarchy: Hierarchy, model: WorldModel, z: Tensor, goal: Tensor, eps: Tensor) -> Tensor:
    if hierarchy.worker is None:
        return best_proposal(weights, hierarchy, model, z, goal, eps)
    return hierarchy.worker.propose(with_goal(z, goal), eps)


def best_proposal(weights: Weights, hierarchy: Hierarchy, model: WorldModel, z: Tensor, goal: Tensor, eps: Tensor) -> Tensor:
    """The task policy's action that a plan of one step with a bonus for the goal chooses: [N, Z], [N, Z], [P, N, A] -> [N, A].

    It stands for the planner, which would have to plan for every imagined step.
    """
    states = z.expand(len(eps), *z.shape)
    actions = model.propose(states, eps)
    bonus = hierarchy.similarity(model.next(states, actions), goal.expand_as(states))
    score = weights.task * model.q_values(states, actions).mean(0) + weights.goal * bonus  # [P, N]
    return actions.gather(0, score.argmax(0)[None, :, None].expand(1, *actions.shape[1:]))[0]


def lambda_returns(reward: Tensor, cont: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """R_m = r_m + gamma c_m ((1 - lambda) V_(m+1) + lambda R_(m+1)), R_M = V_M: [..., M, N], [M, N], [..., M+1, N] -> [..., M, N]."""
    steps, found, following = reward.shape[-2], [], values[..., -1, :]
    for index in reversed(range(steps)):
        bootstrap = torch.lerp(values[..., index + 1, :], following, lam)
        following = reward[..., index, :] + gamma * cont[index] * bootstrap
        found.append(following)
    return torch.stack(found[::-1], -2)


def reaching(cont: Tensor) -> Tensor:
    """Probability that the episode has got as far as each goal: [M, N] -> [M, N]."""
    return torch.cat((torch.ones_like(cont[:1]), cont[:-1])).cumprod(0)


def manager_critic_loss(
    config: ManagerConfig, hierarchy: Hierarchy, model: WorldModel, imagined: Imagined
) -> tuple[Tensor, Tensor, Metrics]:
    """Two-hot cross-entropy of both critics against lambda-returns of the slow ones -> loss [], returns [2, M, N], metrics."""
    manager, two_hot = hierarchy.manager, model.two_hot
    with torch.no_grad():
        values = two_hot.decode(manager.slow_critics(imagined.z))  # [2, M+1, N]
        returns = lambda_returns(imagined.reward, imagined.cont, values, config.gamma, config.lam)
    loss = (two_hot.loss(manager.critics(imagined.z[:-1]), returns) * reaching(imagined.cont)).mean((1, 2)).sum()
    metrics = {
        "critic_loss": loss.detach(),
        "return_mean": returns[EXTRINSIC].mean(),
        "exploration_return_mean": returns[EXPLORATION].mean(),
        "value_mean": values[EXTRINSIC].mean(),
        "exploration_reward": imagined.reward[EXPLORATION].mean(),
        "reward": imagined.reward[EXTRINSIC].mean(),
    }
    return loss, returns, {f"manager/{name}": value for name, value in metrics.items()}


def manager_actor_loss(
    config: ManagerConfig, hierarchy: Hierarchy, model: WorldModel, imagined: Imagined, returns: Tensor, scales: Tensor, tau: float
) -> tuple[Tensor, Tensor, Metrics]:
    """REINFORCE with the critics as baselines, each return divided by its own running range, minus entropy.

    What is left of both is weighed, and has mean 0 and standard deviation 1 within the batch, so that exploration is not lost beside the
    entropy where the task has no reward yet. Goals count by the probability that the episode gets as far; ranges are of the first ones.

    Args:
        config: weights of exploration and entropy.
        hierarchy: its manager learns.
        model: decodes values.
        imagined: what happened.
        returns: [2, M, N].
        scales: [2] running ranges before this update.
        tau: their rate.

    Returns:
        The loss [], the new running ranges [2], and metrics.
    """
    manager = hierarchy.manager
    with torch.no_grad():
        scales = torch.stack([update_scale(scale, own[0], tau) for scale, own in zip(scales, returns, strict=True)])
        apart = (returns - model.two_hot.decode(manager.critics(imagined.z[:-1]))) / scales[:, None, None]
        raw = apart[EXTRINSIC] + config.intrinsic_coef * apart[EXPLORATION]
        weight = reaching(imagined.cont)
        share = weight / weight.sum()
        mean = (raw * share).sum()
        spread = ((raw - mean).square() * share).sum().sqrt()
        advantage = (raw - mean) / spread.clamp(min=LEAST_STD)
    log_probs = manager.log_probs(imagined.z[:-1])  # [M, N, L, C]
    entropy = -(log_probs.exp() * log_probs).sum((-1, -2))
    taken = (log_probs * imagined.code).sum((-1, -2))
    loss = -((advantage * taken + manager.ent_coef * entropy) * weight).mean()
    metrics = {
        "actor_loss": loss.detach(),
        "entropy": entropy.detach().mean(),
        "ent_coef": manager.ent_coef.clone(),
        "advantage": mean,
        "advantage_std": spread,
        "return_scale": scales[EXTRINSIC],
        "exploration_scale": scales[EXPLORATION],
    }
    return loss, scales, {f"manager/{name}": value for name, value in metrics.items()}
