"""Checks inside a real ComfyUI on tiny models; test_tiny_*.py assert on what it prints.

    python tiny_driver.py COMFYUI PACK FOLDER GROUP

One line of JSON: {check: what was seen}, or {check: {"failed": traceback}} for a check that could not be made.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import tiny_comfy

comfyui, pack, folder = (Path(x) for x in sys.argv[1:4])
group = sys.argv[4]
tiny_comfy.start(comfyui, folder)

import tiny_checks  # noqa: E402
import tiny_models  # noqa: E402
import tiny_nodes  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(2)
comfy = tiny_comfy.Comfy(pack, folder)
tiny_comfy.quiet()
tiny_nodes.register()
for name in tiny_models.MODELS:
    if name == "wan" or group == "models" or name == "sd3":
        tiny_models.write(name, folder / "models" / "diffusion_models")
lab = tiny_checks.Lab(comfy, tiny_comfy.Watch())

seen: dict[str, Any] = {}
for name, check in tiny_checks.group(group).items():
    try:
        seen[name] = check(lab)
    except Exception:
        seen[name] = {"failed": traceback.format_exc()}
print(json.dumps(seen))
