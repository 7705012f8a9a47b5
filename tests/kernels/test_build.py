"""A load from end to end, with fake compilers: what is built, found again, refused, survived."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from comfy_sage3.kernels import build
from comfy_sage3.kernels.build import Failure, Loaded, attempt
from comfy_sage3.kernels.jit import cache, make
from comfy_sage3.kernels.jit.cache import Manifest
from comfy_sage3.kernels.jit.torch_build import TorchBuild

ROOT = Path(__file__).parents[2]


def run(bench, **changes):
    return attempt(bench.setting(**changes), bench.say)


def loaded(bench, **changes):
    found = run(bench, **changes)
    assert isinstance(found, Loaded), found.reason
    return found


def failed(bench, **changes):
    found = run(bench, **changes)
    assert isinstance(found, Failure)
    return found


def test_the_first_load_builds_and_the_next_finds_it(bench):
    first = loaded(bench)
    assert first.origin == "built"
    assert first.library.is_file()
    assert first.namespace == first.library.stem
    assert first.archs == ("90a",)
    assert any("Building CUDA kernels for sm_90a" in x for x in bench.said)
    assert any(x.startswith("[4/4]") for x in bench.said)
    before, bench.said = bench.calls, []
    second = loaded(bench)
    assert (second.origin, second.library) == ("cache", first.library)
    assert bench.calls == before
    assert bench.said == []
    assert bench.opened == [first.library] * 2


def test_commands_carry_the_gpu_the_macros_and_only_the_binding_sees_torch(bench):
    loaded(bench)
    nvcc = [x for x in bench.calls if "/bin/nvcc" in x]
    host = [x for x in bench.calls if "-c csrc/binding.cpp" in x]
    assert len(nvcc) == 2
    assert len(host) == 1
    for line in nvcc:
        assert "-gencode=arch=compute_90a,code=sm_90a" in line
        assert str(bench.folder / "torch") not in line
    assert "-DSAGE3_HAS_ONLY_SM90=1 -DSAGE3_HAS_SCALE=1" in host[0]
    assert "-DSAGE3_NAMESPACE=sage3_" in host[0]
    assert str(bench.folder / "torch" / "include") in host[0]


def test_a_kernel_for_another_gpu_is_left_out(bench):
    loaded(bench, archs=("120a",))
    assert not any("only_sm90" in x for x in bench.calls)
    assert not any("SAGE3_HAS_ONLY_SM90" in x for x in bench.calls)


def test_a_library_for_more_gpus_serves_fewer(bench):
    both = loaded(bench, archs=("90a", "120a"))
    assert loaded(bench, archs=("120a",)).library == both.library


def test_no_leftovers_after_success_and_after_failure(bench):
    loaded(bench)
    bench.spoil("FAKE_ERROR")
    failed(bench)
    assert bench.leftovers() == []


def test_a_failure_has_the_compilers_words_once_and_a_log(bench):
    bench.spoil("FAKE_ERROR")
    failure = failed(bench)
    assert failure.reason == 'csrc/scale.cu(3): error: identifier "nonsense" is undefined'
    assert failure.reason in failure.log
    assert "FAILED" in failure.log
    assert sum("nonsense" in x and "FAILED" in x for x in bench.said) == 1
    note = make.last_failure(bench.setting())
    assert note["reason"] == failure.reason
    assert Path(note["log"]).read_text() == failure.log


def test_success_removes_the_note_of_an_earlier_failure(bench):
    good = (bench.csrc / "scale.cu").read_text()
    bench.spoil("FAKE_ERROR")
    failed(bench)
    (bench.csrc / "scale.cu").write_text(good)
    loaded(bench)
    assert make.last_failure(bench.setting()) is None


@pytest.fixture
def heard(monkeypatch):
    """What a listener hears, as (state, text)."""
    monkeypatch.setattr(build, "_listeners", [])
    told = []
    build.listen(lambda state, text: told.append((state, text)))
    return told


def test_a_build_is_told_from_beginning_to_end_and_a_library_found_is_not(bench, heard):
    loaded(bench)
    assert [state for state, _ in heard] == ["building", "built"]
    assert "ready" in heard[1][1]
    loaded(bench)
    assert len(heard) == 2


def test_a_build_that_fails_is_told_with_its_reason(bench, heard):
    bench.spoil("FAKE_ERROR")
    reason = failed(bench).reason
    assert [state for state, _ in heard] == ["building", "failed"]
    assert heard[1][1].endswith(reason)


def test_a_listener_that_breaks_does_not_cost_the_kernels(bench, heard):
    build.listen(lambda state, text: 1 / 0)
    assert loaded(bench).origin == "built"


def test_no_gpu_is_no_news(bench, heard, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert failed(bench, archs=None).reason == "there is no NVIDIA GPU"
    assert heard == []


@pytest.fixture
def process(bench, monkeypatch):
    """``load`` as a process on the bench sees it."""
    build.forget()
    monkeypatch.setattr(build, "Setting", bench.setting)
    yield bench
    build.forget()


def test_an_outcome_is_remembered_good_or_bad(process):
    process.spoil("FAKE_ERROR")
    first = build.load(process.say)
    said = list(process.said)
    assert isinstance(first, Failure)
    assert build.load(process.say) is first
    assert build.outcome() is first
    assert process.said == said


def test_threads_build_once_and_all_get_the_result(process):
    found = []
    threads = [threading.Thread(target=lambda: found.append(build.load(process.say))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(x is found[0] for x in found)
    assert len(process.opened) == 1


def test_nothing_is_built_at_import(tmp_path):
    code = "import comfy_sage3; from comfy_sage3.kernels import build; assert build.outcome() is None"
    env = {**os.environ, "SAGE3_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)
    assert not (tmp_path / "cache").exists()


PROCESS = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import conftest
bench = object.__new__(conftest.Bench)
bench.folder, bench.opened, bench.said = Path({folder!r}), [], []
bench.bin, bench.csrc, bench.cache = (bench.folder / x for x in ("bin", "csrc", "cache"))
bench.env = {env!r}
from comfy_sage3.kernels.build import attempt
print(attempt(bench.setting(), lambda text: print(text, flush=True)))
"""


def start(bench):
    """The same load in another process."""
    code = PROCESS.format(tests=str(Path(__file__).parent), folder=str(bench.folder), env=bench.env)
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once_build_once(bench):
    said = [process.communicate(timeout=60)[0] for process in [start(bench), start(bench)]]
    assert all("Loaded(" in x for x in said)
    assert sorted(("origin='built'" in x) for x in said) == [False, True]
    assert sum("-shared" in x for x in bench.calls) == 1


def test_a_killed_build_leaves_nothing_in_the_way(bench):
    bench.spoil("FAKE_WAIT")
    process = start(bench)
    until = time.monotonic() + 60
    while not any("scale.cu" in x for x in bench.calls) and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert bench.leftovers() != []
    # The same entry again, now with a compiler that does not wait: the dead build holds no lock and is swept away.
    nvcc = bench.home / "bin" / "nvcc"
    nvcc.write_text(nvcc.read_text().replace("sleep 30", ":"))
    assert loaded(bench).origin == "built"
    assert bench.leftovers() == []


def test_a_cache_that_cannot_be_written_is_replaced_by_a_folder_of_the_users(bench):
    bench.cache.write_text("a file where the folder should be")
    found = loaded(bench)
    assert found.library.is_relative_to(bench.folder / "spare")
    assert any("are kept in" in x and str(bench.cache) in x for x in bench.said)
    assert loaded(bench).origin == "cache"


def test_a_read_only_cache_still_serves_what_is_in_it(bench, monkeypatch):
    first = loaded(bench)
    read_only(monkeypatch, bench.cache)
    assert loaded(bench).library == first.library
    assert loaded(bench, archs=("120a",)).library.is_relative_to(bench.folder / "spare")


def read_only(monkeypatch, folder):
    """What EROFS looks like (root may write anywhere, so permissions would prove nothing)."""
    real = cache.tempfile.TemporaryFile

    def refuse(*args, dir=None, **kwargs):
        if dir == folder:
            raise OSError(30, "Read-only file system")
        return real(*args, dir=dir, **kwargs)

    def utime(path):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(cache.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(cache.os, "utime", utime)


def test_with_nowhere_to_write_the_reason_names_both_folders(bench):
    bench.cache.write_text("")
    (bench.folder / "spare").write_text("")
    reason = failed(bench).reason
    assert str(bench.cache) in reason
    assert str(bench.folder / "spare") in reason
    assert "SAGE3_CACHE_DIR" in reason


def test_too_little_room_is_seen_before_the_build(bench, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 3 << 20}))
    assert "3 MB are free, 256 are needed" in failed(bench).reason
    assert bench.calls == []


def test_a_disk_that_fills_up_under_the_compiler(bench):
    bench.spoil("FAKE_FULL")
    assert "No space left on device" in failed(bench).reason
    assert bench.leftovers() == []


def test_a_disk_that_fills_up_under_us(bench, monkeypatch):
    def full(self, folder):
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(Manifest, "write", full)
    assert failed(bench).reason.startswith("No space left on device (")
    assert bench.leftovers() == []
    assert not list(bench.cache.glob(f"*/{cache.MANIFEST}"))


@pytest.mark.parametrize("damage", ["truncated", "altered", "absent", "manifest"])
def test_a_damaged_entry_is_built_again(bench, damage):
    library = loaded(bench).library
    whole = library.read_bytes()
    if damage == "truncated":
        library.write_bytes(whole[: len(whole) // 2])
    elif damage == "altered":
        library.write_bytes(whole[:-1] + b"\0")
    elif damage == "absent":
        library.unlink()
    else:
        (library.parent / cache.MANIFEST).write_text('{"layout": 1, "entr')
    again = loaded(bench)
    assert (again.origin, again.library) == ("built", library)
    assert library.read_bytes() == whole
    assert bench.leftovers() == []


def test_another_torch_has_a_library_of_its_own(bench):
    old = loaded(bench)
    new = loaded(bench, torch=TorchBuild("2.11.1+cu130", "13.0", bench.folder / "torch"))
    assert new.origin == "built"
    assert new.library != old.library


def test_a_library_that_does_not_load_is_built_again_once(bench):
    loaded(bench)
    tries = []

    def open_library(path):
        tries.append(path)
        if len(tries) == 1:
            raise OSError("undefined symbol: _ZN3c105ErrorE")

    assert loaded(bench, open_library=open_library).origin == "built"
    assert len(tries) == 2
    assert any("undefined symbol" in x for x in bench.said)


def test_a_fresh_library_that_does_not_load_is_a_failure(bench):
    def open_library(path):
        raise OSError("undefined symbol: _ZN3c105ErrorE")

    assert "undefined symbol" in failed(bench, open_library=open_library).reason


def test_a_library_that_another_copy_of_the_package_loaded_is_not_loaded_again(bench, monkeypatch):
    first = loaded(bench)
    monkeypatch.setattr(build.torch.ops, "loaded_libraries", {f"/elsewhere/{first.library.name}"})
    bench.opened.clear()
    assert loaded(bench).namespace == first.namespace
    assert bench.opened == []


def test_without_compilers_a_built_library_still_loads(bench):
    library = loaded(bench).library
    env = {"CUDA_HOME": "/nowhere", "PATH": "/nowhere"}
    assert loaded(bench, env=env).library == library
    bench.csrc.joinpath("scale.cu").write_text("// changed")
    assert "nvcc was not found" in failed(bench, env=env).reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"env": {"SAGE3_FORCE_REFERENCE": "1"}}, "SAGE3_FORCE_REFERENCE is set"),
        ({"env": {"SAGE3_DISABLE_BUILD": "1"}}, "there is no built library, and SAGE3_DISABLE_BUILD is set"),
        ({"torch": TorchBuild("2.13.0+cpu", None, Path("/torch"))}, "this torch (2.13.0+cpu) is built without CUDA"),
        ({"archs": None}, "there is no NVIDIA GPU"),
        ({"tree": None}, "the kernels' sources are not installed beside this package"),
    ],
)
def test_reasons_that_need_no_compiler(bench, monkeypatch, changes, reason):
    monkeypatch.setattr(build.torch.cuda, "device_count", lambda: 0)
    failure = failed(bench, **changes)
    assert failure.reason == reason
    assert bench.said == [f"No CUDA kernels: {reason}"]
    assert bench.calls == []


def test_the_gpus_decide_what_is_built(bench, monkeypatch):
    cards = [(9, 0), (12, 0), (9, 0), (6, 1)]
    monkeypatch.setattr(build.torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(build.torch.cuda, "get_device_capability", lambda i: cards[i])
    assert build.wanted_archs(bench.setting(archs=None)) == ("90a", "120a")
    cards[:] = [(6, 1)]
    assert failed(bench, archs=None).reason == "there are no kernels for sm_61"


def test_an_unexpected_error_is_a_failure_too(bench, monkeypatch):
    def broken():
        raise RuntimeError("CUDA driver initialization failed")

    monkeypatch.setattr(build.torch.cuda, "device_count", broken)
    assert "CUDA driver initialization failed" in failed(bench, archs=None).reason


def test_commands_are_printed_on_request_and_the_build_is_a_real_one(bench):
    loaded(bench)
    bench.said.clear()
    assert loaded(bench, env={"SAGE3_PRINT_COMMANDS": "1"}).origin == "built"
    assert any("nvcc" in x and "-gencode=" in x for x in bench.said)


def test_ptxas_speaks_on_request(bench):
    bench.spoil("FAKE_SPILL")
    loaded(bench, env={"SAGE3_PTXAS_VERBOSE": "1"})
    assert any("Used 255 registers" in x for x in bench.said)
    assert any("-Xptxas=-v" in x for x in bench.calls)


def test_spills_fail_on_request_only(bench):
    bench.spoil("FAKE_SPILL")
    loaded(bench)
    reason = failed(bench, env={"SAGE3_FAIL_ON_SPILLS": "1"}).reason
    assert reason == "SAGE3_FAIL_ON_SPILLS is set and these kernels spill: wasteful (16 bytes)"


def test_machine_code_is_written_on_request(bench):
    tool = bench.home / "bin" / "cuobjdump"
    tool.write_text('#!/bin/sh\necho "machine code of $2"\n')
    tool.chmod(0o755)
    loaded(bench, env={"SAGE3_DUMP_SASS": str(bench.folder / "out")})
    (text,) = (bench.folder / "out").glob("*.sass")
    assert text.read_text().startswith("machine code of ")
    assert any(str(text) in x for x in bench.said)
