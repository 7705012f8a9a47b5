"""``doctor --verify`` where it cannot verify, and what it prints where it could."""

import json

import torch

from comfy_sage3 import cli, verify


def test_without_a_gpu_every_step_says_what_it_needs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "report.json"
    assert cli.main(["doctor", "--verify", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["ok"]
    assert all("needs an NVIDIA GPU of sm_120 or sm_121" in step["skipped"] for step in found["steps"].values())
    said = capsys.readouterr().out
    assert said.count("skipped") == 3
    assert f"wrote {out}" in said


def test_a_folder_that_is_not_there_is_said_in_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["doctor", "--verify", "--out", str(tmp_path / "none" / "x.json")]) == 2
    assert "Name another file." in capsys.readouterr().err


def test_what_was_wrong_is_shown():
    shape = [1, 2, 97, 97, 64, True]
    found = {
        "device": "NVIDIA GeForce RTX 5090", "emulated": False, "ok": False,
        "steps": {
            "instruction against emulation": {
                "ok": False, "largest_difference_in_ulp": 123.0, "words_converted_otherwise": 4,
            },
            "kernel against specification": {
                "ok": True,
                "rows": [
                    {"shape": shape, "cosine_to_specification": 0.99999999, "error_against_exact": {"relative_l1": 0.17}}
                ],
            },
            "time": {"rows": [{"shape": shape, "ms": {"fp4": 1.0}, "tflops": {"fp4": 1000.0}}]},
        },
    }  # fmt: skip
    text = "\n".join(verify.lines(found))
    assert "WRONG    instruction against emulation" in text
    assert "123.00 units in the last place, 4 words" in text
    assert "97 x 97 hd64 causal: cosine to the specification 0.99999999, relative L1 to exact 0.1700" in text
    assert "fp4 1.000 ms (1000 TFLOPS)" in text
