"""benchmarks/roofline.py: limits from a result that is reckoned by hand, and the recorded one."""

import json
from pathlib import Path

import pytest

from benchmarks import roofline

RECORDED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "h200.json"


def result(**row):
    made = {
        "shape": "x", "peer": "sm90-kernel", "direction": "forward", "batch": 1, "heads": 2, "queries": 1000, "keys": 1000,
        "head_dim": 64, "causal": False, "tflops": 1.0,
    }  # fmt: skip
    return {
        "device": {"multiprocessors": 100, "name": "a GPU"}, "clocks": {"busy": {"sm_mhz": 1000.0}}, "copy_gb_per_s": 1000.0,
        "rows": [made | row],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "roof", "limit"),
    [
        ({"head_dim": 64}, 16 * 1e11 * 256 / 1e12, "exponentials"),
        ({"head_dim": 256, "queries": 4000, "keys": 4000}, 2 * 4096 * 1e11 / 1e12, "tensor cores"),
        ({"peer": "sm90-fast-kernel"}, 4 * 1000 * 1000 * 1000 / 5000 / 1000, "memory"),  # 800 FLOP a byte
        ({"peer": "cudnn", "head_dim": 128}, 2 * 2048 * 1e11 / 1e12, "tensor cores"),
        ({"queries": 10, "keys": 10, "head_dim": 128}, 4 * 10 * 10 / 50 / 1000 * 1000, "memory"),
    ],
)
def test_a_calls_roof_is_the_least_of_its_limits(row, roof, limit):
    (found,) = roofline.points(result(**row))
    assert found.limit == limit
    assert found.roof == pytest.approx(roof)


def test_causal_calls_have_half_the_work_for_the_same_bytes():
    (whole,), (causal,) = (roofline.points(result(causal=c)) for c in (False, True))
    assert causal.intensity == whole.intensity / 2


def test_the_recorded_result_has_a_table_and_a_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert roofline.main([str(RECORDED), "--out", str(tmp_path / "x.png")]) == 0
    assert "| hd128-8192 | 6554 |" in capsys.readouterr().out
    assert (tmp_path / "x.png").stat().st_size > 10_000
    found = roofline.points(json.loads(RECORDED.read_text("utf-8")))
    assert all(0 < p.tflops < p.roof for p in found)


def test_what_is_no_result_is_one_sentence(tmp_path, capsys):
    for text in ("", "{}", '{"rows": []}'):
        (tmp_path / "x.json").write_text(text)
        assert roofline.main([str(tmp_path / "x.json")]) == 2
        assert "is not a result of benchmarks/attention.py" in capsys.readouterr().err
