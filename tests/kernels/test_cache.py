"""Keys, manifests, folders: what makes two libraries different, and what makes one usable."""

import dataclasses
import os
import sys
import time

import pytest

from comfy_sage3.kernels.jit import cache
from comfy_sage3.kernels.jit.cache import Entry, Manifest, misfit
from comfy_sage3.kernels.jit.cuda import Cuda
from comfy_sage3.kernels.jit.host import Host
from comfy_sage3.kernels.jit.recipe import has_macro, library_name, namespace_of
from comfy_sage3.kernels.jit.toolchain import Toolchain
from comfy_sage3.kernels.jit.torch_build import TorchBuild
from comfy_sage3.kernels.sources import Source


def toolchain(tmp_path, nvcc="13.0.88", gcc=(12, 2, 0)):
    cuda = Cuda(tmp_path, tmp_path / "nvcc", (13, 0), f"nvcc {nvcc}", "PATH")
    return Toolchain(cuda, Host(tmp_path / "g++", "gcc", gcc), tmp_path / "ninja")


@pytest.fixture
def recipe(bench):
    return bench.setting().recipe(("90a",))


def change_source(recipe):
    (name, content), *rest = recipe.sources
    return dataclasses.replace(recipe, sources=((name, content + b"\n"), *rest))


def rename_source(recipe):
    (name, content), *rest = recipe.sources
    return dataclasses.replace(recipe, sources=((name + "x", content), *rest))


def with_torch(recipe, version, cuda):
    return dataclasses.replace(recipe, torch=TorchBuild(version, cuda, recipe.torch.folder))


CHANGES = {
    "a byte of a source": change_source,
    "a file name": rename_source,
    "the table": lambda r: dataclasses.replace(r, rows=(Source("*.cu", ("90a",)),)),
    "package": lambda r: dataclasses.replace(r, package_version="0.1.1"),
    "lineinfo": lambda r: dataclasses.replace(r, lineinfo=True),
    "system": lambda r: dataclasses.replace(r, system="linux-aarch64"),
    "torch": lambda r: dataclasses.replace(r, torch=dataclasses.replace(r.torch, version="2.11.1+cu130")),
    "CUDA": lambda r: dataclasses.replace(r, torch=dataclasses.replace(r.torch, cuda="13.2")),
    "C++ ABI": lambda r: dataclasses.replace(r, torch=dataclasses.replace(r.torch, cxx11_abi=False)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_changes_the_library_changes_its_key(recipe, what):
    assert CHANGES[what](recipe).base != recipe.base


def test_headers_are_sources_too(bench, recipe):
    header = bench.csrc / "include" / "sage3" / "double.cuh"
    header.write_text(header.read_text() + "// more\n")
    assert bench.setting().recipe(("90a",)).base != recipe.base


def test_flags_are_part_of_the_key(recipe, monkeypatch):
    before = recipe.base
    monkeypatch.setattr("comfy_sage3.kernels.jit.flags.NVCC", ("-O1",))
    assert recipe.base != before


def test_places_are_not_part_of_the_key(bench, recipe):
    moved = bench.folder / "elsewhere"
    bench.csrc.rename(moved)
    bench.csrc = moved
    torch = TorchBuild(recipe.torch.version, recipe.torch.cuda, bench.folder / "another" / "torch")
    assert bench.setting(torch=torch).recipe(("90a",)).base == recipe.base


def test_gpus_and_compilers_make_another_entry_of_the_same_key(recipe, tmp_path):
    tools = toolchain(tmp_path)
    more = dataclasses.replace(recipe, archs=("120a", "90a"))
    names = {recipe.entry(tools), more.entry(tools), recipe.entry(toolchain(tmp_path, nvcc="13.0.48")),
             recipe.entry(toolchain(tmp_path, gcc=(13, 3, 0)))}  # fmt: skip
    assert len(names) == 4
    assert {name.partition("-")[0] for name in names} == {recipe.base}


def test_names_are_fit_for_cpp_and_for_every_system():
    assert namespace_of("0a1b-2c") == "sage3_0a1b_2c"
    assert library_name("0a1b-2c", windows=True) == "sage3_0a1b_2c.dll"
    assert has_macro("attention/int8_sm90.cu") == "SAGE3_HAS_INT8_SM90"
    assert has_macro("odd-name.v2.cu") == "SAGE3_HAS_ODD_NAME_V2"


def entry(folder, recipe, tools, content=b"machine code"):
    name = recipe.entry(tools)
    place = folder / name
    place.mkdir(parents=True)
    library = place / library_name(name, False)
    library.write_bytes(content)
    manifest = Manifest.of(recipe, tools, name, library)
    manifest.write(place)
    return Entry(place, manifest)


def test_a_manifest_comes_back_as_it_was(tmp_path, recipe):
    made = entry(tmp_path, recipe, toolchain(tmp_path))
    assert Manifest.read(made.folder) == made.manifest
    assert made.damage() is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"archs": ["90a"]}', '{"archs": ["90a"], "more": 1}', "\x00"])
def test_a_manifest_of_anything_else_is_refused(tmp_path, text):
    (tmp_path / cache.MANIFEST).write_text(text)
    with pytest.raises(ValueError, match="manifest|Expecting|char"):
        Manifest.read(tmp_path)


def test_the_newest_of_several_compilers_is_taken_first(tmp_path, recipe):
    old, new = (entry(tmp_path, recipe, toolchain(tmp_path, nvcc=v)) for v in ("13.0.48", "13.0.88"))
    os.utime(old.folder / cache.MANIFEST, (1, 1))
    found = list(cache.built_entries(tmp_path, recipe.base))
    assert [x.manifest.compilers for x in found] == [new.manifest.compilers, old.manifest.compilers]
    assert list(cache.built_entries(tmp_path / "absent", recipe.base)) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: dataclasses.replace(r, package_version="0.2.0"), "it is for package 0.1.0, this is 0.2.0"),
        (lambda r: dataclasses.replace(r, system="win32-amd64"), "it is for system .*, this is win32-amd64"),
        (CHANGES["C++ ABI"], "ABI"),
        (lambda r: with_torch(r, "2.12.0+cu130", "13.0"), "it is for torch 2.11, this is 2.12"),
        (lambda r: with_torch(r, "2.11.0+cu128", "12.8"), "it is for CUDA 13, this is 12"),
        (lambda r: dataclasses.replace(r, archs=("120a",)), "it is for sm_90a, this needs sm_120a"),
        (change_source, "the sources have changed since"),
    ],
)
def test_a_prebuilt_library_says_why_it_does_not_fit(tmp_path, recipe, change, reason):
    made = entry(tmp_path, recipe, toolchain(tmp_path))
    assert misfit(made, recipe, have_sources=True) is None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(misfit(made, change(recipe), have_sources=True))


def test_a_prebuilt_library_serves_the_patch_releases_of_its_torch_and_a_copy_without_sources(tmp_path, recipe):
    made = entry(tmp_path, recipe, toolchain(tmp_path))
    assert misfit(made, CHANGES["torch"](recipe), have_sources=True) is None
    assert misfit(made, CHANGES["CUDA"](recipe), have_sources=True) is None
    assert misfit(made, change_source(recipe), have_sources=False) is None


def test_publishing_is_one_rename_and_replaces_what_is_there(tmp_path):
    for content in ("first", "second"):
        private = tmp_path / "private"
        private.mkdir()
        (private / "x").write_text(content)
        cache.publish(private, tmp_path / "final")
        assert (tmp_path / "final" / "x").read_text() == content
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_publishing_does_not_hide_another_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        cache.publish(tmp_path / "absent", tmp_path / "final")


def test_sweeping_removes_dead_builds_of_this_entry_and_what_nobody_loaded_for_months(tmp_path, recipe):
    folder = tmp_path / "cache"
    kept = entry(folder, recipe, toolchain(tmp_path))
    stale = entry(folder, recipe, toolchain(tmp_path, nvcc="13.0.48"))
    name = kept.folder.name
    for private in (f"{cache.PRIVATE}{name}-abc", f"{cache.PRIVATE}another-abc"):
        (folder / private).mkdir()
    now = time.time()
    os.utime(stale.folder / cache.MANIFEST, (now - cache.KEPT - 9,) * 2)
    cache.sweep(folder, name, now)
    assert {p.name for p in folder.iterdir()} == {name, f"{cache.PRIVATE}another-abc"}


def test_a_long_windows_path_goes_elsewhere(tmp_path):
    long = tmp_path / ("x" * cache.LONGEST)
    assert cache.candidates(long, windows=True, temporary=tmp_path)[0].parent == tmp_path
    assert cache.candidates(long, windows=False, temporary=tmp_path)[0] == long


@pytest.mark.skipif(sys.platform == "win32", reason="there the temporary folder is the user's own")
def test_a_folder_others_can_write_is_not_used(tmp_path):
    tmp_path.chmod(0o700)
    assert cache.is_private(tmp_path)
    tmp_path.chmod(0o777)
    assert not cache.is_private(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    assert not cache.is_private(tmp_path / "link")
