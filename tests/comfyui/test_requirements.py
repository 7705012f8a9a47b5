"""The node pack needs nothing that ComfyUI does not install."""

import asyncio
import builtins
import importlib.util
import sys
from pathlib import Path

import standin
import torch

ROOT = Path(__file__).resolve().parents[2]
PACK = "/somewhere/custom_nodes/a-pack"
# What every supported ComfyUI's requirements.txt names and the pack may use. torch brings no numpy; ComfyUI does.
INSTALLED = {"torch", "numpy", "safetensors", "PIL", "aiohttp"}


def test_the_pack_imports_only_what_comfyui_installs(comfy, monkeypatch, tmp_path):
    """Load the pack under ComfyUI's name for it, sample with its node, read its report, encode a prompt, compare.

    Every import its files ask for is watched, those inside functions and those already satisfied too.
    """
    asked = set()
    real = builtins.__import__

    def watched(name, globals=None, locals=None, fromlist=(), level=0):
        if level == 0 and str((globals or {}).get("__name__")).startswith(PACK):
            asked.add(name.split(".")[0])
        return real(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", watched)
    spec = importlib.util.spec_from_file_location(PACK, ROOT / "__init__.py")
    pack = importlib.util.module_from_spec(spec)
    sys.modules[PACK] = pack
    try:
        spec.loader.exec_module(pack)
        extension = asyncio.run(pack.comfy_entrypoint())
        attention, report, prompt, compare, *_ = asyncio.run(extension.get_node_list())
        settings = {"start_percent": 0.0, "end_percent": 1.0, "min_tokens": 0, "emulate": True}
        model = attention.execute(comfy.Patcher(), precision="fp4", **settings).args[0]
        model.sample([1.0, 0.5])
        assert report.execute(model, {"samples": torch.zeros(1)}).args[2].startswith("4 attention calls: 4 accelerated")
        prompt.execute("a red circle")
        sys.modules["folder_paths"].folders["temp"] = [str(tmp_path)]
        assert "identical" in compare.execute(torch.zeros(2, 16, 16, 3), torch.zeros(2, 16, 16, 3)).args[0]
    finally:
        for module in [m for m in sys.modules if m.startswith(PACK)]:
            del sys.modules[module]
    comfyui = {name.split(".")[0] for name in standin.modules()}
    assert {"torch", "comfy_api", "comfy", "server", "folder_paths"} <= asked  # the watch works
    assert not asked - comfyui - INSTALLED - sys.stdlib_module_names
