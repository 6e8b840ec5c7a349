"""Data: replay, sources."""

from __future__ import annotations

from worldmpc.data.replay import Replay
from worldmpc.data.rollout import Experience
from worldmpc.data.source import NoSource, ReplaySource
from worldmpc.data.stream import StreamSource

__all__ = ["Experience", "NoSource", "Replay", "ReplaySource", "StreamSource"]
