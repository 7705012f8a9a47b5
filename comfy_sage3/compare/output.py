"""The results folder: written beside its final place, then renamed, so that nobody ever sees half of one."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import InputError
from .measure import SCHEMA, Comparison
from .page import report_html
from .plots import error_plot, psnr_plot

FRAME_SECONDS = 1 / 8
VIEW_SIDE = 384  # small videos are enlarged to about this many pixels for viewing
GAP = 8  # pixels between the two halves of side_by_side.webp
METRICS = "metrics.json"


def read(folder: Path) -> Comparison:
    """The comparison that ``write`` left in ``folder``. Raises InputError where its files are not whole."""
    try:
        metrics = json.loads((folder / METRICS).read_text("utf-8"))
        if metrics.get("schema") != SCHEMA:
            raise ValueError("not a comparison")
        videos = {key: _frames(folder / key, metrics["request"]["frames"]) for key in ("a", "b")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} does not hold a whole comparison ({error}): make it again.") from None
    return Comparison(metrics, videos)


def _frames(folder: Path, count: int) -> np.ndarray:
    return np.stack([np.asarray(Image.open(folder / f"{i:04d}.png").convert("RGB")) for i in range(count)])


def check_out(out: Path) -> None:
    """Raise InputError unless ``out`` can be written to: a new, empty, or earlier comparison's folder."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: give a folder for the results with --out.")
    if out.is_dir() and any(out.iterdir()) and not _is_ours(out):
        raise InputError(f"{out} holds files that are not an earlier comparison's: give a new or empty folder with --out.")
    base = out.absolute().parent
    while not base.exists():
        base = base.parent
    try:
        tempfile.TemporaryFile(dir=base).close()  # without a name, so that a kill in between leaves nothing
    except OSError as error:
        raise InputError(f"Cannot write to {base} ({error.strerror}): give a folder you may write to with --out.") from None


def write(comparison: Comparison, out: Path) -> Path:
    """Write every file of the comparison to ``out``, in place of an earlier one, and return ``out``."""
    with replaced(out) as folder:
        (folder / METRICS).write_text(json.dumps(comparison.metrics, indent=1, allow_nan=False) + "\n", "utf-8")
        for key, video in comparison.videos.items():
            (folder / key).mkdir()
            for i, frame in enumerate(video):
                Image.fromarray(frame).save(folder / key / f"{i:04d}.png")
            _animate(folder / f"{key}.webp", enlarged(video))
        _animate(folder / "side_by_side.webp", side_by_side(comparison.videos["a"], comparison.videos["b"]))
        (folder / "psnr.png").write_bytes(psnr_plot(comparison.metrics))
        plot = error_plot(comparison.metrics)
        if plot:
            (folder / "attention_error.png").write_bytes(plot)
        (folder / "report.html").write_text(report_html(comparison.metrics, comparison.videos), "utf-8")
    return out


@contextmanager
def replaced(out: Path) -> Iterator[Path]:
    """A private sibling of ``out`` that takes its place at the end, or is removed if anything goes wrong."""
    check_out(out)
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            yield folder
            folder.chmod(0o755)  # mkdtemp makes it private
            _swap(folder, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise InputError(f"Cannot write the results to {out} ({error}): free some space or give another --out.") from None


def _swap(folder: Path, out: Path) -> None:
    """Rename ``folder`` to ``out``; an earlier ``out`` steps aside first and comes back if that fails."""
    if not out.exists():
        folder.rename(out)
        return
    aside = folder.with_name(folder.name + "-earlier")
    out.rename(aside)
    try:
        folder.rename(out)
    except BaseException:
        aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _is_ours(out: Path) -> bool:
    try:
        return json.loads((out / METRICS).read_text("utf-8")).get("schema") == SCHEMA
    except (OSError, ValueError, AttributeError):
        return False


def enlarged(video: np.ndarray) -> np.ndarray:
    """The video with every pixel repeated a whole number of times, to about ``VIEW_SIDE`` pixels a side."""
    factor = max(1, VIEW_SIDE // max(video.shape[1:3]))
    return video.repeat(factor, 1).repeat(factor, 2)


def side_by_side(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A left, B right, a grey gap between."""
    a, b = enlarged(a), enlarged(b)
    gap = np.full((a.shape[0], a.shape[1], GAP, 3), 128, np.uint8)
    return np.concatenate([a, gap, b], 2)


def _animate(path: Path, video: np.ndarray) -> None:
    frames: list[Any] = [Image.fromarray(f) for f in video]
    duration = round(FRAME_SECONDS * 1000)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, loop=0, lossless=True)
