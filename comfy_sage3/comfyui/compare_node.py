"""Sage3 Compare: two pictures or two videos against each other, to look at on the node and to read as numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from .. import metrics
from ..errors import InputError
from .frames import MOST_SHOWN, FrameFolder, pixels, shown
from .inputs import where_known
from .status import current_prompt
from .workflow_id import workflow_of

VERSION = 1  # of the payload
IDENTICAL = "identical"  # stands for an infinite PSNR, which JSON cannot hold


class Sage3Compare(io.ComfyNode):
    """Two IMAGE batches: pictures to the browser, PSNR and SSIM of every frame, the worst frame."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return where_known(
            io.Schema,
            known={"search_aliases": ["compare videos", "compare images", "before after slider", "psnr", "ssim"]},
            node_id="Sage3Compare",
            display_name="Sage3 Compare",
            category="sage3",
            description=(
                "Two pictures or videos of one size against each other: wipe, side by side, difference or blink, frame by "
                "frame, with PSNR, SSIM and the frame that differs most. A is the reference."
            ),
            inputs=[
                io.Image.Input("images_a", tooltip="The reference, such as the video made with exact attention."),
                io.Image.Input("images_b", tooltip="As many frames of the same size."),
                io.Float.Input(
                    "fps", default=16.0, min=0.1, max=240.0, step=0.01, tooltip="How fast the player shows the frames."
                ),
                io.String.Input("label_a", default="A", tooltip="What A is called on the node and in the report."),
                io.String.Input("label_b", default="B", tooltip="What B is called on the node and in the report."),
            ],
            outputs=[io.String.Output("report", display_name="report")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, images_a: Tensor, images_b: Tensor, fps: float = 16.0, label_a: str = "A", label_b: str = "B"
    ) -> io.NodeOutput:
        import folder_paths
        from comfy.utils import ProgressBar

        check(images_a, images_b)
        labels = [label_a.strip() or "A", label_b.strip() or "B"]
        bar = ProgressBar(len(images_a))
        found = measure(images_a, images_b, lambda: bar.update(1))  # the bar is also where a user's cancel arrives
        folder = FrameFolder(cls.hidden.unique_id, Path(folder_paths.get_temp_directory()))
        indices = shown(len(images_a), found["worst"])
        files = {
            side: [folder.save(side, i, pixels(images[i])) for i in indices]
            for side, images in (("a", images_a), ("b", images_b))
        }
        size = {"width": int(images_a.shape[2]), "height": int(images_a.shape[1])}
        payload = {"version": VERSION, "labels": labels, "fps": float(fps), **size, **found}
        payload |= {"shown": indices, "files": folder.reference() | files}
        prompt = current_prompt()
        payload |= {"prompt": prompt, "workflow": workflow_of(prompt)}
        payload["notes"] = notes(images_a, images_b, labels, len(indices))
        report = text(payload)
        return io.NodeOutput(report, ui={"text": [report], "sage3_compare": [payload]})


def check(a: Tensor, b: Tensor) -> None:
    """Raises InputError, in one sentence, unless ``a`` and ``b`` are IMAGE batches that can be compared."""
    for name, images in (("images_a", a), ("images_b", b)):
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[3] < 3 or 0 in images.shape:
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise InputError(f"Sage3 Compare: {name} is {got}: connect a batch of colour images (frames, height, width, 3).")
    if a.shape[:3] != b.shape[:3]:
        raise InputError(
            f"Sage3 Compare: images_a is {described(a)} and images_b {described(b)}: "
            "connect as many frames of the same size on both sides."
        )


def described(images: Tensor) -> str:
    """ "17 frames of 832x480"."""
    count = len(images)
    return f"{count} frame{'s' if count != 1 else ''} of {images.shape[2]}x{images.shape[1]}"


def measure(a: Tensor, b: Tensor, on_frame: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """PSNR in dB or "identical", and SSIM (None below its window), of every frame as 8-bit pictures, and the worst frame.

    One frame is held at a time: a float64 copy of a whole video would not fit beside a model.
    """
    small = min(a.shape[1:3]) < metrics.SSIM_WINDOW
    noise, structure = [], []
    for x, y in zip(a, b, strict=True):
        pair = pixels(x)[None], pixels(y)[None]
        noise.append(float(metrics.psnr(*pair)[0]))
        structure.append(None if small else 1.0 if math.isinf(noise[-1]) else float(metrics.ssim(*pair)[0]))
        on_frame()
    finite = [x for x in noise if math.isfinite(x)]
    known = [x for x in structure if x is not None]
    return {
        "frames": len(noise),
        "psnr": [x if math.isfinite(x) else IDENTICAL for x in noise],
        "ssim": structure,
        "identical": len(noise) - len(finite),
        "mean_psnr": sum(finite) / len(finite) if finite else IDENTICAL,
        "mean_ssim": sum(known) / len(known) if known else None,
        "worst": metrics.worst_frame(noise),
    }


def notes(a: Tensor, b: Tensor, labels: list[str], pictures: int) -> list[str]:
    """What a reader of the numbers must know: broken frames first."""
    told = []
    for label, images in zip(labels, (a, b), strict=True):
        broken = [i for i, image in enumerate(images) if not bool(image[..., :3].isfinite().all())]
        if broken:
            told.append(
                f"{label}: {len(broken)} of {len(images)} frames hold NaN or infinity, the first is frame {broken[0] + 1}; "
                "such pixels count as black."
            )
    if pictures < len(a):
        told.append(
            f"Every frame is measured; {pictures} of {len(a)} are shown, the worst among them: "
            f"the browser gets at most {MOST_SHOWN}."
        )
    return told


def text(found: dict[str, Any]) -> str:
    """The numbers in a few plain lines; frames are counted from 1, as people do."""
    count, worst, (name_a, name_b) = found["frames"], found["worst"], found["labels"]
    frames = f"{count} frame{'s' if count != 1 else ''} of {found['width']}x{found['height']}"
    head = f"{name_b} against {name_a}, {frames}"
    if found["identical"] == count:
        lines = [f"{head}: identical, to the last pixel"]
    elif count == 1:
        lines = [f"{head}: {numbers(found['mean_psnr'], found['mean_ssim'])}"]
    else:
        lines = [f"{head}: mean {numbers(found['mean_psnr'], found['mean_ssim'])}"]
        lines.append(f"worst frame: {worst + 1}, {numbers(found['psnr'][worst], found['ssim'][worst])}")
        if found["identical"]:
            lines.append(f"{found['identical']} of the frames are identical and not in the mean PSNR")
    return "\n".join([*lines, *found["notes"]])


def numbers(psnr: float | str, ssim: float | None) -> str:
    """ "PSNR 34.21 dB, SSIM 0.9713"."""
    noise = f"PSNR {psnr:.2f} dB" if isinstance(psnr, float) else IDENTICAL
    return noise if ssim is None else f"{noise}, SSIM {ssim:.4f}"
