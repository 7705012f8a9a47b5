"""Runs inside a real ComfyUI's Python (see test_shipping.py): the pack as a clone in custom_nodes, twice, and pip-installed.

    python both.py COMFYUI PACK FOLDER SITE       # SITE: a folder that pip installed comfy-sage3 into

Prints one line of JSON with what it saw.
"""

import asyncio
import importlib
import json
import shutil
import sys
from pathlib import Path

comfyui, pack, folder, site = (Path(x) for x in sys.argv[1:5])
sys.path.insert(0, str(Path(__file__).parent / "tiny"))
import tiny_comfy  # noqa: E402

tiny_comfy.start(comfyui, folder)
sys.path.append(str(site))

import nodes  # noqa: E402
import torch  # noqa: E402

import comfy_sage3  # noqa: E402

comfy = tiny_comfy.Comfy(pack, folder)
tiny_comfy.quiet()
another = folder / "custom_nodes" / "a-copy.of-it"
shutil.copytree(pack, another, ignore=shutil.ignore_patterns(".*", "tests", "benchmarks", "csrc", "runs"))
loaded = asyncio.run(nodes.load_custom_node(str(another), module_parent="custom_nodes"))

doors = {
    "pip": comfy_sage3,
    "clone": comfy.module("attention"),
    "copy": importlib.import_module(f"{str(another).replace('.', '_x_')}.comfy_sage3.attention"),
}
g = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(1, 2, 64, 64, generator=g) for _ in range(3))
outs = {name: module.attention(q, k, v, precision="fp4", emulate=True) for name, module in doors.items()}
seen = {
    "pip_file": comfy_sage3.__file__,
    "loaded": loaded,
    "node": nodes.NODE_CLASS_MAPPINGS["Sage3Attention"].__module__.startswith(str(another).replace(".", "_x_")),
    "different_modules": len({id(m.attention) for m in doors.values()}),
    "same": all(torch.equal(out, outs["pip"]) for out in outs.values()),
    "namespaces": sorted(
        {str(op).split("::")[0] for op in torch._C._dispatch_get_all_op_names() if "fp4_attention" in str(op)}
    ),
}
print(json.dumps(seen))
