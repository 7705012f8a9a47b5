"""The command with the bundled model at the smallest size: everything real, then again, which runs nothing."""

from __future__ import annotations

import json

import pytest

from comfy_sage3.cli import main
from comfy_sage3.compare.engine import EMULATED_NOTE
from comfy_sage3.study import command

pytest.importorskip("diffusers", reason="the embedded model needs diffusers: pip install 'comfy-sage3[demo]'")


@pytest.mark.usefixtures("with_pictures")
def test_a_sweep_of_the_bundled_model(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    said = {"prompts": ["a red circle"], "seeds": [1], "precisions": ["fp4", "int8"], "min_tokens": 0}
    (tmp_path / "s.json").write_text(json.dumps({**said, "size": "32x32x5", "steps": 1}))
    words = ["compare", "--sweep", str(tmp_path / "s.json"), "--out", str(out), "--device", "cpu"]
    assert main(words) == 0
    told = capsys.readouterr()
    assert "2 cells done, 0 failed, 0 waiting" in told.out
    assert EMULATED_NOTE in told.out
    assert "2 of 2 cells have a result; 2 were run now." in told.out
    assert "1 of 2: fp4, seed 1: exact attention, run 1 of 1" in told.err
    found = json.loads((out / "results.json").read_text())
    assert [s["contestant"] for s in found["summary"]] == ["fp4", "int8"]
    errors = [s["self_relative_l1"]["median"] for s in found["summary"]]
    assert errors[0] > errors[1] > 0
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") >= 5
    assert str(tmp_path) not in page
    assert len(list((out / "cells").glob("*/report.html"))) == 2

    monkeypatch.setattr(command._Open, "__call__", lambda self, name: pytest.fail("an engine was opened"))
    assert main(words) == 0
    assert "2 of 2 cells have a result; 0 were run now." in capsys.readouterr().out


def test_ray_without_a_sweep_is_refused(capsys):
    assert main(["compare", "--ray", "auto"]) == 2
    assert "give --ray together with --sweep" in capsys.readouterr().err
