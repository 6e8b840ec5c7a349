"""Configuration of each part: names, defaults and meanings of all keys below the top level."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from worldmpc.config.base import key


@dataclass(frozen=True)
class EnvConfig:
    """Environments."""

    num_envs: int = key(1, "environments stepped together")
    workers: Literal["sync", "async"] = key("sync", "sync: in this process; async: in worker processes that share memory with it")
    num_workers: int | None = key(None, "worker processes of workers=async; null: one per CPU core, at most one per environment")
    action_repeat: int | None = key(None, "simulator steps per decision; null: the suite's own (dmc 2, gym 1)")
    episode_length: int | None = key(None, "time limit in decisions; null: the environment's own")
    discount: float | None = key(None, "discount factor; null: from the episode length (published heuristic)")
    simulator_state: bool = key(False, "append the simulator's full state to observations, for dynamics=simulator")


@dataclass(frozen=True)
class ModelConfig:
    """World model."""

    size: str = key("5", "network sizes: cpu, or a published one in million parameters: 1, 5, 19, 48, 317")
    enc_dim: int | None = key(None, "hidden width of the encoder; null: from size")
    mlp_dim: int | None = key(None, "hidden width of all other networks; null: from size")
    latent_dim: int | None = key(None, "latent width, a multiple of simnorm_dim; null: from size")
    num_enc_layers: int | None = key(None, "encoder layers; null: from size")
    num_q: int | None = key(None, "number of critics, at least 2; null: from size")
    simnorm_dim: int = key(8, "group width of SimNorm")
    simnorm_layout: Literal["strided", "consecutive"] = key(
        "strided", "which latent entries form a group; strided is the faster one, consecutive the published order"
    )
    num_bins: int = key(101, "bins of the two-hot reward and value heads")
    vmin: float = key(-10.0, "lowest bin, in symlog space")
    vmax: float = key(10.0, "highest bin, in symlog space")
    dropout: float = key(0.01, "dropout in the first layer of each critic")
    log_std_min: float = key(-10.0, "lower bound of the policy's log standard deviation")
    log_std_max: float = key(2.0, "upper bound of the policy's log standard deviation")
    policy: Literal["squashed", "clipped"] = key(
        "squashed", "Gaussian prior: squashed: tanh of a sample (TD-MPC2); clipped: tanh of the mean, samples clipped to [-1, 1] (BMPC)"
    )
    value: Literal["q", "v"] = key("q", "what the ensemble of critics reads: q: latent and action (TD-MPC2); v: the latent alone (BMPC)")
    num_dynamics: int = key(1, "dynamics networks; planning averages returns over them")
    termination: Literal["auto", "on", "off"] = key("auto", "termination head; auto: where the environment can terminate")
    continuation: Literal["soft", "hard"] = key(
        "soft", "how planning weighs predicted termination: by its probability, or by the published threshold of 0.5"
    )


@dataclass(frozen=True)
class PlannerConfig:
    """Planner."""

    name: Literal["mppi", "cem", "icem", "random_shooting", "policy_guided", "diffusion", "mcts"] = key(
        "mppi", "how action sequences are found; planner=cem is short for planner.name=cem"
    )
    mpc: bool = key(True, "plan; false: act with the policy prior alone")
    precision: Literal["fp32", "bf16"] = key("fp32", "matrix products of planning; bf16: faster, parameters stay fp32")
    uncertainty_coef: float = key(
        0.0, "with several dynamics: subtract this times the standard deviation of a candidate's returns over them"
    )
    horizon: int = key(3, "planning horizon, in decisions; also the length of the training windows, unless loss.horizon is given")
    iterations: int = key(6, "refinement iterations; of diffusion: denoising steps; random_shooting and policy_guided have one")
    extra_iterations: int = key(2, "added to iterations where the action space has 20 or more dimensions")
    num_samples: int = key(512, "candidate sequences per iteration, policy proposals included")
    num_elites: int = key(64, "candidates that the refit uses")
    num_pi_trajs: int = key(24, "candidates proposed by the policy prior; of policy_guided: all")
    temperature: float = key(0.5, "mppi, policy_guided: weight of an elite is exp(temperature * (value - best value))")
    min_std: float = key(0.05, "lower bound of the sampling standard deviation; of diffusion: the last one")
    max_std: float = key(2.0, "initial value and upper bound of the sampling standard deviation; of diffusion: the first one")
    uniform_mix: float = key(0.1, "Discrete actions: share of the uniform distribution in what candidates are sampled from")
    momentum: float = key(0.1, "cem, icem: share of the former mean and standard deviation kept at a refit")
    noise_exponent: float = key(2.0, "icem: exponent of the temporally coloured noise, 0 is white (Pinneri et al. 2020)")
    keep_elites: float = key(0.3, "icem: share of the elites that are candidates again, in the next iteration and the next plan")
    sample_decay: float = key(1.25, "icem: factor by which the number of fresh samples falls per iteration")
    pi_noise: float = key(0.3, "policy_guided: standard deviation added to proposals; Discrete: share of uniform actions")
    prior: Literal["none", "learned"] = key("none", "diffusion: learned: a denoiser over action sequences, trained on replay")
    prior_steps: int = key(10, "diffusion steps of the learned prior; plans may take fewer, as their iterations say")
    beta: float = key(10.0, "diffusion: inverse temperature on standardised returns; 0 samples the prior, large ones take the best plan")
    guidance: float = key(0.0, "diffusion with a learned prior: scale of the gradient of the return in each denoising step")
    gradient_steps: int = key(0, "gradient ascent steps on the refined plan through the model; Box actions alone")
    gradient_lr: float = key(0.05, "size of a gradient ascent step")
    num_simulations: int = key(50, "mcts: simulations per plan")
    num_playouts: int = key(1, "mcts with a model that has no value: random continuations of a new node, whose mean return is its value")
    c_puct: float = key(1.25, "mcts: weight of the prior against values (PUCT)")
    root_noise: float = key(0.25, "mcts: share of Dirichlet noise in the prior at the root while exploring")
    dirichlet_alpha: float = key(0.3, "mcts: concentration of that noise")


@dataclass(frozen=True)
class DynamicsConfig:
    """Dynamics in observation space (mpc, mbmpc, pets)."""

    name: Literal["analytic", "simulator", "mlp", "ensemble"] = key(
        "mlp", "analytic: known equations; simulator: copies of the MuJoCo simulator; mlp, ensemble: learned"
    )
    hidden: tuple[int, ...] = key((200, 200), "widths of the hidden layers")
    members: int = key(5, "networks of the ensemble")
    particles: int = key(20, "ensemble: imagined particles per candidate, a multiple of members (trajectory sampling, TS-infinity)")
    lr: float = key(1e-3, "learning rate")
    weight_decay: float = key(1e-5, "decoupled weight decay")
    batch_size: int = key(256, "transitions per gradient step")
    holdout: float = key(0.1, "share of the transitions that are held out")
    max_epochs: int = key(100, "most passes over the transitions per fit")
    patience: int = key(5, "a fit ends after as many epochs without a better holdout loss")


@dataclass(frozen=True)
class MBMPCConfig:
    """Model-based MPC with learned dynamics, policy and value (mbmpc, pets)."""

    hidden: tuple[int, ...] = key((128, 128), "widths of the hidden layers of policy and value")
    learn_policy: bool = key(True, "learn policy and value; false: the planner has neither (pets)")
    policy_loss: Literal["bc", "awr"] = key("bc", "bc: behavioural cloning of the planner's actions; awr: advantage-weighted")
    awr_temperature: float = key(1.0, "awr: advantages, in standard deviations, are divided by this before the exponential")
    fit_every: int = key(500, "decisions between fits of the dynamics")
    gradient_steps: int = key(500, "updates of policy and value per fit")
    tau: float = key(0.05, "Polyak rate of the target value")


@dataclass(frozen=True)
class DQNConfig:
    """DQN."""

    hidden: tuple[int, ...] = key((256, 256), "widths of the hidden layers")
    double: bool = key(True, "the online network chooses the action of the target (van Hasselt et al. 2016)")
    dueling: bool = key(False, "separate value and advantage streams (Wang et al. 2016)")
    n_step: int = key(1, "steps of reward before the bootstrap")
    epsilon_start: float = key(1.0, "first probability of a random action")
    epsilon_end: float = key(0.04, "last probability of a random action")
    epsilon_fraction: float = key(0.2, "share of steps over which it falls, linearly")
    target_every: int = key(250, "updates between copies to the target network")


@dataclass(frozen=True)
class PPOConfig:
    """PPO."""

    hidden: tuple[int, ...] = key((64, 64), "widths of the hidden layers of policy and value")
    rollout_steps: int = key(128, "decisions per environment and rollout")
    minibatch_size: int = key(256, "transitions per gradient step, about; exactly where it divides rollout_steps x env.num_envs")
    update_epochs: int = key(4, "passes over a rollout")
    gamma: float = key(0.99, "discount, unless env.discount is given")
    gae_lambda: float = key(0.95, "lambda of the generalised advantage estimate")
    clip_coef: float = key(0.2, "probability ratios beyond 1 +- this are clipped")
    anneal_clip: bool = key(False, "let clip_coef fall linearly to 0")
    clip_vloss: bool = key(False, "clip the value's change as well")
    vf_clip_coef: float = key(0.2, "clip of the value's change")
    vf_coef: float = key(0.5, "weight of the value loss")
    ent_coef: float = key(0.0, "weight of the entropy")
    max_grad_norm: float = key(0.5, "largest gradient norm")
    norm_adv: bool = key(True, "standardise advantages per minibatch")
    target_kl: float | None = key(None, "leave out the rest of a rollout's updates once the policy has moved this far")
    log_std_init: float = key(0.0, "first log standard deviation, Box actions")


@dataclass(frozen=True)
class SACConfig:
    """SAC."""

    hidden: tuple[int, ...] = key((256, 256), "widths of the hidden layers")
    tau: float = key(0.005, "Polyak rate of the target critics")
    alpha: float | None = key(None, "entropy temperature; null: learned")
    alpha_init: float = key(1.0, "first value of a learned temperature")
    target_entropy: float | None = key(None, "null: -A for Box, 0.5 log A for Discrete actions")


@dataclass(frozen=True)
class TD3Config:
    """TD3."""

    hidden: tuple[int, ...] = key((256, 256), "widths of the hidden layers")
    tau: float = key(0.005, "Polyak rate of the target networks")
    policy_delay: int = key(2, "critic updates per policy update")
    exploration_noise: float = key(0.1, "standard deviation of the noise on actions")
    target_noise: float = key(0.2, "standard deviation of the noise on target actions")
    noise_clip: float = key(0.5, "bound of that noise")


@dataclass(frozen=True)
class LossConfig:
    """Objective."""

    batch_size: int = key(256, "windows per update")
    horizon: int | None = key(None, "length of the training windows, in decisions; null: planner.horizon")
    rho: float = key(0.5, "temporal decay: step t of a window weighs rho**t")
    consistency_coef: float = key(20.0, "weight of the latent consistency loss")
    reward_coef: float = key(0.1, "weight of the reward loss")
    value_coef: float = key(0.1, "weight of the value loss")
    termination_coef: float = key(1.0, "weight of the termination loss")
    entropy_coef: float = key(1e-4, "weight of the policy's entropy")
    tau: float = key(0.01, "Polyak rate of target critics and running scale")


@dataclass(frozen=True)
class PolicyConfig:
    """What TD-MPC2's policy prior learns from."""

    objective: Literal["max_q", "kl_to_planner", "max_q+planner_prior", "max_q+weighted_prior", "max_q+bc", "bc", "awac"] = key(
        "max_q",
        "max_q: value and entropy (TD-MPC2); kl_to_planner: divergence from the planner's distribution (BMPC); max_q+planner_prior: and "
        "its likelihood under that distribution (TD-M(PC)^2); max_q+weighted_prior: weighted by value (BOOM); max_q+bc: and squared error "
        "to the action taken; bc: that likelihood alone; awac: likelihood of the action taken, weighted by its advantage",
    )
    prior_coef: float | None = key(
        None,
        "weight of the part beside max_q; null: published: max_q+planner_prior A/61, max_q+weighted_prior A/50 (A actions), max_q+bc 1",
    )
    scale_threshold: float = key(
        2.0, "max_q+planner_prior, max_q+weighted_prior: the planner's part begins once the running scale exceeds this"
    )
    awac_temperature: float = key(0.3333, "awac: advantages, in units of the running scale, are divided by this")
    skip_seed_updates: bool = key(
        False, "leave the policy, and reanalyze, out of the updates that the seed phase is worth, when there are no plans yet"
    )


@dataclass(frozen=True)
class ValueConfig:
    """What TD-MPC2's critics learn."""

    target: Literal["td", "n_step", "td_lambda", "model"] = key(
        "td",
        "td: one replayed step and a bootstrap (TD-MPC2); n_step, td_lambda: more of the window; model: imagined steps of the present "
        "policy (BMPC)",
    )
    bootstrap: Literal["min", "mean"] = key("min", "of two slow critics drawn at random: min (TD-MPC2) or mean (BMPC)")
    n_step: int = key(3, "n_step: replayed steps before the bootstrap, fewer at the window's end")
    lam: float = key(0.95, "td_lambda: weight of longer returns")
    td_horizon: int = key(1, "model: imagined steps before the bootstrap; with value=q the first of them is the replayed one")


@dataclass(frozen=True)
class ReanalyzeConfig:
    """Plans anew for replayed steps, whose plans are then replaced in the replay (BMPC)."""

    interval: int = key(0, "updates between reanalyses; 0: never")
    batch_size: int = key(20, "windows of the batch that are planned anew, at all their steps")
    log_std_min: float = key(-2.0, "lower bound of the policy prior's log standard deviation for the proposals of these plans")
    log_std_max: float = key(1.0, "upper bound of it")


@dataclass(frozen=True)
class MultiGammaConfig:
    """Auxiliary value heads at several discounts, which shape the latent and decide nothing."""

    enabled: bool = key(False, "learn them")
    gammas: tuple[float | Literal["primary"], ...] = key(
        (), "discounts per decision, at most 6; the first one is the task's own: primary, or its number"
    )
    head: Literal["joint", "separate"] = key("joint", "joint: one network on the latent for all; separate: one for each")
    hidden_layers: int = key(
        0,
        "hidden layers of that network; 0: linear, as first proposed, which flattens latents where values are all the same; critics have 2",
    )
    bootstrap: Literal["self", "primary"] = key(
        "self", "value of the next latent in the targets: self: a slow copy of the same head; primary: the slow critics"
    )
    loss_weight: float = key(0.5, "weight of each auxiliary loss")
    debug_logging: bool = key(False, "snapshots at evaluations hold every step, cross-entropies and whole distributions, of more examples")
    log_num_examples: int = key(8, "most examples of a snapshot; without debug_logging at most 4")


@dataclass(frozen=True)
class OptimConfig:
    """Optimisers."""

    lr: float = key(3e-4, "learning rate of model and policy")
    enc_lr_scale: float = key(0.3, "encoder learning rate relative to lr")
    grad_clip_norm: float = key(20.0, "largest gradient norm, model and policy apart")
    schedule: Literal["constant", "warmup", "cosine", "linear"] = key(
        "constant", "learning-rate schedule; cosine and linear warm up as well"
    )
    warmup_updates: int = key(0, "updates of linear warm-up (schedules warmup and cosine)")
    final_lr_scale: float = key(0.1, "end of the cosine and linear schedules relative to lr")


@dataclass(frozen=True)
class ReplayConfig:
    """Replay."""

    capacity: int = key(1_000_000, "most decisions kept, all environments together")
    windows: Literal["padded", "inside"] = key(
        "padded", "padded: windows may run past an episode's end, masked there; inside: only whole windows (published)"
    )
    storage_device: str = key("auto", "where the replay lives; auto: the training device")
    mirror: bool = key(False, "mirror half of the windows of every update, where the task has a symmetry, as hockey")


@dataclass(frozen=True)
class TrainConfig:
    """Training loop."""

    utd: float = key(1.0, "updates per decision, whatever num_envs is")
    precision: Literal["fp32", "bf16"] = key("fp32", "matrix products of updates; bf16: autocast, parameters and losses stay fp32")
    reset_every: int | None = key(
        None, "updates between fresh last layers of critics and policy, against overfitting with a high utd; null: never"
    )
    overlap: bool = key(False, "update while the environments step, one decision behind: a batch cannot hold the step under way")
    seed_decisions: int | None = key(None, "random decisions before learning; null: max(1000, 5 episodes)")
    until_return: float | None = key(None, "end the run once an evaluation's mean return reaches this; null: go to steps")
    max_loss: float = key(1e6, "a loss term above this, or NaN, stops the run with a saved state")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation."""

    episodes: int = key(10, "episodes per evaluation, on environments of their own")
    prior: bool = key(True, "also evaluate the policy prior without planning")
    opponents: tuple[str, ...] = key(
        (), "two players: whom evaluations play, episodes games against each; empty: the opponents that training names, of hockey the bots"
    )
    video: bool = key(True, "record an mp4 of the final agent")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints."""

    every: int = key(20_000, "simulator steps between checkpoints")
    keep: int = key(2, "newest checkpoints kept, besides the best")
    replay: bool = key(True, "include the replay, so that a resumed run equals an uninterrupted one")


@dataclass(frozen=True)
class LogConfig:
    """Logging."""

    every: int = key(1_000, "decisions between records in metrics.jsonl")
    tensorboard: bool = key(True, "write TensorBoard events")
    progress: Literal["auto", "live", "plain", "none"] = key("auto", "progress display; auto: live on a terminal")


MODEL_SIZES: dict[str, dict[str, int]] = {
    "cpu": {"enc_dim": 128, "mlp_dim": 128, "latent_dim": 64, "num_enc_layers": 2, "num_q": 2},
    "1": {"enc_dim": 256, "mlp_dim": 384, "latent_dim": 128, "num_enc_layers": 2, "num_q": 2},
    "5": {"enc_dim": 256, "mlp_dim": 512, "latent_dim": 512, "num_enc_layers": 2, "num_q": 5},
    "19": {"enc_dim": 1024, "mlp_dim": 1024, "latent_dim": 768, "num_enc_layers": 3, "num_q": 5},
    "48": {"enc_dim": 1792, "mlp_dim": 1792, "latent_dim": 768, "num_enc_layers": 4, "num_q": 5},
    "317": {"enc_dim": 4096, "mlp_dim": 4096, "latent_dim": 1376, "num_enc_layers": 5, "num_q": 8},
}
"""Published sizes by million parameters, and ours for a CPU."""


def resolve_model(config: ModelConfig) -> ModelConfig:
    """Return the configuration with the widths that ``size`` stands for filled in."""
    sizes = {name: value for name, value in MODEL_SIZES[config.size].items() if getattr(config, name) is None}
    return dataclasses.replace(config, **sizes)
