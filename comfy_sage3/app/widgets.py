"""The page's own components: gr.HTML around a script. Data reaches a script as JSON and the page as text nodes only."""

from __future__ import annotations

import base64
import io
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ..compare.page import sheet

ASSETS = Path(__file__).parent / "assets"
FPS = 8
MOUNT = '<div class="s3-mount"></div>'  # a template without holes: nothing is ever filled into markup


@cache
def _asset(name: str) -> str:
    return (ASSETS / name).read_text("utf-8")


def style() -> str:
    """The page's style sheet."""
    return _asset("app.css")


def widget(name: str, value: Any = None, **options: Any) -> gr.HTML:
    """A component drawn by assets/NAME.js from ``value``, which is plain JSON data or None."""
    script = f"(() => {{\n{_asset('common.js')}\n{_asset(f'{name}.js')}\n}})();"
    return gr.HTML(value, html_template=MOUNT, js_on_load=script, apply_default_css=False, **options)


def uri(pixels: np.ndarray) -> str:
    """uint8 (H, W, 3) as a lossless data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def player_data(
    key: str, videos: tuple[np.ndarray, np.ndarray], labels: tuple[str, str], pair: dict[str, Any]
) -> dict[str, Any]:
    """What player.js shows. ``videos``: two uint8 (T, H, W, 3); ``pair``: as ``compare.measure.pair``, JSON-safe."""
    frames, height, width, _ = videos[0].shape
    sheets = [sheet(video) for video in videos]
    return {
        "id": key,
        "frames": frames,
        "width": width,
        "height": height,
        "columns": sheets[0][1],
        "sheets": {side: uri(pixels) for side, (pixels, _) in zip(("a", "b"), sheets, strict=True)},
        "labels": list(labels),
        "psnr": pair["psnr_per_frame"],
        "ssim": pair["ssim_per_frame"],
        "worst": pair["worst_frame"]["index"],
        "fps": FPS,
    }
