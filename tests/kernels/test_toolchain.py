"""Finding compilers on machines that are made up: Linux and Windows, whole, old, mixed and bare."""

import json
from pathlib import Path

import pytest

from comfy_sage3.kernels.jit.cuda import Cuda, check_cuda, find_binary, find_cuda
from comfy_sage3.kernels.jit.host import Host, check_host, find_host, find_ninja
from comfy_sage3.kernels.jit.machine import Machine, ToolchainError, parallel_jobs, run_text
from comfy_sage3.kernels.jit.toolchain import find_toolchain

GCC = "g++ (Ubuntu 13.3.0-6ubuntu2~24.04) 13.3.0\nCopyright (C) 2023 Free Software Foundation, Inc."


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    path.chmod(0o755)
    return path


def machine(answers=None, *, env=None, windows=False, **changes):
    """A machine with nothing on it. ``answers``: part of a command's line -> what it prints."""

    def run(command):
        line = command if isinstance(command, str) else " ".join(command)
        return next((text for part, text in (answers or {}).items() if part in line), "")

    base = {"site_packages": (), "cuda_roots": (), "scripts": Path("/nowhere")}
    return Machine(windows=windows, env=env or {}, run=run, **{**base, **changes})


def nvcc(version="13.0"):
    return f"nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release {version}, V{version}.88\n"


# --- CUDA -----------------------------------------------------------------------------------------------------


def test_nothing_at_all_names_the_extra_and_the_toolkit():
    with pytest.raises(ToolchainError, match=r"nvcc was not found: pip install 'comfy-sage3\[build\]'.*CUDA toolkit"):
        find_cuda(machine())


def test_the_order_is_variables_then_path_then_folders_then_wheels(tmp_path, make_cuda):
    site = tmp_path / "site"
    wheels = make_cuda(site / "nvidia" / "cu13")
    home, path, root = (make_cuda(tmp_path / name) for name in ("home", "path", "root"))
    env = {"CUDA_HOME": str(home), "CUDA_PATH": str(path), "PATH": f"/nowhere:{path}/bin"}
    answers = {"nvcc --version": nvcc()}

    def found(**env):
        return find_cuda(machine(answers, env=env, cuda_roots=(root,), site_packages=(site,)))

    assert (found(**env).home, found(**env).where) == (home, "CUDA_HOME")
    del env["CUDA_HOME"]
    assert (found(**env).home, found(**env).where) == (path, "CUDA_PATH")
    del env["CUDA_PATH"]
    assert (found(**env).home, found(**env).where) == (path, "PATH")
    assert found().home == root
    assert find_cuda(machine(answers, site_packages=(site,))).home == wheels


def test_a_wrapper_script_on_path_leads_to_the_toolkit(tmp_path, make_cuda):
    home = make_cuda(tmp_path / "cuda-13.0")
    executable(tmp_path / "bin" / "nvcc")
    answers = {"--dryrun": f"#$ _SPACE_= \n#$ TOP={home}/bin/..\n", "nvcc --version": nvcc()}
    assert find_cuda(machine(answers, env={"PATH": str(tmp_path / "bin")})).home == home


def test_a_toolkit_that_does_not_fit_is_no_obstacle_to_one_that_does(tmp_path, make_cuda):
    old, new = make_cuda(tmp_path / "old"), make_cuda(tmp_path / "new")
    answers = {"old/bin/nvcc": nvcc("12.4"), "new/bin/nvcc": nvcc("13.0")}
    both = machine(answers, env={"CUDA_HOME": str(old)}, cuda_roots=(new,))
    assert find_cuda(both, "13.0").home == new
    assert find_cuda(both, "12.8").home == old
    alone = machine(answers, env={"CUDA_HOME": str(old)})
    with pytest.raises(ToolchainError, match=r"nvcc is of CUDA 12.4 .* torch of CUDA 13.0: install pip install"):
        find_cuda(alone, "13.0")


def test_an_nvcc_too_old_for_the_gpu_says_which_one_knows_it(tmp_path, make_cuda):
    old = machine({"nvcc": nvcc("12.4")}, env={"CUDA_HOME": str(make_cuda(tmp_path / "cuda"))})
    with pytest.raises(ToolchainError, match=r"does not know sm_120a: install CUDA 12.8 or newer"):
        find_cuda(old, "12.4", ("90a", "120a"))


def test_an_nvcc_that_does_not_start_is_named_with_its_words(tmp_path, make_cuda):
    words = "error while loading shared libraries: libstdc++.so.6"
    broken = machine({"nvcc": words}, env={"CUDA_HOME": str(make_cuda(tmp_path / "cuda"))})
    with pytest.raises(ToolchainError, match=r"nvcc does not start: error while loading"):
        find_cuda(broken)


def test_wheels_for_cuda_12_have_no_nvcc_and_that_is_said(tmp_path):
    (tmp_path / "nvidia" / "cuda_nvcc" / "bin").mkdir(parents=True)
    with pytest.raises(ToolchainError, match="wheels for CUDA 12 do not contain it: install the CUDA 12 toolkit"):
        find_cuda(machine(site_packages=(tmp_path,)))


@pytest.mark.parametrize(("name", "package"), [("nvidia_nvvm", "nvidia-nvvm"), ("nvidia_cuda_crt", "nvidia-cuda-crt")])
def test_wheels_of_two_releases_are_refused_before_ptxas_refuses_them(tmp_path, make_cuda, name, package):
    make_cuda(tmp_path / "nvidia" / "cu13")
    (tmp_path / f"{name}-13.5.37.dist-info").mkdir()
    mixed = machine({"nvcc": nvcc()}, site_packages=(tmp_path,))
    with pytest.raises(ToolchainError, match=rf"nvcc is 13.0, {package} is 13.5; pip install '{package}==13.0.\*'"):
        find_cuda(mixed)
    (tmp_path / f"{name}-13.5.37.dist-info").rename(tmp_path / f"{name}-13.0.88.dist-info")
    assert find_cuda(mixed).where == "NVIDIA's wheels"


@pytest.mark.parametrize(
    ("file", "wheel"),
    [
        ("include/cuda_runtime.h", "nvidia-cuda-runtime"),
        ("include/crt/host_config.h", "nvidia-cuda-crt"),
        ("include/cccl/nv/target", "nvidia-cuda-cccl"),
        ("lib64/libcudart_static.a", "static CUDA runtime"),
    ],
)
def test_a_missing_part_of_the_toolkit_is_named(tmp_path, make_cuda, file, wheel):
    home = make_cuda(tmp_path / "cuda")
    (home / file).unlink()
    with pytest.raises(ToolchainError, match=wheel):
        find_cuda(machine({"nvcc": nvcc()}, env={"CUDA_HOME": str(home)}))


def test_the_disassembler_may_come_from_another_place_than_nvcc(tmp_path, make_cuda):
    home, site = make_cuda(tmp_path / "cuda"), tmp_path / "site"
    cuda = Cuda(home, home / "bin" / "nvcc", (13, 0), "nvcc 13.0.88", "PATH")
    with pytest.raises(ToolchainError, match="cuobjdump was not found.*nvidia-cuda-cuobjdump"):
        find_binary("cuobjdump", machine(), cuda)
    tool = executable(site / "nvidia" / "cu13" / "bin" / "cuobjdump")
    assert find_binary("cuobjdump", machine(site_packages=(site,)), cuda) == tool


# --- the C++ compiler and ninja -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "kind", "version"),
    [
        (GCC, "gcc", (13, 3, 0)),
        ("g++ (GCC) 14.2.1 20240912 (Red Hat 14.2.1-3)\n", "gcc", (14, 2, 1)),
        ("Ubuntu clang version 18.1.3 (1ubuntu1)\nTarget: x86_64-pc-linux-gnu", "clang", (18, 1, 3)),
        ("c++ (conda-forge gcc 12.4.0-1) 12.4.0", "gcc", (12, 4, 0)),
    ],
)
def test_the_host_compiler_is_known_by_what_it_says(tmp_path, said, kind, version):
    executable(tmp_path / "g++")
    host = find_host(machine({"g++": said}, env={"PATH": str(tmp_path)}))
    assert (host.kind, host.version) == (kind, version)


def test_cxx_goes_before_path(tmp_path):
    executable(tmp_path / "g++")
    mine = executable(tmp_path / "mine" / "g++-13")
    for cxx in (str(mine), "g++-13"):
        env = {"PATH": f"{tmp_path}:{tmp_path / 'mine'}", "CXX": cxx}
        assert find_host(machine({"g++": GCC}, env=env)).path == mine


def test_no_host_compiler_names_the_package():
    with pytest.raises(ToolchainError, match="apt install g"):
        find_host(machine())


@pytest.mark.parametrize(
    ("kind", "version", "message"),
    [
        ("gcc", (16, 1, 0), r"is gcc 16, and CUDA 13.0 accepts up to 15: install g\+\+-15 and set CXX=g\+\+-15"),
        ("clang", (21, 0, 0), r"is clang 21, and CUDA 13.0 accepts up to 20: install clang\+\+-20"),
        ("gcc", (8, 5, 0), r"is gcc 8: install g\+\+ 9 to 15"),
        ("msvc", (19, 60, 1), "does not accept cl.exe 19.60.1: install the Visual Studio 2022 Build Tools"),
        ("msvc", (19, 16, 1), "does not accept cl.exe 19.16.1"),
    ],
)
def test_the_limits_come_from_the_toolkits_own_header(tmp_path, make_cuda, kind, version, message):
    home = make_cuda(tmp_path / "cuda")
    cuda = Cuda(home, home / "bin" / "nvcc", (13, 0), "nvcc 13.0.88", "PATH")
    check_cuda(cuda, "13.0", ("90a",))
    with pytest.raises(ToolchainError, match=message):
        check_host(Host(Path("/usr/bin/cxx"), kind, version), cuda)
    for good in (("gcc", (15, 2, 0)), ("clang", (20, 1, 0)), ("msvc", (19, 44, 35207))):
        check_host(Host(Path("/usr/bin/cxx"), *good), cuda)


def test_ninja_beside_python_then_on_path_then_in_its_wheel(tmp_path):
    inside = executable(tmp_path / "site" / "ninja" / "data" / "bin" / "ninja")
    on_path, beside = executable(tmp_path / "bin" / "ninja"), executable(tmp_path / "scripts" / "ninja")
    site = {"site_packages": (tmp_path / "site",)}
    env = {"PATH": str(tmp_path / "bin")}
    assert find_ninja(machine(env=env, scripts=tmp_path / "scripts", **site)) == beside
    assert find_ninja(machine(env=env, **site)) == on_path
    assert find_ninja(machine(**site)) == inside
    with pytest.raises(ToolchainError, match="pip install ninja"):
        find_ninja(machine())


def test_everything_together_has_an_identity_without_paths(tmp_path, make_cuda):
    for name in ("g++", "ninja"):
        executable(tmp_path / "bin" / name)
    env = {"CUDA_HOME": str(make_cuda(tmp_path / "cuda")), "PATH": str(tmp_path / "bin")}
    found = find_toolchain("13.0", ("90a",), machine({"nvcc": nvcc(), "g++": GCC}, env=env))
    assert found.identity == "nvcc 13.0.88, gcc 13.3.0"


# --- Windows --------------------------------------------------------------------------------------------------

GERMAN_CL = "Microsoft (R) C/C++-Optimierungscompiler Version 19.44.35207 für x64\nSyntax: cl [ Option... ] Datei..."


@pytest.fixture
def studio(tmp_path):
    """Visual Studio in a folder with spaces; returns (environment, answers, cl.exe)."""
    files = tmp_path / "Program Files (x86)"
    executable(files / "Microsoft Visual Studio" / "Installer" / "vswhere.exe")
    place = tmp_path / "Program Files" / "Microsoft Visual Studio" / "2022" / "BuildTools"
    executable(place / "VC" / "Auxiliary" / "Build" / "vcvars64.bat")
    cl = executable(place / "VC" / "Tools" / "MSVC" / "14.44" / "bin" / "Hostx64" / "x64" / "cl.exe")
    answers = {
        "vswhere": json.dumps([{"installationPath": str(place)}]),
        "vcvars64": f"Path=C:\\Windows;{cl.parent}\nINCLUDE=C:\\inc lude;C:\\Größe\nLIB=C:\\lib\n",
        "cl.exe": GERMAN_CL,
    }
    return {"PROGRAMFILES(X86)": str(files), "PROGRAMFILES": str(tmp_path / "Program Files")}, answers, cl


def test_cl_is_found_through_vswhere_with_its_environment(studio):
    env, answers, cl = studio
    host = find_host(machine(answers, env=env, windows=True))
    assert (host.path, host.kind, host.version) == (cl, "msvc", (19, 44, 35207))
    assert host.env["INCLUDE"] == "C:\\inc lude;C:\\Größe"
    assert host.env["PATH"].startswith("C:\\Windows;")  # printed as Path; beside os.environ's PATH it would be a second one
    assert "Path" not in host.env


def test_cl_on_path_is_a_developer_prompt_and_needs_no_vswhere(tmp_path):
    cl = executable(tmp_path / "cl.exe")
    host = find_host(machine({"cl.exe": GERMAN_CL}, env={"PATH": f"C:\\Windows;{tmp_path}"}, windows=True))
    assert (host.path, dict(host.env)) == (cl, {})


@pytest.mark.parametrize("missing", ["vswhere", "compiler", "answer"])
def test_what_is_missing_of_visual_studio_is_named(studio, missing):
    env, answers, cl = studio
    if missing == "vswhere":
        env = {}
    elif missing == "compiler":
        cl.unlink()
    else:
        answers["vswhere"] = "error 0x57"
    with pytest.raises(ToolchainError, match="Build Tools with the workload 'Desktop development with C"):
        find_host(machine(answers, env=env, windows=True))


def test_the_newest_toolkit_of_the_usual_windows_folder(tmp_path, make_cuda):
    base = tmp_path / "NVIDIA GPU Computing Toolkit" / "CUDA"
    for version in ("v12.8", "v13.0", "v9.2"):
        home = make_cuda(base / version)
        (home / "bin" / "nvcc").rename(home / "bin" / "nvcc.exe")
    answers = {"v12.8": nvcc("12.8"), "v13.0": nvcc("13.0"), "v9.2": nvcc("9.2")}
    windows = machine(answers, env={"PROGRAMFILES": str(tmp_path)}, windows=True)
    assert find_cuda(windows).version == (13, 0)
    assert find_cuda(windows, "12.6").version == (12, 8)


# --- how many at once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "cores", "gib", "jobs"),
    [
        ({}, 16, 64.0, 16),
        ({}, 16, 12.0, 4),
        ({}, 2, 64.0, 2),
        ({}, 8, 1.0, 1),
        ({"MAX_JOBS": "3"}, 16, 64.0, 3),
        ({"MAX_JOBS": "64"}, 4, 64.0, 4),
        ({"MAX_JOBS": "many"}, 4, 64.0, 4),
    ],
)
def test_jobs_are_bounded_by_cores_memory_and_max_jobs(env, cores, gib, jobs):
    assert parallel_jobs(env, cores, gib) == jobs


def test_this_machine_allows_at_least_one():
    assert parallel_jobs({}) >= 1


def test_a_command_that_does_not_exist_says_nothing():
    assert run_text(["/nowhere/nvcc", "--version"]) == ""
