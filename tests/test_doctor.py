"""What the doctor says here, and what it would say on other machines."""

import argparse
import json
from types import SimpleNamespace

import pytest
import torch

from comfy_sage3 import doctor
from comfy_sage3.cli import main
from comfy_sage3.kernels import compiled, ops


@pytest.fixture(scope="module")
def found():
    return doctor.examine()


def test_every_device_and_precision_has_a_decision_with_a_reason(found):
    assert found["devices"][0]["device"] == "cpu"
    seen = {(x["device"], x["precision"]) for x in found["decisions"]}
    assert seen == {(d["device"], p) for d in found["devices"] for p in ("auto", "fp4", "int8", "int8-fast", "exact")}
    assert all(x["reason"] and x["kernel"] for x in found["decisions"])


def test_the_self_test_runs_every_kernel_and_they_are_ordered_by_precision(found):
    cosine = {x["kernel"]: x["cosine"] for x in found["self_test"] if x["device"] == "cpu"}
    assert list(cosine) == ["fp4-emulated", "int8-emulated", "int8-fast-emulated", "exact"]
    assert all(x["ok"] and x["error"] is None for x in found["self_test"])
    fp4, int8, fast, exact = cosine.values()
    assert 0.97 < fp4 < 0.999 < fast < int8 < exact


def test_versions_and_packages_are_listed_with_their_use(found):
    assert found["versions"]["torch"] == torch.__version__
    packages = {x["name"]: x for x in found["packages"]}
    assert set(packages) == {"diffusers", "matplotlib", "gradio", "ninja", "nvcc"}
    assert all(x["use"] for x in packages.values())


def test_json_is_the_same_data(capsys):
    assert main(["doctor", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {"versions", "devices", "decisions", "kernels", "self_test", "packages"}


def test_text_names_every_decision_and_absent_package(found):
    text = doctor.render(found)
    for x in found["decisions"]:
        assert x["reason"] in text
    assert "ok     fp4-emulated on cpu" in text
    absent = {**found, "packages": [{"name": "gradio", "version": None, "use": "the browser app"}]}
    assert "gradio        absent     for the browser app" in doctor.render(absent)


def test_a_kernel_that_fails_is_shown_and_the_exit_status_is_1(monkeypatch, capsys):
    def broken(*_args, **_kwargs):
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    monkeypatch.setattr(ops.reference, "fp4_attention", broken)
    assert doctor.run(argparse.Namespace(json=False, verify=False)) == 1
    out = capsys.readouterr().out
    assert "FAILED fp4 on cpu: RuntimeError: no kernel image is available" in out
    assert "ok     int8-emulated on cpu" in out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(torch.zeros_like, "cosine is below 0.999"), (lambda x: x * torch.nan, "the output is not finite")],
)
def test_a_kernel_that_is_wrong_is_shown(monkeypatch, spoil, message):
    real = ops.reference.int8_attention

    def wrong(*args, **kwargs):
        out, lse = real(*args, **kwargs)
        return spoil(out), lse

    monkeypatch.setattr(ops.reference, "int8_attention", wrong)
    result = doctor.self_test(torch.device("cpu"), "int8")
    assert not result["ok"]
    assert result["error"] == message


@pytest.mark.parametrize(("cuda", "capability", "name"), [("13.0", (12, 0), "sm_120"), (None, None, "not an NVIDIA GPU")])
def test_a_gpu_is_described_by_its_capability(monkeypatch, cuda, capability, name):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (12, 0))
    monkeypatch.setattr(compiled, "failure", lambda capability: None)
    card = SimpleNamespace(name="Some card", total_memory=32 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    described = doctor._device(torch.device("cuda", 0))
    assert described["capability"] == capability
    assert described["description"] == f"Some card, {name}, 32 GiB"
    decision = doctor._decision(torch.device("cuda", 0), doctor.Precision.FP4)
    assert ("sm_120" if capability else "not an NVIDIA one") in decision["reason"]
