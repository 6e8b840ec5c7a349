"""A denoiser over action sequences: the learned prior p0(tau | z) of the diffusion planner."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from worldmpc.models.heads import one_hot_argmax
from worldmpc.models.nets import MLP, init_weights
from worldmpc.models.two_hot import symlog
from worldmpc.noise import NoiseSpec, derive_seed
from worldmpc.types import Noise

TIME_FEATURES = 32
"""Width of the sinusoidal embedding of the diffusion step."""

UNGUIDED_STEPS = 2
"""Last denoising steps that follow no gradient (Diffuser's ``t_stopgrad``): there it would leave what the prior can say."""

GuidanceFn = Callable[[Tensor], Tensor]
"""What sampling climbs: action sequences [..., H, A] -> scaled return [...], differentiable."""


def cosine_alpha_bar(steps: int) -> list[float]:
    """Return the share of signal that is left after 0, 1, ..., ``steps`` diffusion steps (Nichol & Dhariwal 2021, eq. 17)."""

    def curve(step: int) -> float:
        return math.cos((step / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    alpha_bar = [1.0]
    for step in range(steps):
        alpha_bar.append(alpha_bar[-1] * max(curve(step + 1) / curve(step), 1e-3))
    return alpha_bar


class TrajectoryModel(nn.Module):
    """Denoising diffusion over action sequences given a latent (DDPM, Ho et al. 2020; over plans: Diffuser, Janner et al. 2022).

    An MLP sees the noisy sequence, the latent and the diffusion step, and predicts the clean sequence. The latent enters as
    symlog(z), so that any scale will do; a LayerNorm would take the scale away, which of a state of few numbers is what matters.
    Sampling uses ``ema``, a slow copy of the learned ``net``. One-hot actions are diffused as 2 a - 1 and decoded by the largest entry.

    Args:
        action_dim: action dimensions, or choices.
        horizon: decisions of a sequence.
        latent_dim: width of the latent.
        hidden: widths of the hidden layers.
        steps: diffusion steps.
        discrete: actions are one-hot vectors.
        ema_decay: share of the slow copy kept at an update.
        seed: seed of the initial weights.
    """

    def __init__(
        self,
        action_dim: int,
        horizon: int,
        latent_dim: int,
        hidden: tuple[int, ...] = (256, 256),
        steps: int = 10,
        *,
        discrete: bool = False,
        ema_decay: float = 0.995,
        seed: int = 1,
    ) -> None:
        super().__init__()
        self.action_dim, self.horizon, self.latent_dim, self.steps = action_dim, horizon, latent_dim, steps
        self.discrete, self.ema_decay = discrete, ema_decay
        self.net = MLP(latent_dim + TIME_FEATURES + horizon * action_dim, list(hidden), horizon * action_dim)
        init_weights(self.net, torch.Generator().manual_seed(derive_seed(seed, "trajectory")))
        self.ema = copy.deepcopy(self.net).requires_grad_(False)
        self.alpha_bar = cosine_alpha_bar(steps)
        self.ema_updates: Tensor
        self.register_buffer("ema_updates", torch.zeros(()))
        self._alpha_bar: Tensor
        self.register_buffer("_alpha_bar", torch.tensor(self.alpha_bar), persistent=False)
        self._time: Tensor
        self.register_buffer("_time", _sinusoidal(steps), persistent=False)

    # Learning.

    def noise_specs(self, batch: int) -> dict[str, NoiseSpec]:
        """Declare the noise of one :meth:`loss`."""
        shape = (batch, self.horizon, self.action_dim)
        return {"trajectory_step": NoiseSpec("uniform", (batch,)), "trajectory_noise": NoiseSpec("normal", shape)}

    def loss(self, z: Tensor, actions: Tensor, noise: Noise, weight: Tensor | None = None) -> Tensor:
        """Squared error of the predicted clean sequence at a random diffusion step (Ho et al. 2020, eq. 14, for x_0).

        Args:
            z: [B, Z] latents at the first action; the gradient reaches them unless they are detached.
            actions: [B, H, A] sequences taken from there.
            noise: tensors of :meth:`noise_specs`.
            weight: [B], such as exp(return / temperature) over its mean, 0 for sequences that are not whole; None: 1.

        Returns:
            [B].
        """
        clean = self.encode(actions)
        step = (1 + (noise["trajectory_step"] * self.steps).long()).clamp(max=self.steps)  # uniform on 1..steps
        alpha_bar = self._alpha_bar[step][:, None, None]
        noisy = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise["trajectory_noise"]
        error = (self._predict(self.net, noisy, z, self._time[step]) - clean).square().mean((-2, -1))
        return error if weight is None else weight * error

    @torch.no_grad()
    def update_ema(self) -> None:
        """Move the slow copy towards the learned network; by more in the first updates, as it begins at random weights."""
        self.ema_updates += 1
        rate = torch.clamp(9 / (9 + self.ema_updates), min=1 - self.ema_decay)
        slow: list[Tensor] = list(self.ema.parameters())
        fast: list[Tensor] = list(self.net.parameters())
        torch._foreach_lerp_(slow, fast, [rate] * len(slow))  # pyright: ignore[reportPrivateImportUsage]

    # Sampling.

    def sample_specs(self, batch: int, samples: int, iterations: int | None = None) -> dict[str, NoiseSpec]:
        """Declare the noise of one :meth:`sample` of ``samples`` sequences per latent in ``iterations`` denoising steps."""
        return {"denoising": NoiseSpec("normal", (iterations or self.steps, batch, samples, self.horizon, self.action_dim))}

    def sample(self, z: Tensor, noise: Noise, horizon: int | None = None, guidance_fn: GuidanceFn | None = None) -> Tensor:
        """Sample sequences of the prior by reverse diffusion. Few steps make it narrower than the data, as the last one adds no noise.

        Args:
            z: [B, Z] latents.
            noise: tensors of :meth:`sample_specs`, which also say in how many steps.
            horizon: first decisions of the sequences to return; None: all.
            guidance_fn: return to climb, already scaled; see :meth:`reverse`.

        Returns:
            [B, S, horizon, A].
        """
        x, *rest = noise["denoising"]
        z = z[:, None]
        grid = self.grid(1 + len(rest))
        for index, (step, before) in enumerate(grid[:-1]):
            guided = index < len(grid) - UNGUIDED_STEPS
            x = self.reverse(x, self.denoise(x, z, step), step, before, rest[index], guidance_fn if guided else None)
        return self.decode(self.denoise(x, z, grid[-1][0]))[..., :horizon, :]

    def grid(self, iterations: int) -> list[tuple[int, int]]:
        """Return the (step, step before it) of each denoising step, from the noisiest; at most ``steps``, spaced evenly."""
        marks = [round(self.steps * left / iterations) for left in range(iterations, -1, -1)]
        return list(zip(marks, marks[1:], strict=False))

    def denoise(self, x: Tensor, z: Tensor, step: int) -> Tensor:
        """Predict the clean sequence, within the bounds of clean ones: [..., H, A], [..., Z] (or 1 for ...) -> [..., H, A]."""
        return self._predict(self.ema, x, z, self._time[step]).clamp(-1, 1)

    def reverse(self, x: Tensor, clean: Tensor, step: int, before: int, eps: Tensor, guidance_fn: GuidanceFn | None = None) -> Tensor:
        """Sample x at the step before, given x and the predicted clean sequence (Ho et al. 2020, eq. 6-7; guidance: Janner et al. 2022).

        The mean moves by the step's variance times the gradient of ``guidance_fn`` at the clean sequence.

        Args:
            x: [..., H, A] at ``step``.
            clean: [..., H, A].
            step: diffusion step.
            before: diffusion step to go to, below ``step``.
            eps: [..., H, A] standard normal noise.
            guidance_fn: return to climb, or None.
        """
        noisy, less = self.alpha_bar[step], self.alpha_bar[before]
        alpha = noisy / less
        mean = (math.sqrt(less) * (1 - alpha) * clean + math.sqrt(alpha) * (1 - less) * x) / (1 - noisy)
        variance = (1 - less) * (1 - alpha) / (1 - noisy)
        if guidance_fn is not None:
            mean = mean + variance * self.ascent(clean, guidance_fn)
        return mean + math.sqrt(variance) * eps

    def ascent(self, clean: Tensor, guidance_fn: GuidanceFn) -> Tensor:
        """Gradient of the return of decoded sequences, 0 where it is not finite: [..., H, A] -> [..., H, A].

        Of one-hot actions the decoding counts as the identity (straight-through): the model sees actions as it knows them.
        """

        def total(x: Tensor) -> Tensor:
            actions = (x + 1) / 2 if self.discrete else x
            if self.discrete:
                actions = actions + (one_hot_argmax(actions) - actions).detach()
            return guidance_fn(actions).sum()

        return torch.func.grad(total)(clean).nan_to_num(0.0, 0.0, 0.0)

    def encode(self, actions: Tensor) -> Tensor:
        """Actions as they are diffused, in [-1, 1]: [..., A] -> [..., A]."""
        return 2 * actions - 1 if self.discrete else actions

    def decode(self, clean: Tensor) -> Tensor:
        """Clean sequences as actions: [..., A] -> [..., A]."""
        return one_hot_argmax(clean) if self.discrete else clean

    def _predict(self, network: MLP, x: Tensor, z: Tensor, time: Tensor) -> Tensor:
        given = torch.cat((symlog(z), time.expand(*z.shape[:-1], -1)), -1).expand(*x.shape[:-2], -1)
        return network(given, x.flatten(-2)).view(x.shape)


def _sinusoidal(steps: int) -> Tensor:
    """Embedding of steps 0, 1, ..., on a scale of 1000 (Vaswani et al. 2017, section 3.5): [steps + 1, TIME_FEATURES]."""
    frequency = torch.exp(-math.log(10000.0) * torch.arange(TIME_FEATURES // 2) / (TIME_FEATURES // 2 - 1))
    angle = 1000.0 / steps * torch.arange(steps + 1)[:, None] * frequency
    return torch.cat((angle.sin(), angle.cos()), -1)
