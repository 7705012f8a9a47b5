"""build.ninja for both kinds of compilers, and which line of a log a person is shown."""

import dataclasses
from pathlib import Path, PureWindowsPath

import pytest

from comfy_sage3.kernels.jit.cuda import Cuda
from comfy_sage3.kernels.jit.host import Host
from comfy_sage3.kernels.jit.ninja import BuildError, first_error, inherited, ninja_file, run_ninja
from comfy_sage3.kernels.jit.toolchain import Toolchain
from comfy_sage3.kernels.jit.torch_build import TorchBuild


def test_windows_commands(bench, tmp_path):
    home = bench.folder / "CUDA"
    (home / "include").mkdir(parents=True)
    (home / "lib" / "x64").mkdir(parents=True)
    (home / "lib" / "x64" / "cudart_static.lib").write_text("")
    torch = bench.folder / "torch"
    (torch / "lib").mkdir(parents=True)
    for name in ("c10_cuda", "torch_cuda"):
        (torch / "lib" / f"{name}.lib").write_text("")
    recipe = bench.setting(torch=TorchBuild("2.11.0+cu130", "13.0", torch)).recipe(("90a",))
    cl = Path("/Program Files/MSVC/bin/cl.exe")
    cuda = Cuda(home, home / "bin" / "nvcc.exe", (13, 0), "nvcc", "PATH")
    tools = Toolchain(cuda, Host(cl, "msvc", (19, 44, 1)), Path("ninja.exe"), windows=True)
    lines = ninja_file(dataclasses.replace(recipe, system="win32-amd64"), tools, "a-b").splitlines()
    nvcc, _, binding, link = [x for x in lines if x.startswith("  line = ")]
    assert f'-ccbin "{cl.parent}"' in nvcc
    assert "-Xcompiler=/MD,/EHsc,/nologo,/Zc:preprocessor" in nvcc
    assert nvcc.endswith("-c csrc/attention/only_sm90.cu -o attention-only_sm90.obj")
    assert "/std:c++17" in binding
    assert "/DSAGE3_NAMESPACE=sage3_a_b" in binding
    assert binding.endswith("/c csrc/binding.cpp /Fobinding.obj")
    assert "/LD attention-only_sm90.obj scale.obj binding.obj /Fesage3_a_b.dll /link" in link
    assert link.endswith("c10.lib torch_cpu.lib c10_cuda.lib torch_cuda.lib torch.lib cudart_static.lib")
    assert f'"/LIBPATH:{home / "lib" / "x64"}"'.replace("$", "$$") in link
    assert not any("-fPIC" in x for x in lines)
    assert PureWindowsPath("csrc/binding.cpp").parts == ("csrc", "binding.cpp")  # both take forward slashes


def test_several_gpus_are_compiled_by_threads_of_one_nvcc(bench, tmp_path):
    recipe = bench.setting().recipe(("90a", "120a"))
    cuda = Cuda(bench.home, bench.home / "bin" / "nvcc", (13, 0), "nvcc", "PATH")
    text = ninja_file(recipe, Toolchain(cuda, Host(bench.bin / "g++", "gcc", (12, 2, 0)), Path("ninja")), "a-b")
    assert "--threads 2 -gencode=arch=compute_120a,code=sm_120a -gencode=arch=compute_90a,code=sm_90a" in text
    (only,) = [x for x in text.splitlines() if x.startswith("  line = ") and "-c csrc/attention" in x]
    assert "120a" not in only
    assert "--threads" not in only


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ('[1/4] x.cu\nFAILED: x.o\nx.cu(3): error: "y" is undefined\n1 error detected', 'x.cu(3): error: "y"'),
        ("x.cpp:1:10: fatal error: a/b.h: No such file\nninja: build stopped: x", "x.cpp:1:10: fatal error: a"),
        ("x.cpp(12): error C2065: 'y': nichtdeklarierter Bezeichner", "x.cpp(12): error C2065"),
        ("note: an error is near\nld: x.o: undefined reference to `launch'", "ld: x.o: undefined reference"),
        ("x.obj : error LNK2001: unresolved external symbol launch", "x.obj : error LNK2001"),
        ("cc1plus: error: bad\nfatal: No space left on device", "fatal: No space left on device"),
        ("nvcc error   : 'cicc' died due to signal 9 (Kill signal)", "nvcc error   : 'cicc' died"),
        ("g++: fatal error: Killed signal terminated program cc1plus", "g++: fatal error: Killed"),
        ("ptxas fatal   : Unresolved extern function", "ptxas fatal   : Unresolved"),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_120a'\nninja: build stopped", "nvcc fatal   : Unsupported"),
        ("something else\nlast words", "last words"),
        ("", "the compiler said nothing"),
    ],
)
def test_the_line_to_read_first(log, line):
    assert first_error(log).startswith(line)


def test_a_ninja_that_does_not_start_is_a_build_error(bench):
    cuda = Cuda(bench.home, bench.home / "bin" / "nvcc", (13, 0), "nvcc", "PATH")
    tools = Toolchain(cuda, Host(bench.bin / "g++", "gcc", (12, 2, 0)), bench.folder / "no ninja")
    with pytest.raises(BuildError, match="no ninja does not start"):
        run_ninja(bench.folder, tools, 1, print, {})


def test_flags_that_no_key_knows_of_do_not_reach_the_compilers():
    env = {"NVCC_APPEND_FLAGS": "-O0", "NVCC_PREPEND_FLAGS": "-G", "CL": "/Od", "PATH": "/usr/bin", "CPATH": "/nix/include"}
    assert inherited(env) == {"PATH": "/usr/bin", "CPATH": "/nix/include"}
