"""The order of the paper's rows (arXiv 2505.11594, tables 1 and 16) comes out of the command's own tables."""

import json

import pytest

from comfy_sage3.cli import main


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    path = tmp_path_factory.mktemp("numerics") / "numbers.json"
    assert main(["numerics", "--seeds", "1", "--json", str(path)]) == 0
    return json.loads(path.read_text())["tables"]


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
    direct, running, _ = errors(tables, "p")
    assert running < direct
