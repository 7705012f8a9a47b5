"""The ComfyUI that COMFYUI_PATH names."""

import os
import re
from pathlib import Path

LOADS_THE_BUNDLED_VAE = (0, 3, 76)  # before, its loader knew one width only
WAN_NAMES_LAYERS = (0, 5, 0)


def version():
    """Its version, as (0, 33, 0); COMFYUI_PATH is set."""
    text = Path(os.environ["COMFYUI_PATH"], "comfyui_version.py").read_text(encoding="utf-8")
    return tuple(map(int, re.search(r'__version__ = "(\d+)\.(\d+)\.(\d+)', text).groups()))
