"""Frames as PNG files in ComfyUI's temp folder, where the browser can fetch them: so many and no more.

    temp/sage3_compare/<node>/<run>/a-00000.png

A node keeps the frames of its latest two runs; ComfyUI empties the folder when it starts.
"""

from __future__ import annotations

import re
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FOLDER = "sage3_compare"
MOST_SHOWN = 160  # pairs of frames; 160 of 1280x720 are about half a gigabyte
KEPT_RUNS = 2


def shown(count: int, worst: int, most: int = MOST_SHOWN) -> list[int]:
    """Which of ``count`` frames get a picture: all, or ``most`` spread evenly, the first, last and worst among them."""
    if count <= most:
        return list(range(count))
    chosen = {round(i * (count - 1) / (most - 1)) for i in range(most)}
    if worst not in chosen:  # in place of its nearest neighbour that is not an end
        chosen.remove(min(chosen - {0, count - 1}, key=lambda i: abs(i - worst)))
        chosen.add(worst)
    return sorted(chosen)


def pixels(image: Tensor) -> np.ndarray:
    """One image, (H, W, 3 or 4) in [0, 1], as the 8-bit RGB that ComfyUI saves; NaN and infinity become black."""
    rgb = image[..., :3].detach().to("cpu", torch.float32)
    rgb = torch.where(rgb.isfinite(), rgb, 0.0)
    return (rgb * 255).clamp(0, 255).to(torch.uint8).numpy()


class FrameFolder:
    """The files of one run of one node."""

    def __init__(self, node: str | None, temp: Path) -> None:
        name = re.sub(r"[^A-Za-z0-9_-]", "_", node or "none")  # a node in a subgraph is "12:7"
        self.subfolder = f"{FOLDER}/{name}"
        self.path = temp / FOLDER / name
        self.path.mkdir(parents=True, exist_ok=True)
        self._forget(KEPT_RUNS - 1)
        self.run = uuid.uuid4().hex[:12]
        (self.path / self.run).mkdir()

    def save(self, side: str, index: int, frame: np.ndarray) -> str:
        """Write ``frame``, uint8 (H, W, 3), and return its name inside ``reference``'s folder."""
        name = f"{side}-{index:05d}.png"
        Image.fromarray(frame).save(self.path / self.run / name, compress_level=1)
        return name

    def reference(self) -> dict[str, Any]:
        """Where the files lie, in the words of ComfyUI's /view."""
        return {"subfolder": f"{self.subfolder}/{self.run}", "type": "temp"}

    def _forget(self, kept: int) -> None:
        runs = sorted((d for d in self.path.iterdir() if d.is_dir()), key=lambda d: d.stat().st_mtime)
        for old in runs[: max(len(runs) - kept, 0)]:
            shutil.rmtree(old, ignore_errors=True)
