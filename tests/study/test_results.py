"""The table, its files, the plots and the page: right, honest about emulation, and safe against what is in a prompt."""

from __future__ import annotations

import csv
import io
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from study_fake import FakeEngine

from comfy_sage3.compare.engine import EMULATED_NOTE
from comfy_sage3.study import plots
from comfy_sage3.study.plots import error_grids, pareto_front
from comfy_sage3.study.report import report_html, write_report
from comfy_sage3.study.results import COLUMNS, middle, results, terminal, to_csv
from comfy_sage3.study.run import run
from comfy_sage3.study.store import Store
from comfy_sage3.study.sweep import parse

EVIL = '=cmd|"x"!A1 </script><script>alert(1)</script><img src=x onerror=alert(2)>'


@pytest.fixture
def finished(store, engine):
    run(store, lambda name: engine)
    return store


@pytest.fixture
def mixed(tmp_path, data):
    """fp4 emulated, int8 on a real kernel, int8-fast failing."""
    store = Store.create(tmp_path / "mixed", parse({**data, "precisions": ["fp4", "int8", "int8-fast"]}))

    class Mixed(FakeEngine):
        def generate(self, request, side, on_step):
            self.emulated = side.wish == "fp4"
            return super().generate(request, side, on_step)

    engine = Mixed()
    engine.fails["int8-fast"] = RuntimeError(EVIL)
    run(store, lambda name: engine)
    return store


def test_a_row_a_cell_and_a_summary_a_contestant(finished):
    found = results(finished)
    assert len(found["rows"]) == 8
    assert all(set(row) == set(COLUMNS) for row in found["rows"])
    assert found["states"] == {"done": 8, "failed": 0, "waiting": 0}
    fp4, int8 = found["summary"]
    assert (fp4["contestant"], fp4["done"]) == ("fp4", 4)
    assert fp4["speedup"]["median"] == pytest.approx(4.0)
    assert int8["speedup"]["median"] == pytest.approx(2.0)
    assert fp4["psnr"]["median"] < int8["psnr"]["median"] < int8["floor_psnr"]["median"]
    assert fp4["self_relative_l1"]["median"] == pytest.approx(4 * int8["self_relative_l1"]["median"])
    assert found["note"] is None


def test_an_emulated_contestant_has_no_speed_anywhere(mixed):
    found = write_report(mixed)
    fp4, int8, _ = found["summary"]
    assert fp4["emulated"]
    assert fp4["speedup"] is fp4["attention_speedup"] is None
    assert int8["speedup"]["median"] == pytest.approx(2.0)
    assert all(row["speedup"] is None for row in found["rows"] if row["contestant"] == "fp4")
    assert found["note"] == EMULATED_NOTE
    assert [name for name, _, _ in plots.speed_points(found)] == ["int8"]
    page = (mixed.out / "report.html").read_text()
    assert f"fp4: {EMULATED_NOTE}" in page
    assert EMULATED_NOTE in terminal(found)
    assert "4.00x" not in page + terminal(found)


def test_a_contestant_whose_calls_all_stayed_exact_has_no_speed(store):
    class Kept(FakeEngine):
        def generate(self, request, side, on_step):
            made = super().generate(request, side, on_step)
            if side.wish == "fp4":
                made.report[0] |= {"wished": "exact", "kernel": "exact", "reason": "fewer than 64 tokens"}
            return made

    run(store, lambda name: Kept())
    found = results(store)
    fp4, int8 = found["summary"]
    assert (fp4["never_ran"], fp4["speedup"]) == (True, None)
    assert int8["speedup"]["median"] == pytest.approx(2.0)
    assert "kept exact" in terminal(found)
    assert "kept\u00a0exact" in report_html(store)
    assert "4.00x" not in terminal(found)


def test_with_emulation_only_there_is_no_speed_axis_and_the_page_says_why(store):
    run(store, lambda name: FakeEngine(emulated=True))
    found = results(store)
    assert plots.pareto_plot(found) is None
    page = report_html(store)
    assert "No contestant ran on real kernels as asked" in page
    assert page.count(EMULATED_NOTE) >= 2
    assert "as fast" not in re.sub(r"<details>.*?</details>", "", page, flags=re.S)


def test_failed_cells_keep_their_reason_everywhere(mixed):
    found = write_report(mixed)
    assert found["states"] == {"done": 8, "failed": 4, "waiting": 0}
    reasons = {row["reason"] for row in found["rows"] if row["state"] == "failed"}
    assert reasons == {f"RuntimeError: {EVIL}"}
    assert terminal(found).count("failed: int8-fast-seed") == 4
    assert "What failed" in (mixed.out / "report.html").read_text()


def test_the_page_fetches_nothing_and_no_text_becomes_markup(mixed):
    object.__setattr__(mixed.sweep.contestants[0], "plan_name", EVIL)
    object.__setattr__(mixed.sweep, "name", EVIL)
    page = report_html(mixed, results(mixed) | {"devices": [EVIL]})
    assert "<script" not in page
    assert "onerror=alert(2)>" not in page.replace("&gt;", "")
    bare = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "DATA", page)
    assert set(re.findall(r'(?:src|srcset|href)="([^"]*)"', bare)) == {"DATA"}
    assert "http" not in bare.replace("http-equiv", "")
    assert "default-src &#x27;none&#x27;; img-src data:; style-src" in page
    assert "script-src" not in page


def test_a_page_of_an_unfinished_sweep_says_so(store):
    page = report_html(store)
    assert "No cell of this sweep has a result yet" in page
    assert "8 not run yet" in page


def test_csv_reads_back_and_is_no_formula(mixed):
    found = results(mixed)
    rows = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert len(rows) == 12
    assert tuple(rows[0]) == COLUMNS
    for text, row in zip(rows, found["rows"], strict=True):
        assert text["prompt"] == row["prompt"]
        if row["psnr"] is not None:
            assert float(text["psnr"]) == row["psnr"]
    found["rows"][0] |= {"prompt": EVIL, "reason": "-1+1", "speedup": None}
    first = next(csv.DictReader(io.StringIO(to_csv(found))))
    assert first["prompt"] == "'" + EVIL
    assert first["reason"] == "'-1+1"
    assert first["speedup"] == ""


def test_the_files_are_strict_and_lie_in_the_sweeps_folder(finished):
    found = write_report(finished)
    text = (finished.out / "results.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == json.loads(json.dumps(found))
    assert (finished.out / "results.csv").read_text().count("\n") == 9
    assert not list(finished.out.glob(".*"))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_plots_are_pictures_and_repeat_exactly(finished, theme):
    found = results(finished)
    for draw, of in ((plots.box_plots, found), (plots.heat_maps, finished), (plots.pareto_plot, found)):
        first = draw(of, theme)
        assert first == draw(of, theme)
        picture = np.asarray(Image.open(io.BytesIO(first)).convert("RGB"))
        assert picture.std() > 5


def test_error_grids_average_over_prompts_and_seeds(finished):
    grids = error_grids(finished)
    assert list(grids) == ["fp4", "int8"]
    grid, layers, steps = grids["fp4"]
    assert (layers, steps) == ([0, 1, 2, 3], [0, 1])
    np.testing.assert_allclose(grid[:, 0], [12 * (1 + layer) / 400 for layer in range(4)])


def test_without_results_there_are_no_plots(store):
    found = results(store)
    assert plots.box_plots(found) is plots.heat_maps(store) is plots.pareto_plot(found) is None


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(1, 100)), max_size=12))
@settings(max_examples=200, deadline=None)
def test_the_front_is_what_no_point_beats(points):
    front = pareto_front(points)

    def beaten(p):
        return any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points)

    assert sorted(front) == sorted({p for p in points if not beaten(p)})
    assert front == sorted(front)


@given(st.lists(st.none() | st.floats(-1e6, 1e6), max_size=9))
def test_the_middle_lies_between_its_quartiles(values):
    found, known = middle(values), [v for v in values if v is not None]
    assert (found is None) == (not known)
    if found:
        assert min(known) <= found["q1"] <= found["median"] <= found["q3"] <= max(known)
        assert found["count"] == len(known)
