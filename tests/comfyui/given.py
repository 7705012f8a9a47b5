"""The ComfyUI that COMFYUI_PATH names."""

import json
import os
import re
from pathlib import Path

LOADS_THE_BUNDLED_VAE = (0, 3, 76)  # before, its loader knew one width only
WAN_NAMES_LAYERS = (0, 5, 0)
SETS_OVERRIDES = (0, 32, 0)  # set_model_optimized_attention
SEES_LATE_OVERRIDES = (0, 33, 0)  # at the latest: what is put into the slot as a sampling begins


def version():
    """Its version, as (0, 33, 0); COMFYUI_PATH is set."""
    text = Path(os.environ["COMFYUI_PATH"], "comfyui_version.py").read_text(encoding="utf-8")
    return tuple(map(int, re.search(r'__version__ = "(\d+)\.(\d+)\.(\d+)', text).groups()))


def warm_up(client):
    """One sampling that nobody looks at: on a GPU ComfyUI's first differs in its last bits from the same one later."""
    path = Path(__file__).parents[2] / "workflows" / "api" / "text_to_video_ab_latent.json"
    made = {key: node for key, node in json.loads(path.read_text("utf-8")).items() if int(key) < 20}
    made["11"]["inputs"] |= {"model": ["2", 0], "steps": 1}
    made["13"]["inputs"]["samples"] = ["11", 0]
    del made["10"], made["12"]
    client.wait(client.submit(made), timeout=300)


def kind(kernel):
    """The precision of a kernel: int8 of int8-sm90."""
    return kernel.split("-")[0]
