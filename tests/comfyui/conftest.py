import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for standin.py


@pytest.fixture
def comfy(monkeypatch):
    """The stand-in installed as ComfyUI; the pack's node modules are imported afresh against it."""
    import standin

    standin.install_modules(monkeypatch)
    forget_nodes()
    yield standin
    forget_nodes()


def forget_nodes():
    """Let every module of nodes be imported anew."""
    for name in [m for m in sys.modules if m.startswith("comfy_sage3.comfyui.") and m.endswith(("nodes", "_node"))]:
        del sys.modules[name]
