"""The command's own tables: the order of the paper's rows (arXiv 2505.11594, tables 1 and 16), and docs/numerics.md."""

import contextlib
import io
import json
from pathlib import Path

import pytest

from comfy_sage3.cli import main

DOC = Path(__file__).resolve().parents[2] / "docs" / "numerics.md"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What the command writes and what it prints: the very run the document shows, half a minute on two cores."""
    path, printed = tmp_path_factory.mktemp("numerics") / "numbers.json", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["numerics", "--json", str(path)]) == 0
    return json.loads(path.read_text())["tables"], printed.getvalue()


@pytest.fixture(scope="module")
def tables(ran):
    return ran[0]


def errors(tables, key):
    table = next(t for t in tables if t["key"] == key)
    return [row["relative_l1"] for row in table["rows"]]


def test_every_step_of_the_smoothing_table_lowers_the_error(tables):
    found = errors(tables, "smoothing")
    assert found == sorted(found, reverse=True)
    assert len(found) == 6


def test_nvfp4_is_better_than_mxfp4(tables):
    mxfp4, nvfp4 = errors(tables, "format")
    assert nvfp4 < mxfp4


def test_two_level_p_is_better_than_direct(tables):
    direct, *two_level = errors(tables, "p")
    assert max(two_level) < direct


def test_four_scales_gain_most_of_what_nine_do(tables):
    six, _, four, nine, *_ = errors(tables, "scale")
    assert nine < four < six - 0.8 * (six - nine)


def rows_of(text):
    """Every row of every table of these three columns: its label and its numbers. Other tables are not the command's."""
    rows = {}
    title = None
    lines = text.splitlines()
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if not line.startswith("|") or line.startswith("| ---"):
            continue
        label, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if after.startswith("| ---"):
            title = label if cells == ["cosine", "relative L1", "RMSE"] else None
        elif title is not None:
            rows[title, label] = [float(c.removesuffix("%")) for c in cells]
    return rows


def test_the_document_shows_what_the_command_prints(ran):
    shown, printed = rows_of(DOC.read_text(encoding="utf-8")), rows_of(ran[1])
    assert shown.keys() == printed.keys()
    for name, (cosine, *errors) in printed.items():
        # Another machine adds fp32 numbers in another order: the last digit may differ, no more.
        assert shown[name] == pytest.approx([cosine, *errors], rel=0.02, abs=1e-9), name
        assert shown[name][0] == pytest.approx(cosine, abs=0.03), name
