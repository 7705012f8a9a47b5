"""``python -m comfy_sage3 build`` and what the doctor says about the kernels."""

import argparse
import dataclasses

import pytest

from comfy_sage3.errors import InputError
from comfy_sage3.kernels import build, build_command, describe
from comfy_sage3.kernels.build import Loaded
from comfy_sage3.kernels.build_command import CommandError
from comfy_sage3.kernels.jit.torch_build import TorchBuild


def run(bench, *text, **changes):
    parser = argparse.ArgumentParser()
    build_command.add_arguments(parser)
    return build_command.run(parser.parse_args(text), bench.setting(**changes))


def test_it_builds_prints_the_path_and_the_second_time_builds_nothing(bench, capsys):
    assert run(bench, "--arch", "90,120") == 0
    (library,) = bench.cache.glob("*/sage3_*.so")
    assert capsys.readouterr().out.splitlines()[-1] == str(library)
    before = bench.calls
    assert run(bench, "--arch", "90,120") == 0
    assert bench.calls == before
    assert run(bench, "--arch", "90,120", "--force") == 0
    assert len(bench.calls) > len(before)


def test_a_new_compiler_gets_a_library_of_its_own(bench):
    run(bench)
    gxx = bench.bin / "g++"
    gxx.write_text(gxx.read_text().replace("12.2.0", "13.3.0"))
    run(bench)
    assert len(list(bench.cache.glob("*/sage3_*.so"))) == 2


def test_a_failed_build_prints_its_log_and_one_sentence(bench, capsys):
    bench.spoil("FAKE_ERROR")
    with pytest.raises(CommandError, match=r"csrc/scale.cu\(3\): error: identifier"):
        run(bench)
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"archs": None}, "there is no NVIDIA GPU; name the GPUs with --arch"),
        ({"torch": TorchBuild("2.13.0+cpu", None, build.Path("/"))}, "is built without CUDA"),
        ({"env": {"CUDA_HOME": "", "PATH": ""}}, "nvcc was not found: pip install"),
    ],
)
def test_what_stands_in_the_way_is_one_sentence(bench, monkeypatch, changes, message):
    monkeypatch.setattr(build.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(CommandError, match=message):
        run(bench, **changes)


def test_an_unknown_architecture(bench):
    with pytest.raises(InputError, match="Unknown architecture '61'"):
        run(bench, "--arch", "61")


# --- the doctor -----------------------------------------------------------------------------------------------


def told(bench, monkeypatch, done=None, **changes):
    monkeypatch.setattr(describe, "outcome", lambda: done)
    found = describe.describe(bench.setting(**changes))
    return found, "\n".join(describe.lines(found))


def test_before_the_first_build(bench, monkeypatch):
    found, text = told(bench, monkeypatch)
    assert (found["library"], found["problem"]) == (None, None)
    assert text.startswith("CUDA kernels for sm_90a\n")
    assert "none yet: built on first use, or by python -m comfy_sage3 build" in text
    assert "nvcc 13.0.88, gcc 12.2.0 (CUDA_HOME: " in text
    assert bench.calls == []


def test_after_a_build_and_after_a_load(bench, monkeypatch):
    run(bench)
    found, text = told(bench, monkeypatch)
    assert found["origin"] == "cache"
    assert f"{found['library']} (cache)" in text
    done = Loaded(bench.folder / "x.so", "sage3_x", ("90a",), "built", 1.0)
    assert "x.so (built)" in told(bench, monkeypatch, done)[1]


def test_a_missing_compiler_and_a_failure_of_this_process(bench, monkeypatch):
    nothing = {"env": {"CUDA_HOME": "", "PATH": ""}}
    assert "library       none: nvcc was not found" in told(bench, monkeypatch, **nothing)[1]
    run(bench)
    found, text = told(bench, monkeypatch, **nothing)
    assert "compilers     incomplete: nvcc was not found" in text
    assert f"{found['library']} (cache)" in text
    done = build.Failure("the reason of this process")
    found = dataclasses.replace(bench.setting(), root=bench.folder / "other")
    assert "none: the reason of this process" in told(bench, monkeypatch, done, root=found.root)[1]


def test_the_last_failure_of_another_process_is_shown(bench, monkeypatch):
    bench.spoil("FAKE_ERROR")
    with pytest.raises(CommandError):
        run(bench)
    text = told(bench, monkeypatch)[1]
    assert "last failure" in text
    assert 'identifier "nonsense" is undefined (log: ' in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tree": None}, "the kernels' sources are not installed"),
        ({"env": {"SAGE3_DISABLE_BUILD": "1"}}, "SAGE3_DISABLE_BUILD is set"),
        ({"env": {"SAGE3_FORCE_REFERENCE": "1"}}, "SAGE3_FORCE_REFERENCE is set"),
    ],
)
def test_switches_and_absent_sources_are_said(bench, monkeypatch, changes, message):
    assert message in told(bench, monkeypatch, **changes)[1]
