"""Every comparison in one home: attention outputs against a reference, and one video against another.

Attention errors as in the SageAttention papers (arXiv 2505.11594, appendix A.3). PSNR and SSIM give the numbers of
scikit-image without needing it, for ComfyUI does not install that; no metric here needs downloaded weights. Videos are
(T, H, W, 3) arrays or tensors, uint8 or float in [0, 1].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError

if TYPE_CHECKING:
    import numpy as np

SSIM_CONVENTION = (
    "SSIM: Gaussian window 11x11, sigma 1.5, population covariance, the mean over R, G and B and over pixels "
    "at least 5 from the border, data range 1 (as scikit-image has it)"
)
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # keep the quotient finite where both frames are flat


def attention_error(out: Tensor, ref: Tensor) -> dict[str, float]:
    """How far ``out`` is from ``ref``, tensors of one shape, over all elements in float64.

    Returns cosine (sum(o r) / (|o| |r|)), relative_l1 (sum |o - r| / sum |r|), rmse and max_abs. Two all-zero
    tensors agree: cosine 1 and relative_l1 0; where only one is zero, cosine is 0. NaN in ``out`` gives NaN.

    Raises InputError when the shapes differ or there is nothing to compare.
    """
    if out.shape != ref.shape:
        raise InputError(f"out is {tuple(out.shape)} and ref {tuple(ref.shape)}: compare equal shapes.")
    if out.numel() == 0:
        raise InputError("out and ref are empty: give at least one element.")
    o, r = (t.detach().to("cpu", torch.float64).flatten() for t in (out, ref))
    error = (o - r).abs()
    norms, size, difference = float(o.norm() * r.norm()), float(r.abs().sum()), float(error.sum())
    same = difference == 0
    return {
        "cosine": float(o @ r) / norms if norms else float(same),
        "relative_l1": difference / size if size else (0.0 if same else math.inf),
        "rmse": float(error.square().mean().sqrt()),
        "max_abs": float(error.max()),
    }


def psnr(a: Any, b: Any) -> np.ndarray:
    """Peak signal-to-noise ratio of each frame in dB, (T,) float64; infinite where two frames are equal."""
    import numpy as np

    a, b = _pair(a, b)
    errors = [float(np.square(x - y).mean()) for x, y in zip(a, b, strict=True)]
    return np.array([-10 * math.log10(e) if e else math.inf for e in errors], dtype=np.float64)


def ssim(a: Any, b: Any) -> np.ndarray:
    """Structural similarity per frame, (T,) float64, by ``SSIM_CONVENTION``; frames of 11 pixels and up."""
    import numpy as np

    a, b = _pair(a, b)
    if min(a.shape[1:3]) < SSIM_WINDOW:
        raise InputError(
            f"Frames of {a.shape[2]}x{a.shape[1]} pixels are smaller than the window of SSIM: "
            f"give at least {SSIM_WINDOW}x{SSIM_WINDOW}."
        )
    return np.array([_ssim(torch.from_numpy(x), torch.from_numpy(y)) for x, y in zip(a, b, strict=True)], dtype=np.float64)


def _ssim(a: Tensor, b: Tensor) -> float:
    """SSIM of two frames, (H, W, 3) float64 in [0, 1]."""
    x, y = (t.permute(2, 0, 1)[:, None] for t in (a, b))  # a channel is a picture of its own
    mean_x, mean_y, xx, yy, xy = (_blur(t) for t in (x, y, x * x, y * y, x * y))
    of_means, of_spreads = mean_x * mean_y, xy - mean_x * mean_y
    spread_x, spread_y = xx - mean_x**2, yy - mean_y**2
    alike = (2 * of_means + SSIM_C1) * (2 * of_spreads + SSIM_C2)
    most = (mean_x**2 + mean_y**2 + SSIM_C1) * (spread_x + spread_y + SSIM_C2)
    return float((alike / most).mean())


def _blur(x: Tensor) -> Tensor:
    """Gaussian means around the pixels that have a whole window: (3, 1, H, W) -> (3, 1, H - 10, W - 10)."""
    distance = torch.arange(SSIM_WINDOW, dtype=x.dtype) - SSIM_WINDOW // 2
    weights = torch.exp(-(distance**2) / (2 * SSIM_SIGMA**2))
    weights = weights / weights.sum()
    return F.conv2d(F.conv2d(x, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))


def worst_frame(per_frame: Any) -> int:
    """The index of the lowest value (the first of equals), for PSNR and SSIM where more is better."""
    values = [float(x) for x in per_frame]
    if not values:
        raise InputError("There are no frames: give at least one value.")
    return min(range(len(values)), key=values.__getitem__)


def motion_energy(video: Any) -> float:
    """Mean |x[t+1] - x[t]| over pixels in [0, 1]: how much moves. Needs 2 frames."""
    import numpy as np

    return float(np.abs(np.diff(_video(video, "motion energy", 2), axis=0)).mean())


def flicker(video: Any) -> float:
    """Mean |x[t+2] - 2 x[t+1] + x[t]| over pixels in [0, 1]: change that is not steady. Needs 3 frames."""
    import numpy as np

    return float(np.abs(np.diff(_video(video, "flicker", 3), n=2, axis=0)).mean())


def _pair(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    a, b = _video(a, "a comparison", 1), _video(b, "a comparison", 1)
    if a.shape != b.shape:
        raise InputError(f"The videos have shapes {a.shape} and {b.shape}: compare equal shapes.")
    return a, b


def _video(video: Any, purpose: str, frames: int) -> np.ndarray:
    """``video`` as float64 (T, H, W, 3) in [0, 1]; raises InputError with what to give instead."""
    import numpy as np

    x = video.detach().to("cpu").numpy() if isinstance(video, Tensor) else np.asarray(video)
    if x.ndim != 4 or x.shape[3] != 3 or 0 in x.shape:
        raise InputError(f"A video has shape {x.shape}: give (frames, height, width, 3).")
    if x.shape[0] < frames:
        raise InputError(f"{purpose.capitalize()} needs {frames} frames and this video has {x.shape[0]}.")
    if x.dtype == np.uint8:
        return x.astype(np.float64) / 255.0
    if not np.issubdtype(x.dtype, np.floating):
        raise InputError(f"A video is {x.dtype}: give uint8, or float in [0, 1].")
    x = x.astype(np.float64)
    if not (x.min() >= 0.0 and x.max() <= 1.0):  # also true for NaN
        raise InputError(f"A video has values from {x.min():.4g} to {x.max():.4g}: bring it into [0, 1].")
    return x
