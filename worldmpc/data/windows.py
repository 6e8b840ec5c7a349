"""Which windows of a ring of rows may be sampled: a FIFO of start rows per stream, maintained step by step."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

REAL, TERMINATED, TRUNCATED = 1, 2, 4
"""Bits of a row's flags; 0 marks rows without a step (unused, frontier, last observation of an episode)."""


class WindowIndex:
    """Available window starts of ``num_envs`` streams of ``rows`` ring rows each, for one horizon.

    A start is available once its window is complete: ``horizon`` steps follow, or (``padded`` only) its episode ended.
    Windows complete in the order of their starts, and rows are overwritten in that order too, so each stream is a FIFO:
    the counters ``pushed`` and ``popped`` live on the host, the entries (row, real steps) on the storage device.
    Positions are absolute (they never wrap); row = position modulo ``rows``.
    """

    def __init__(self, horizon: int, padded: bool, *, num_envs: int, rows: int, device: torch.device) -> None:
        """Create an empty index [num_envs streams x rows]."""
        self.horizon = horizon
        self.padded = padded
        self._rows = rows
        self._base: Ints = np.arange(num_envs, dtype=np.int64) * rows
        self._pushed: Ints = np.zeros(num_envs, np.int64)
        self._popped: Ints = np.zeros(num_envs, np.int64)
        self._starts: Ints = np.zeros(num_envs * rows, np.int64)
        self._entries = torch.zeros(num_envs * rows, 2, dtype=torch.int32, device=device)
        self._offsets = torch.arange(horizon + 1, device=device)[:, None]
        self._ones = torch.ones(horizon, 1, device=device)
        self._base_device = torch.from_numpy(self._base).to(device)
        self._streams: Tensor | None = None
        self._total = 0

    def __len__(self) -> int:
        """Return how many windows can be sampled."""
        return self._total

    @property
    def num_bytes(self) -> int:
        """Return the memory of the entries on host and device, in bytes."""
        return self._starts.nbytes + self._entries.nbytes

    def advance(self, position: Ints, episode_length: Ints, valid: Bools, done: Bools) -> None:
        """Take one step of every stream: make the windows it completes available, forget those it overwrote.

        Args:
            position: where the step was stored [E]; the row after it was written too.
            episode_length: steps of the running episode, this one included [E].
            valid: False where the stream made no step [E].
            done: True where the episode ended with this step [E].
        """
        self._evict(position + (2 - self._rows), valid)
        if self.padded and np.count_nonzero(done):
            steps = np.minimum(episode_length, self.horizon)
            count = np.where(done, steps, episode_length >= self.horizon) * valid
            stream = np.repeat(np.arange(len(count)), count)
            nth = np.arange(len(stream)) - np.repeat(np.cumsum(count) - count, count)
            self._push(stream, (position - steps + 1)[stream] + nth, steps[stream] - nth, self._pushed[stream] + nth)
            self._pushed += count
        else:
            complete = (episode_length >= self.horizon) & valid
            number = np.count_nonzero(complete)
            if number == len(complete):
                self._push(slice(None), position - (self.horizon - 1), self.horizon, self._pushed)
                self._pushed += 1
            elif number:
                stream = np.flatnonzero(complete)
                self._push(stream, position[stream] - (self.horizon - 1), self.horizon, self._pushed[stream])
                self._pushed[stream] += 1
        self._total = int((self._pushed - self._popped).sum())
        self._streams = None

    def rebuild(self, flags: NDArray[np.uint8], end: Ints) -> None:
        """Find all available windows in stored rows.

        Args:
            flags: bits of each row [E * rows].
            end: position after the last written row [E].
        """
        self._pushed[:] = 0
        self._popped[:] = 0
        for stream, last in enumerate(end):
            positions = np.arange(max(0, int(last) - self._rows), int(last))
            bits = flags[self._base[stream] + positions % self._rows]
            real = np.flatnonzero(bits)
            if not len(real):
                continue
            ends = np.flatnonzero(bits & (TERMINATED | TRUNCATED))
            nth = np.searchsorted(ends, real)
            closed = nth < len(ends)
            until = np.append(ends, real[-1])[nth]
            left = until - real + 1
            chosen = (left >= self.horizon) | (closed & self.padded)
            starts, count = positions[real[chosen]], int(chosen.sum())
            self._push(np.full(count, stream), starts, np.minimum(left[chosen], self.horizon), np.arange(count))
            self._pushed[stream] = count
        self._total = int(self._pushed.sum())
        self._streams = None

    def locate(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Map uniform numbers to windows, uniformly over all available starts and without a host synchronisation.

        Args:
            u: numbers in [0, 1), float64 on the storage device [B].

        Returns:
            rows [T+1, B] int64, the last real row repeated after an episode's end, and mask [T, B] float.

        Raises:
            RuntimeError: no window is available yet.
        """
        if not self._total:
            raise RuntimeError(f"replay holds no complete window of {self.horizon} steps yet: check num_windows() or ready() first")
        # A caller's 1.0 would otherwise read an entry that is not there.
        nth = (u * self._total).long().clamp_(max=self._total - 1)
        if len(self._base) == 1:
            entry = self._entries.index_select(0, (nth + int(self._popped[0])) % self._rows)
            row, steps = entry.long().unbind(1)
            return (row + self._clamped(steps)) % self._rows, self._mask(steps)
        streams = self._streams
        if streams is None:
            cumulative = np.cumsum(self._pushed - self._popped)
            offset = self._popped - (cumulative - (self._pushed - self._popped))
            streams = torch.from_numpy(np.stack((cumulative, offset))).to(self._entries.device, non_blocking=True)
            self._streams = streams
        stream = torch.searchsorted(streams[0], nth, right=True)
        base = self._base_device[stream]
        slot = base + (nth + streams[1][stream]) % self._rows
        row, steps = self._entries.index_select(0, slot).long().unbind(1)
        return base + (row + self._clamped(steps)) % self._rows, self._mask(steps)

    def _clamped(self, steps: Tensor) -> Tensor:
        return torch.minimum(self._offsets, steps) if self.padded else self._offsets

    def _mask(self, steps: Tensor) -> Tensor:
        return (self._offsets[:-1] < steps).float() if self.padded else self._ones.expand(-1, len(steps))

    def _evict(self, oldest: Ints, valid: Bools) -> None:
        """Forget starts before position ``oldest`` [E]; one step overwrites at most two rows of a stream."""
        for _ in range(2):
            first = self._starts[self._base + self._popped % self._rows]
            gone = (first < oldest) & (self._popped < self._pushed) & valid
            if not np.count_nonzero(gone):
                return
            self._popped += gone

    def _push(self, stream: Ints | slice, position: Ints, steps: Ints | int, nth: Ints) -> None:
        """Write entries: start position [n], its real steps [n] and its number in the stream's FIFO [n]."""
        slot = self._base[stream] + nth % self._rows
        self._starts[slot] = position
        entry = np.empty((len(slot), 2), np.int32)
        entry[:, 0] = position % self._rows
        entry[:, 1] = steps
        device = self._entries.device
        where = torch.from_numpy(slot).to(device, non_blocking=True)
        self._entries.index_copy_(0, where, torch.from_numpy(entry).to(device, non_blocking=True))
