"""Runs tiny_driver.py in a real ComfyUI, once for each group of checks."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from comfy_sage3.workflow.server import find_python

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
OLDEST = (0, 33)
sys.path.insert(0, str(HERE))  # for tiny_expect.py


def drive(group, folder):
    """What the checks of ``group`` saw; skips where no ComfyUI is given."""
    given = os.environ.get("COMFYUI_PATH")
    if not given:
        pytest.skip("COMFYUI_PATH is not set: no real ComfyUI to run tiny models in")
    comfyui = Path(given).resolve()
    version = re.search(r'__version__ = "([\d.]+)"', (comfyui / "comfyui_version.py").read_text(encoding="utf-8"))[1]
    if group != "together" and tuple(map(int, version.split(".")[:2])) < OLDEST:
        pytest.skip(f"the tiny models and what they are expected to do are those of ComfyUI 0.33; this one is {version}")
    python = os.environ.get("COMFYUI_PYTHON")
    command = [str(find_python(comfyui, Path(python) if python else None)), str(HERE / "tiny_driver.py")]
    command += [str(comfyui), str(ROOT), str(folder), group]
    done = subprocess.run(command, capture_output=True, text=True, cwd=comfyui, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def all_models(tmp_path_factory):
    return drive("models", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def all_together(tmp_path_factory):
    return drive("together", tmp_path_factory.mktemp("together"))


@pytest.fixture(scope="session")
def all_offload(tmp_path_factory):
    return drive("offload", tmp_path_factory.mktemp("offload"))


@pytest.fixture
def models(all_models):
    return lambda name: _seen(all_models, name)


@pytest.fixture
def together(all_together):
    return lambda name: _seen(all_together, name)


@pytest.fixture
def offload(all_offload):
    return lambda name: _seen(all_offload, name)


def _seen(seen, name):
    assert "failed" not in seen[name], seen[name]["failed"]
    return seen[name]
