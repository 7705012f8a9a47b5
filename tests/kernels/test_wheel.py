"""A wheel with kernels inside: well formed, and its library is the one that a load takes."""

import base64
import csv
import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from comfy_sage3.kernels.build import Failure, Loaded, attempt
from comfy_sage3.kernels.jit.make import make
from comfy_sage3.kernels.jit.ninja import BuildError
from comfy_sage3.kernels.jit.torch_build import TorchBuild
from comfy_sage3.kernels.jit.wheel import INSIDE, make_wheel, with_library

ROOT = Path(__file__).parents[2]
INFO = "comfy_sage3-0.1.0.dist-info"


@pytest.fixture
def wheel(bench, tmp_path):
    """The finished wheel, made from a plain one of three files."""
    plain = tmp_path / "comfy_sage3-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(plain, "w") as file:
        file.writestr("comfy_sage3/__init__.py", "__version__ = '0.1.0'\n")
        metadata = "Metadata-Version: 2.4\nName: comfy-sage3\nVersion: 0.1.0\nRequires-Dist: torch\n\nVersion: text\n"
        file.writestr(f"{INFO}/METADATA", metadata)
        file.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n\n")
        file.writestr(f"{INFO}/RECORD", "old")
    entry, _ = make(bench.setting(), ("90a",), bench.say)
    folder = tmp_path / "dist"
    folder.mkdir()
    return with_library(plain, entry, folder, "0.1.0")


def test_the_name_says_torch_cuda_and_platform_and_no_python(wheel):
    assert wheel.name.startswith("comfy_sage3-0.1.0+torch2.11.cu130-py3-none-")
    assert "any" not in wheel.name


def test_the_record_lists_every_file_with_its_hash(wheel):
    with zipfile.ZipFile(wheel) as file:
        info = "comfy_sage3-0.1.0+torch2.11.cu130.dist-info"
        rows = list(csv.reader(io.StringIO(file.read(f"{info}/RECORD").decode())))
        assert sorted(row[0] for row in rows) == sorted(file.namelist())
        for name, digest, size in rows:
            if not name.endswith("RECORD"):
                data = file.read(name)
                want = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
                assert (digest, size) == (f"sha256={want}", str(len(data)))
        text = file.read(f"{info}/WHEEL").decode()
        assert "Root-Is-Purelib: false\nTag: py3-none-" in text
        assert text.count("Tag:") == 1
        metadata = file.read(f"{info}/METADATA").decode()
        assert "\nVersion: 0.1.0+torch2.11.cu130\n" in metadata
        assert metadata.endswith("\n\nVersion: text\n")


def test_pip_installs_it(wheel, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    assert list((tmp_path / "site" / INSIDE).glob("*/sage3_*"))


def test_the_library_inside_is_taken_first_and_needs_no_compiler(wheel, bench, tmp_path):
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    bare = {"env": {"CUDA_HOME": "/nowhere", "PATH": "/nowhere"}, "root": tmp_path / "empty"}
    bare["prebuilt"] = tmp_path / "site" / INSIDE
    for tree in (bench.setting().tree, None):
        found = attempt(bench.setting(**bare, tree=tree), bench.say)
        assert isinstance(found, Loaded)
        assert found.origin == "prebuilt"
        assert found.library.is_relative_to(tmp_path / "site")
    bench.said.clear()
    other = attempt(bench.setting(**bare, torch=TorchBuild("2.12.0+cu130", "13.0", bench.folder)), bench.say)
    assert isinstance(other, Failure)
    assert "The kernels that came with the package are not used: it is for torch 2.11, this is 2.12." in bench.said


def test_a_damaged_prebuilt_library_is_not_taken(wheel, bench, tmp_path):
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    (library,) = (tmp_path / "site" / INSIDE).glob("*/sage3_*")
    library.write_bytes(library.read_bytes()[:-1])
    found = attempt(bench.setting(prebuilt=tmp_path / "site" / INSIDE), bench.say)
    assert found.origin == "cache"
    assert any("bytes instead of" in x for x in bench.said)


def test_a_wheel_needs_a_checkout(bench, tmp_path):
    entry, _ = make(bench.setting(), ("90a",), bench.say)
    with pytest.raises(BuildError, match="git checkout"):
        make_wheel(entry, tmp_path, "0.1.0", checkout=tmp_path)


def test_the_sources_travel_inside_the_package(tmp_path):
    """setup.py's one job, without pip: build_py into a folder."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for name in ("comfy_sage3/__init__.py", "csrc/binding.cpp", "csrc/include/sage3/x.cuh"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", "out"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    inside = tmp_path / "out" / "comfy_sage3" / "csrc"
    assert {p.relative_to(inside).as_posix() for p in inside.rglob("*.*")} == {"binding.cpp", "include/sage3/x.cuh"}
