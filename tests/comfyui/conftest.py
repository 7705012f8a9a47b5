import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for standin.py


@pytest.fixture
def comfy(monkeypatch):
    """The stand-in installed as ComfyUI; the pack's node module is imported afresh against it."""
    import standin

    standin.install_modules(monkeypatch)
    monkeypatch.delitem(sys.modules, "comfy_sage3.comfyui.nodes", raising=False)
    yield standin
    sys.modules.pop("comfy_sage3.comfyui.nodes", None)
