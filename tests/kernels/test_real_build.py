"""One real build: nvcc, g++ and torch's headers, linked and loaded; needs a CUDA toolkit but no GPU.

torch may be a CPU build: the fixture's binding calls nothing of torch's CUDA libraries.
"""

import dataclasses
from pathlib import Path

import pytest
import torch

from comfy_sage3.kernels.build import Loaded, attempt
from comfy_sage3.kernels.jit.machine import Machine, ToolchainError
from comfy_sage3.kernels.jit.setting import Setting
from comfy_sage3.kernels.jit.toolchain import find_toolchain
from comfy_sage3.kernels.jit.torch_build import TorchBuild
from comfy_sage3.kernels.sources import Source, Tree

ROWS = (Source("attention/*_sm90.cu", ("90a",)),)


def missing():
    try:
        find_toolchain("13.0" if torch.version.cuda is None else torch.version.cuda, ("90a", "120a"), Machine())
    except ToolchainError as problem:
        return str(problem)
    return None


@pytest.mark.skipif(missing() is not None, reason=f"needs a CUDA toolkit: {missing()}")
def test_built_linked_loaded_called_and_found_again(tmp_path):
    here = TorchBuild.here()
    setting = Setting(
        torch=here if here.cuda else dataclasses.replace(here, cuda="13.0"),
        tree=Tree(Path(__file__).parent / "csrc_fixture", ROWS),
        archs=("90a", "120a"),
        root=tmp_path / "Größe 核",
        prebuilt=tmp_path / "none",
    )
    said = []
    built = attempt(setting, said.append)
    assert isinstance(built, Loaded), built.log
    assert built.origin == "built"
    assert built.ops.twice(torch.tensor([1.0, 2.0])).tolist() == [2.0, 4.0]
    assert built.ops.parts(False) == 2
    again = attempt(setting, said.append)
    assert isinstance(again, Loaded)
    assert (again.origin, again.namespace) == ("cache", built.namespace)
    assert again.seconds < 1
    # No Python in it: the same file serves every version.
    assert b"libpython" not in built.library.read_bytes()
    assert b"libtorch_python" not in built.library.read_bytes()
