"""Which model a plan was made for: its architecture and a small sample of its weights.

Weights are read as the checkpoint has them: where ComfyUI has patched one in place (LoRA), from its backup. So the
fingerprint stays the same with patches, after a reload, and wherever the weights lie; another checkpoint has another.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..plan.calibrate import spread
from ..plan.plan import LayerPlan

SMALL, LARGE, VALUES = 8, 24, 32  # tensors of one dimension, of more, and values of each
PREFIX = "diffusion_model."


@torch.no_grad()
def fingerprint_of(model: Any) -> str:
    """ "WanModel-0123456789abcdef" of a MODEL; reads about a thousand values."""
    network = model.model.diffusion_model
    weights = {_plain(name): (name, t) for name, t in network.state_dict().items() if isinstance(t, Tensor)}
    names = sorted(weights)
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name} {tuple(weights[name][1].shape)}\n".encode())
    floats = [n for n in names if weights[n][1].is_floating_point() and weights[n][1].numel()]
    for group, count in (
        ([n for n in floats if weights[n][1].ndim < 2], SMALL),
        ([n for n in floats if weights[n][1].ndim >= 2], LARGE),
    ):
        for i in spread(len(group), count):
            name, tensor = weights[group[i]]
            values = _values(_unpatched(model, f"{PREFIX}{name}", tensor))
            digest.update(f"{group[i]} {values}\n".encode())
    kind = re.sub(r"\W", "", type(getattr(network, "_orig_mod", network)).__name__, flags=re.ASCII)
    return f"{kind}-{digest.hexdigest()[:16]}"


def check(plan: Any, model: Any) -> LayerPlan:
    """``plan``, if it was made for ``model``. Raises InputError, which says what to do, where it was not."""
    if not isinstance(plan, LayerPlan):
        raise InputError("This is no precision plan: connect Sage3 Precision Plan or Sage3 Load Plan.")
    found = fingerprint_of(model)
    if plan.model != found:
        raise InputError(
            f"This plan was made for another model ({plan.model}, this one is {found}): make one for this model with "
            "Sage3 Precision Plan, or load the model that the plan belongs to."
        )
    return plan


def _plain(name: str) -> str:
    """A weight's name as it is without torch.compile's wrapper."""
    return name.replace("_orig_mod.", "")


def _unpatched(model: Any, key: str, tensor: Tensor) -> Tensor:
    """The weight before patches: ComfyUI keeps it where it wrote a patched one in its place."""
    kept = getattr(model, "hook_backup", {}).get(key)
    if kept is not None:
        return kept[0]  # type: ignore[no-any-return]
    kept = getattr(model, "backup", {}).get(key)
    return tensor if kept is None else kept.weight


def _values(tensor: Tensor) -> list[float]:
    """A few values spread over ``tensor``, whatever its dtype and device."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) and hasattr(tensor, "dequantize"):
        tensor = tensor.dequantize()  # packed formats: what they stand for
    places = spread(tensor.numel(), VALUES)
    found = []
    for place in places:
        index = []
        for size in reversed(tensor.shape):  # by coordinates: flattening a strided weight would copy it
            place, at = divmod(place, size)
            index.append(at)
        found.append(tensor[tuple(reversed(index))])
    return torch.stack([x.detach().float().cpu() for x in found]).tolist() if found else []
