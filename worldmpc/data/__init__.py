"""Data: replay, sources."""

from __future__ import annotations

from worldmpc.data.replay import Replay
from worldmpc.data.source import ReplaySource

__all__ = ["Replay", "ReplaySource"]
