"""Frames beside each other, and mp4 files of frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw

from worldmpc.files import written_aside

CAPTION = 16
"""Height of a line of text above a frame, in pixels."""


def write_video(path: str | Path, frames: Sequence[np.ndarray], fps: float) -> Path:
    """Write frames as an H.264 mp4 that browsers play, and return its path.

    The file appears complete or not at all. Odd heights and widths are padded by one repeated row or column.

    frames: each [height, width, 3] uint8, all of one size. fps: frames per second.

    Raises:
        ValueError: no frames, a frame of another shape or type, or a rate that is not positive.
    """
    path = Path(path)
    if not len(frames):
        raise ValueError(f"{path.name}: no frames to write")
    if fps <= 0:
        raise ValueError(f"{path.name}: expected fps above 0, got {fps}")
    height, width = _check(frames, path.name)
    with written_aside(path) as partial:
        _encode(partial, frames, height, width, fps)
    return path


def side_by_side(frames: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return frames [height, width, 3] uint8 beside each other under their captions: [height + CAPTION, sum of widths, 3]."""
    strips = []
    for caption, frame in frames.items():
        strip = Image.new("RGB", (frame.shape[1], CAPTION), "white")
        ImageDraw.Draw(strip).text((3, 2), caption, fill="black")
        strips.append(np.concatenate((np.asarray(strip), frame)))
    return np.concatenate(strips, 1)


def _encode(path: Path, frames: Sequence[np.ndarray], height: int, width: int, fps: float) -> None:
    pad = ((0, height % 2), (0, width % 2), (0, 0))
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (width + width % 2, height + height % 2),
        fps=fps,  # pyright: ignore[reportArgumentType]
        codec="libx264",
        pix_fmt_in="rgb24",
        pix_fmt_out="yuv420p",
        macro_block_size=2,
        quality=None,  # pyright: ignore[reportArgumentType]
        output_params=["-crf", "18", "-movflags", "+faststart", "-f", "mp4"],
        ffmpeg_log_level="error",
    )
    try:
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(np.pad(frame, pad, mode="edge")))
    finally:
        writer.close()


def _check(frames: Sequence[np.ndarray], name: str) -> tuple[int, int]:
    shape = frames[0].shape
    for index, frame in enumerate(frames):
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(f"{name}: frame {index}: expected [height, width, 3] uint8, got {list(frame.shape)} {frame.dtype}")
        if frame.shape != shape:
            raise ValueError(f"{name}: frame {index} has shape {list(frame.shape)}, the first {list(shape)}")
    return shape[0], shape[1]
