"""Videos come back as they went in."""

from __future__ import annotations

from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from worldmpc.report.video import CAPTION, side_by_side, write_video


def moving_square(count: int, height: int, width: int) -> list[np.ndarray]:
    """Frames of a bright square that moves over a smooth background."""
    frames = []
    for index in range(count):
        frame = np.zeros((height, width, 3), np.uint8)
        frame[..., 1] = np.linspace(40, 160, width).astype(np.uint8)
        frame[10:26, 4 * index : 4 * index + 16] = 220
        frames.append(frame)
    return frames


@pytest.mark.parametrize(("height", "width"), [(48, 80), (47, 81)])
def test_round_trip(tmp_path: Path, height: int, width: int) -> None:
    frames = moving_square(12, height, width)
    path = write_video(tmp_path / "new" / "final.mp4", frames, fps=25)
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = reader.__next__()
    assert isinstance(meta, dict)
    size = meta["source_size"]
    assert size == (width + width % 2, height + height % 2)
    assert meta["fps"] == 25 and meta["codec"].startswith("h264") and meta["pix_fmt"].startswith("yuv420p")
    decoded = [np.frombuffer(raw, np.uint8).reshape(size[1], size[0], 3)[:height, :width] for raw in reader]
    assert len(decoded) == len(frames)
    assert np.abs(np.stack(decoded).astype(float) - np.stack(frames)).mean() < 4
    assert [file.name for file in path.parent.iterdir()] == ["final.mp4"]


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    frames = moving_square(3, 32, 48)
    for wrong, message in (
        ([], "no frames"),
        ([*frames, frames[0][:16]], r"frame 3 has shape \[16, 48, 3\]"),
        ([frame.astype(np.float32) for frame in frames], "frame 0: expected .* uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            write_video(tmp_path / "final.mp4", wrong, fps=25)
    with pytest.raises(ValueError, match="fps above 0"):
        write_video(tmp_path / "final.mp4", frames, fps=0)
    assert list(tmp_path.iterdir()) == []


def test_frames_stand_beside_each_other_under_their_captions() -> None:
    left, right = moving_square(2, 48, 80)
    found = side_by_side({"now": left, "": right})
    assert found.shape == (48 + CAPTION, 160, 3) and found.dtype == np.uint8
    assert np.array_equal(found[CAPTION:, :80], left) and np.array_equal(found[CAPTION:, 80:], right)
    assert (found[:CAPTION, :80] < 128).any() and (found[:CAPTION, 80:] == 255).all()
