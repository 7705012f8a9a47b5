"""The order of the paper's rows (arXiv 2505.11594, tables 1 and 16) comes out of the command's own tables."""

import json

import pytest

from comfy_sage3.cli import main


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    path = tmp_path_factory.mktemp("numerics") / "numbers.json"
    assert main(["numerics", "--seeds", "1", "--json", str(path)]) == 0
    return json.dumps(json.loads(path.read_text())), json.loads(path.read_text())


def rows(tables, key):
    found = tables[1]["tables"]
    table = found[key] if isinstance(found, dict) else next(t for t in found if t["key"] == key)
    lines = table["lines"] if isinstance(table, dict) else table
    return [line["relative_l1"] for line in lines]


def test_every_step_of_the_smoothing_table_lowers_the_error(tables):
    errors = rows(tables, "smoothing")
    assert errors == sorted(errors, reverse=True)
    assert len(errors) == 6


def test_two_level_p_is_better_than_direct(tables):
    direct, running, _ = rows(tables, "p")
    assert running < direct
