"""Replay: a device-resident ring of rows per environment, sampled in windows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worldmpc.config import ConfigError, RunConfig
from worldmpc.data.windows import REAL, TERMINATED, TRUNCATED, Bools, Ints, WindowIndex
from worldmpc.runtime import resolve_device
from worldmpc.types import EnvSpec, SequenceBatch, Transition, TransitionBatch

DONE = TERMINATED | TRUNCATED


class Replay:
    """Ring buffer with one stream of rows per environment and its own write head.

    A row holds an observation, the action taken on it, the reward, how the step ended, and extras. The row after the
    newest step (the frontier) already holds what followed, so a step can be sampled as soon as it is stored. Where an
    episode ends, that row stays: last observation, action and reward 0. A window of ``T`` steps from row ``i`` is
    therefore rows ``i .. i+T``, and padding is that last row repeated.

    Two tensors hold everything: observations, and ``[action | reward | terminated | truncated | extras]``. Of extras called ``winner``
    and ``left`` the last step of an episode decides for all of its steps: who has won, and how many steps are left behind each; NaN before.
    One more row than needed takes the writes that must go nowhere (steps that are not valid, padding).
    Counters and end-of-episode flags live on the host, where they come from: nothing here waits for a GPU.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        obs_shape: tuple[int, ...],
        action_dim: int,
        horizon: int,
        *,
        windows: Literal["padded", "inside"] = "padded",
        obs_dtype: torch.dtype = torch.float32,
        extras: Mapping[str, tuple[int, ...]] | None = None,
        device: torch.device | str = "cpu",
        storage_device: torch.device | str | None = None,
    ) -> None:
        """Reserve the memory.

        Args:
            capacity: most decisions kept, all environments together (short episodes cost one row more each).
            num_envs: number of streams, E.
            obs_shape: shape of one observation, O.
            action_dim: A.
            horizon: steps of a window, T, unless :meth:`sample` is told another.
            windows: ``padded``: every step may start a window, masked after the episode's end; ``inside``: whole windows only.
            obs_dtype: stored dtype; uint8 for pixels.
            extras: further float32 fields per step, name -> shape.
            device: where batches go.
            storage_device: where the rows live; ``None`` or ``"auto"``: ``device``.

        Raises:
            ConfigError: a size below 1, a capacity that cannot hold one window, or a storage device that cannot be used.
        """
        for name, value in (("replay.capacity", capacity), ("env.num_envs", num_envs), ("planner.horizon", horizon)):
            if value < 1:
                raise ConfigError(f"{name}: expected at least 1, got {value}")
        if windows not in ("padded", "inside"):
            raise ConfigError(f"replay.windows: expected one of padded, inside, got {windows!r}")
        self.num_envs = num_envs
        self.obs_shape = tuple(obs_shape)
        self.action_dim = action_dim
        self.horizon = horizon
        self.windows = windows
        self.device = torch.device(device)
        self.storage_device = self.device
        if storage_device not in (None, "auto"):
            self.storage_device = torch.device(resolve_device(str(storage_device), "replay.storage_device"))
        # Copies from a GPU to the host must be finished before they are read; copies to a GPU need not be waited for.
        self._async = self.storage_device.type == "cuda"
        self.rows = math.ceil(capacity / num_envs) + 1
        """Ring rows of each stream: its share of the capacity, and the frontier."""
        self._scratch = num_envs * self.rows
        if self._scratch >= 2**31:
            raise ConfigError(f"replay.capacity: expected fewer than 2**31 rows, got {self._scratch}")

        self.extras = {name: tuple(shape) for name, shape in (extras or {}).items()}
        column = action_dim + 3
        self._columns: dict[str, slice] = {}
        for name, shape in self.extras.items():
            self._columns[name] = slice(column, column + math.prod(shape))
            column += math.prod(shape)
        self._obs = _reserve((self._scratch + 1, *self.obs_shape), obs_dtype, self.storage_device)
        self._data = _reserve((self._scratch + 1, column), torch.float32, self.storage_device)
        self._stage = torch.zeros(2 * num_envs, column, device=self.storage_device)
        now = self._stage.view(num_envs, 2, column)[:, 0]
        """The step of each environment, next to the zeros of the row after it, as they are written together."""
        self._now = [now[:, :action_dim], *now[:, action_dim : action_dim + 3].unbind(1)]
        self._now += [now[:, self._columns[name]].view(num_envs, *shape) for name, shape in self.extras.items()]

        self._flags: NDArray[np.uint8] = np.zeros(self._scratch + 1, np.uint8)
        self._base: Ints = np.arange(num_envs, dtype=np.int64) * self.rows
        self._head: Ints = np.zeros(num_envs, np.int64)
        self._end: Ints = np.zeros(num_envs, np.int64)
        self._episode_length: Ints = np.zeros(num_envs, np.int64)
        self._stored = 0
        self._indexes: dict[int, WindowIndex] = {}
        self._index(horizon)

    def __len__(self) -> int:
        """Return how many steps are stored, sampleable or not yet; see :meth:`num_windows` for the sampleable ones."""
        return self._stored

    def num_windows(self, horizon: int | None = None) -> int:
        """Return how many windows can be sampled now, of the constructed or another horizon.

        Raises:
            ConfigError: the buffer cannot hold one window of this horizon.
        """
        return len(self._index(horizon))

    @property
    def num_bytes(self) -> int:
        """Return the reserved memory in bytes, host and device together."""
        tensors = self._obs.nbytes + self._data.nbytes + self._stage.nbytes + self._flags.nbytes
        return tensors + sum(index.num_bytes for index in self._indexes.values())

    def describe(self) -> str:
        """Return one line: streams, rows, steps stored, memory in MB and device."""
        return (
            f"replay: {self.num_envs} x {self.rows:,} rows, {len(self):,} steps stored, "
            f"{self.num_bytes / 1e6:,.1f} MB on {self.storage_device}, windows {self.windows}, horizon {self.horizon}"
        )

    def add(self, step: Transition) -> None:
        """Store one step of every environment that made one; extras that were not declared are not stored.

        Args:
            step: obs, next_obs [E, *O], action [E, A], reward [E], terminated, truncated, valid [E] bool, extras [E, ...].

        Raises:
            ValueError: a field of another shape, or floating observations for integer storage.
        """
        self._check(step)
        valid: Bools = step.valid.cpu().numpy()
        terminated: Bools = step.terminated.cpu().numpy()
        truncated: Bools = step.truncated.cpu().numpy()
        done = terminated | truncated
        position = self._head
        rows = np.empty((self.num_envs, 2), np.int64)
        rows[:, 0] = self._base + position % self.rows
        rows[:, 1] = self._base + (position + 1) % self.rows
        if np.count_nonzero(valid) < self.num_envs:
            rows[~valid] = self._scratch
        self._write_rows(step, rows)

        self._stored += int(np.count_nonzero(valid)) - int(np.count_nonzero(self._flags[rows]))
        self._flags[rows[:, 0]] = REAL + TERMINATED * terminated.view(np.uint8) + TRUNCATED * truncated.view(np.uint8)
        self._flags[rows[:, 1]] = 0
        self._episode_length += valid
        for index in self._indexes.values():
            index.advance(position, self._episode_length, valid, done)
        if "winner" in self.extras and np.count_nonzero(done & valid):
            self._label(step, done & valid)
        self._end[valid] = position[valid] + 2
        self._head = position + valid
        if np.count_nonzero(done):
            ended = done & valid
            self._head += ended
            self._episode_length[ended] = 0

    def clear(self) -> None:
        """Forget all steps, and begin new episodes."""
        self._flags[:] = 0
        for counter in (self._head, self._end, self._episode_length):
            counter[:] = 0
        self._stored = 0
        for index in self._indexes.values():
            index.rebuild(self._flags, self._end)

    def cut(self) -> None:
        """End all running episodes where they are, as if truncated: what is added next begins new ones."""
        running = self._episode_length > 0
        last = (self._base + (self._head - 1) % self.rows)[running]
        self._flags[last] |= TRUNCATED
        self._data[torch.from_numpy(last).to(self.storage_device), self.action_dim + 2] = 1.0
        self._head = self._head + running
        self._episode_length[:] = 0
        for index in self._indexes.values():
            index.rebuild(self._flags, self._end)

    def sample(self, u: Tensor, horizon: int | None = None) -> SequenceBatch:
        """Return the windows that uniform numbers select, uniformly over all available starts.

        In padding (mask 0) the last observation is repeated, everything else is 0, and ``index`` is a row that nothing reads.

        Args:
            u: numbers in [0, 1), float64 [B].
            horizon: steps of a window, T; ``None``: the constructed one. A new horizon is indexed once, then maintained.

        Raises:
            RuntimeError: no window is available yet.
            ConfigError: the buffer cannot hold one window of this horizon.
        """
        rows, mask = self._index(horizon).locate(u.to(self.storage_device, torch.float64, non_blocking=self._async))
        steps, batch = mask.shape
        obs = self._obs.index_select(0, rows.flatten()).view(steps + 1, batch, *self.obs_shape)
        data = self._data.index_select(0, rows[:-1].flatten()).view(steps, batch, self._data.shape[1])
        index = torch.where(mask > 0, rows[:-1], self._scratch) if self.windows == "padded" else rows[:-1]
        if self.storage_device != self.device:
            obs, data, mask, index = (self._to_device(tensor) for tensor in (obs, data, mask, index))
        width = self.action_dim
        return SequenceBatch(
            obs=obs,
            action=data[..., :width],
            reward=data[..., width],
            terminated=data[..., width + 1],
            truncated=data[..., width + 2],
            mask=mask,
            index=index,
            extras={name: data[..., self._columns[name]].view(steps, batch, *shape) for name, shape in self.extras.items()},
        )

    def transitions(self, discount: float) -> TransitionBatch:
        """Return all steps that are stored, one by one, environment after environment and row after row.

        Args:
            discount: per decision.
        """
        rows = np.flatnonzero(self._flags[:-1] & REAL)
        base = rows // self.rows * self.rows
        here = torch.from_numpy(rows).to(self.storage_device)
        there = torch.from_numpy(base + (rows - base + 1) % self.rows).to(self.storage_device)
        width = self.action_dim
        data = self._data.index_select(0, here).to(self.device)
        return TransitionBatch(
            obs=self._obs.index_select(0, here).to(self.device),
            action=data[:, :width],
            reward=data[:, width],
            next_obs=self._obs.index_select(0, there).to(self.device),
            terminated=data[:, width + 1],
            discount=data.new_full((len(rows),), discount),
            extras={name: data[:, self._columns[name]].view(len(rows), *shape) for name, shape in self.extras.items()},
        )

    def write(self, name: str, index: Tensor, values: Tensor) -> None:
        """Overwrite an extra field in place; where a row occurs twice the last value stays (on a GPU: any of them).

        Rows name places, not steps: use the index of a batch before as many steps are added as the buffer holds.

        Args:
            name: the field.
            index: rows as in ``SequenceBatch.index``, int64 [...].
            values: [..., *shape of the field].

        Raises:
            ValueError: an undeclared field, or values of another shape.
        """
        if name not in self.extras:
            raise ValueError(f"replay field '{name}' was not declared; declared: {', '.join(self.extras) or 'none'}")
        if values.shape != (*index.shape, *self.extras[name]):
            raise ValueError(f"replay field '{name}': expected values {[*index.shape, *self.extras[name]]}, got {list(values.shape)}")
        columns = self._columns[name]
        where = index.reshape(-1).to(self.storage_device)
        new = values.detach().reshape(len(where), columns.stop - columns.start).to(self._data)
        self._data[:, columns].index_copy_(0, where, new)

    def state_dict(self, copy: bool = True) -> dict[str, Tensor]:
        """Return everything needed to continue bit-equal, on the CPU; only used rows, so that early states are small.

        Args:
            copy: False: ``obs`` may share memory with the buffer, for writing it out before the next :meth:`add`.
        """
        used = self._used_rows()
        rows = self._place(used)
        obs, data = self._obs[rows].cpu(), self._data[rows].cpu()
        shared = isinstance(rows, slice) and self.storage_device.type == "cpu"
        width = self.action_dim
        small = {
            "layout": torch.tensor([self.num_envs, self.rows]),
            "head": torch.from_numpy(self._head),
            "end": torch.from_numpy(self._end),
            "episode_length": torch.from_numpy(self._episode_length),
            "flags": torch.from_numpy(self._flags[used]),
            "action": data[:, :width],
            "reward": data[:, width],
        }
        for name, shape in self.extras.items():
            small[f"extras.{name}"] = data[:, self._columns[name]].reshape(len(data), *shape)
        state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in small.items()}
        return {"obs": obs.clone() if copy and shared else obs, **state}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state_dict` returned, dropping what is stored; horizon and kind of windows may differ.

        Raises:
            ValueError: a field is missing, unknown or of another shape; nothing was changed then.
        """
        expected = self._expected_shapes(state)
        missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
        if missing or unknown:
            raise ValueError(f"replay state does not fit this buffer: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}")
        layout = state["layout"].tolist()
        if layout != [self.num_envs, self.rows]:
            raise ValueError(
                f"replay state field 'layout': saved with {layout[0]} environments x {layout[1]} rows, this buffer has "
                f"{self.num_envs} x {self.rows}; use the same env.num_envs and replay.capacity"
            )
        for name, shape in expected.items():
            if tuple(state[name].shape) != shape:
                saved = list(state[name].shape)
                raise ValueError(f"replay state field '{name}': saved with shape {saved}, this buffer needs {list(shape)}")
        if state["obs"].dtype != self._obs.dtype:
            raise ValueError(f"replay state field 'obs': saved as {state['obs'].dtype}, this buffer stores {self._obs.dtype}")

        self._head, self._end = state["head"].cpu().numpy().copy(), state["end"].cpu().numpy().copy()
        self._episode_length = state["episode_length"].cpu().numpy().copy()
        used = self._used_rows()
        flags = state["flags"].cpu()
        self._flags[:] = 0
        self._flags[used] = flags.numpy()
        rows = self._place(used)
        self._obs[rows] = state["obs"].to(self.storage_device)
        fields = [state["action"], state["reward"][:, None], (flags & TERMINATED > 0)[:, None], (flags & TRUNCATED > 0)[:, None]]
        fields += [state[f"extras.{name}"].reshape(len(flags), math.prod(shape)) for name, shape in self.extras.items()]
        self._data[rows] = torch.cat([field.to(self._data) for field in fields], 1)
        self._stored = int(np.count_nonzero(self._flags))
        for index in self._indexes.values():
            index.rebuild(self._flags, self._end)

    def _index(self, horizon: int | None) -> WindowIndex:
        """Return the index of a horizon, built from the stored flags where it is new."""
        horizon = self.horizon if horizon is None else horizon
        found = self._indexes.get(horizon)
        if found is not None:
            return found
        if not 1 <= horizon < self.rows:
            raise ConfigError(
                f"replay.capacity: one window of {horizon} steps needs at least {max(horizon, 1)} decisions per environment, "
                f"this buffer keeps {self.rows - 1} for each of {self.num_envs}"
            )
        padded = self.windows == "padded"
        index = WindowIndex(horizon, padded, num_envs=self.num_envs, rows=self.rows, device=self.storage_device)
        index.rebuild(self._flags, self._end)
        self._indexes[horizon] = index
        return index

    def _write_rows(self, step: Transition, rows: Ints) -> None:
        """Write step and next observation to rows [E, 2]; both field groups in one indexed copy each."""
        device, dtype, later = self.storage_device, self._obs.dtype, self._async
        where = torch.from_numpy(rows).view(-1).to(device, non_blocking=later)
        obs = [value.to(device, dtype, non_blocking=later) for value in (step.obs, step.next_obs)]
        self._obs.index_copy_(0, where, torch.stack(obs, 1).flatten(0, 1))
        fields = [step.action, step.reward, step.terminated, step.truncated]
        fields += [step.extras.get(name, math.nan) for name in self.extras]
        for place, value in zip(self._now, fields, strict=True):
            if isinstance(value, Tensor):
                place.copy_(value.detach(), non_blocking=later)
            else:
                place.fill_(value)
        self._data.index_copy_(0, where, self._stage)

    def _label(self, step: Transition, ended: Bools) -> None:
        """Write to all steps of episodes that end with this one who has won (NaN: not said), and how many steps are left behind each."""
        winner = step.extras.get("winner", torch.full((self.num_envs,), math.nan))
        for env in np.flatnonzero(ended).tolist():
            length = min(int(self._episode_length[env]), self.rows - 1)  # one row of the ring is what followed
            rows = self._base[env] + (self._head[env] - np.arange(length)) % self.rows
            where = torch.from_numpy(rows).to(self.storage_device)
            left = torch.arange(length, dtype=torch.float32, device=self.storage_device)
            self._data[where, self._columns["left"].start] = left
            self._data[where, self._columns["winner"].start] = winner[env].to(self._data)

    def _check(self, step: Transition) -> None:
        """Refuse shapes that would otherwise broadcast, and observations that would silently lose their fraction."""
        envs = self.num_envs
        if step.obs.shape != (envs, *self.obs_shape) or step.next_obs.shape != step.obs.shape:
            shapes = f"{list(step.obs.shape)} and {list(step.next_obs.shape)}"
            raise ValueError(f"replay: expected obs and next_obs {[envs, *self.obs_shape]}, got {shapes}")
        if step.action.shape != (envs, self.action_dim):
            raise ValueError(f"replay: expected action {[envs, self.action_dim]}, got {list(step.action.shape)}")
        for name in ("reward", "terminated", "truncated", "valid"):
            value: Tensor = getattr(step, name)
            if value.shape != (envs,):
                raise ValueError(f"replay: expected {name} {[envs]}, got {list(value.shape)}")
        for name, shape in self.extras.items():
            value = step.extras.get(name, step.reward)
            if name in step.extras and value.shape != (envs, *shape):
                raise ValueError(f"replay: expected extra '{name}' {[envs, *shape]}, got {list(value.shape)}")
        if step.obs.is_floating_point() and not self._obs.is_floating_point():
            raise ValueError(f"replay: observations are stored as {self._obs.dtype}, got {step.obs.dtype}")

    def _used_rows(self) -> Ints | slice:
        """Return the rows written so far, streams one after the other; a slice where that is possible."""
        used = np.minimum(self._end, self.rows)
        if (used[:-1] == self.rows).all():
            return slice(0, int(used.sum()))
        return np.concatenate([base + np.arange(count) for base, count in zip(self._base, used, strict=True)])

    def _place(self, rows: Ints | slice) -> Tensor | slice:
        return rows if isinstance(rows, slice) else torch.from_numpy(rows).to(self.storage_device)

    def _expected_shapes(self, state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Return the shape of every field of a state with as many rows as its own counters say."""
        end = state.get("end")
        count = 0 if end is None else int(end.clamp(max=self.rows).sum())
        per_stream = dict.fromkeys(("head", "end", "episode_length"), (self.num_envs,))
        per_row = {"flags": (), "obs": self.obs_shape, "action": (self.action_dim,), "reward": ()}
        per_row |= {f"extras.{name}": shape for name, shape in self.extras.items()}
        return {"layout": (2,), **per_stream, **{name: (count, *shape) for name, shape in per_row.items()}}

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


def make_replay(
    config: RunConfig,
    spec: EnvSpec,
    num_envs: int,
    horizon: int,
    *,
    device: torch.device,
    extras: Mapping[str, tuple[int, ...]] | None = None,
) -> Replay:
    """Return the replay that a run's configuration asks for: windows of ``horizon`` steps of environments of this kind.

    Of games it also keeps what the other player saw and did, who that was, and who won (:func:`joint_records`).

    Raises:
        ConfigError: see :class:`Replay`.
    """
    return Replay(
        config.replay.capacity,
        num_envs,
        spec.obs_shape,
        spec.action_dim,
        horizon,
        windows=config.replay.windows,
        obs_dtype=spec.obs_dtype,
        extras={**joint_records(spec), **(extras or {})},
        device=device,
        storage_device=config.replay.storage_device,
    )


def joint_records(spec: EnvSpec) -> dict[str, tuple[int, ...]]:
    """Return what is kept of every step of a game besides the player's own part, name -> shape; nothing where there is no other player.

    ``other_obs`` and ``other_action`` are the other player's view and action, ``opponent`` its number, ``winner`` (1, -1, 0) and ``left``
    (steps behind this one) are known once the game has ended.
    """
    if spec.other is None:
        return {}
    shapes = {"other_obs": spec.other.obs_shape, "other_action": (spec.other.action_dim,)}
    return {**shapes, "opponent": (), "winner": (), "left": ()}


def _reserve(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros; on a CPU without touching the memory, so that only rows in use cost any."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape, torch.empty(0, dtype=dtype).numpy().dtype))
