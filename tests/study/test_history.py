"""The out folder as a history: newest first, tolerant of anything that lies there, and never reaching outside."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from study_fake import FakeEngine

from comfy_sage3.compare.measure import compare
from comfy_sage3.compare.output import write
from comfy_sage3.errors import InputError
from comfy_sage3.study.history import History
from comfy_sage3.study.run import run
from comfy_sage3.study.store import Store


@pytest.fixture
def out(tmp_path, sweep):
    """Two comparisons, a sweep with one result, and things that are not ours."""
    out = tmp_path / "runs"
    cell = sweep.cells()[0]
    done = compare(FakeEngine(), sweep.request(cell.prompt, 1), *sweep.sides(cell.contestant), repeats=1)
    for name, created in (("old", "2026-01-01T00:00:00+00:00"), ("new", "2026-03-01T01:00:00+02:00")):
        done.metrics["created"] = created
        write(done, out / name)
    Store.create(out / "sweep", sweep)
    (out / "photos").mkdir()
    (out / "photos" / "cat.jpg").write_text("meow")
    (out / "broken").mkdir()
    (out / "broken" / "metrics.json").write_text('{"schema": "comfy_sage3.compare"')
    (out / "hollow").mkdir()
    (out / "hollow" / "metrics.json").write_text('{"schema": "comfy_sage3.compare"}')
    (out / "strange").mkdir()
    (out / "strange" / "sweep.json").write_text('{"schema": "another"}')
    (out / ".half-written").mkdir()
    (out / "note.txt").write_text("a file")
    (tmp_path / "outside").mkdir()
    write(done, tmp_path / "outside" / "run")
    (out / "link").symlink_to(tmp_path / "outside" / "run")
    return out


def test_everything_is_listed_newest_first_and_named_for_what_it_is(out):
    entries = History(out).list()
    kinds = {e.id: e.kind for e in entries}
    assert kinds == {
        **{"old": "comparison", "new": "comparison", "sweep": "sweep", "photos": "foreign", "link": "foreign"},
        **{"broken": "damaged", "hollow": "damaged", "strange": "damaged"},
    }
    assert [e.when for e in entries] == sorted((e.when for e in entries), reverse=True)
    ours = [e for e in entries if e.ours]
    assert [e.id for e in ours][-2:] == ["new", "old"]
    assert next(e for e in ours if e.id == "new").when == "2026-02-28T23:00:00+00:00"
    assert next(e for e in ours if e.id == "sweep").state == "0 of 8 cells"
    assert "exact and fp4, seed 1: a large red circle" in ours[-1].title
    assert not any(str(out) in e.title for e in entries)


def test_an_out_folder_that_is_not_there_is_an_empty_history(tmp_path):
    assert History(tmp_path / "later").list() == []


def test_runs_are_opened_by_their_names(out):
    history = History(out)
    assert history.open("old")["request"]["seed"] == 1
    assert isinstance(history.open("sweep"), Store)


@pytest.mark.parametrize("name", ["photos", "link", "broken", "hollow", "strange"])
def test_what_is_not_ours_is_neither_opened_nor_deleted(out, name):
    history = History(out)
    before = sorted(p for p in out.rglob("*"))
    for do in (history.open, history.delete):
        with pytest.raises(InputError):
            do(name)
    assert sorted(p for p in out.rglob("*")) == before


BAD_NAMES = ["", ".", "..", "../outside/run", "a/../../outside", "old/a", "/etc", "C:\\x", "old\x00", ".half-written"]


@pytest.mark.parametrize("name", [*BAD_NAMES, "note.txt", "missing", None, 7, ["old"]])
def test_names_that_are_no_runs_are_refused(out, name):
    history = History(out)
    for do in (history.open, history.delete, history.folder):
        with pytest.raises(InputError, match="There is no run"):
            do(name)


@given(st.text(max_size=30) | st.sampled_from(BAD_NAMES))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_name_reaches_outside_of_out(tmp_path, name):
    out = tmp_path / "o"
    out.mkdir(exist_ok=True)
    (tmp_path / "victim").mkdir(exist_ok=True)
    try:
        found = History(out).folder(name)
    except InputError:
        return
    assert found.parent == out


def test_a_run_is_deleted_and_only_that_run(out):
    history = History(out)
    history.delete("old")
    assert "old" not in {e.id for e in history.list()}
    assert (out / "new" / "metrics.json").is_file()
    assert (out.parent / "outside" / "run" / "metrics.json").is_file()
    assert not list(out.glob(".deleted*"))


def test_a_running_sweep_is_not_deleted(out):
    history = History(out)
    store = history.open("sweep")
    with store.lock(store.sweep.cells()[0].id), pytest.raises(InputError, match="is running: stop it first"):
        history.delete("sweep")
    history.delete("sweep")
    assert not (out / "sweep").exists()


def test_an_interrupted_deletion_is_finished(out):
    os.rename(out / "old", out / ".deleted-1234")
    History(out).clean()
    assert not (out / ".deleted-1234").exists()
    assert (out / ".half-written").exists()


def test_chosen_runs_stand_in_one_table(out):
    history = History(out)
    run(history.open("sweep"), lambda name: FakeEngine())
    rows = history.compare(["old", "sweep"])
    assert len(rows) == 1 + 8
    assert (rows[0]["run"], rows[0]["b"], rows[0]["size"]) == ("old", "fp4", "32x16x5")
    assert all(row["run"].startswith("sweep/") for row in rows[1:])
    assert all(row["psnr"] > 0 for row in rows)
    assert history.compare([]) == []
    json.dumps(rows, allow_nan=False)


def test_names_with_spaces_and_other_scripts_are_fine(out):
    for name in ("my run (2)", "запуск", "実行"):
        (out / "new").rename(out / name)
        assert isinstance(History(out).open(name), dict)
        (out / name).rename(out / "new")
    assert isinstance(History(Path(str(out))).open("new"), dict)
