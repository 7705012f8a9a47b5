"""What is run, in which order, what is shared, and what happens when something fails, stops or is killed."""

from __future__ import annotations

import json
import threading
from collections import Counter

import numpy as np
import pytest
from study_fake import FakeEngine

from comfy_sage3.errors import EngineError, InputError
from comfy_sage3.study.run import Cancelled, run
from comfy_sage3.study.store import BROKEN, DONE, WAITING, Store
from comfy_sage3.study.sweep import parse


def states(store):
    return Counter(store.state(cell) for cell in store.sweep.cells())


def test_the_exact_side_is_made_once_per_prompt_and_seed(store, engine):
    found = run(store, lambda name: engine)
    assert (found.done, found.failed, found.made) == (8, 0, 8)
    count = Counter(call.rsplit(" ", 1)[0] for call in engine.calls)
    assert count["start exact"] == 4 * 2  # prompts x seeds, repeats
    assert count["second exact"] == 4
    assert count["start fp4"] == count["start int8"] == 4 * 2
    assert count["inspect fp4"] == 4
    assert engine.closed


def test_a_cell_says_what_a_single_comparison_says(store, engine, sweep):
    from comfy_sage3.compare.measure import compare

    run(store, lambda name: engine)
    cell = sweep.cells()[0]
    alone = compare(FakeEngine(), sweep.request(cell.prompt, cell.seed), *sweep.sides(cell.contestant), repeats=2).metrics
    shared = store.metrics(cell)
    assert shared["quality"] == alone["quality"]
    assert shared["sides"] == alone["sides"]
    for key in ("a", "b", "a_over_b"):
        assert shared["timing"][key] == alone["timing"][key]
    assert shared["timing"]["order"] == "AABB"
    assert alone["timing"]["order"] == "ABAB"
    assert shared["sweep"]["exact"] == cell.exact


def test_progress_is_one_rising_line_that_names_the_cell(store, engine):
    told = []
    run(store, lambda name: engine, on_progress=lambda *x: told.append(x))
    fractions = [f for f, _ in told]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    assert fractions[-1] > 0.95
    assert max(fractions) <= 1
    assert told[0][1] == "1 of 8: fp4, seed 1: warming up exact attention"
    assert any(doing.startswith("8 of 8: int8, seed 2: B (int8), run 2 of 2") for _, doing in told)


def test_a_second_run_runs_nothing_and_opens_no_engine(store, engine):
    run(store, lambda name: engine)
    again = run(Store.open(store.out), lambda name: pytest.fail("an engine was opened"))
    assert (again.done, again.made) == (8, 0)


def test_a_grown_sweep_runs_only_what_is_new(store, engine, data):
    run(store, lambda name: engine)
    grown = Store.create(store.out, parse({**data, "precisions": ["fp4", "int8", "int8-fast"]}))
    more = FakeEngine()
    assert run(grown, lambda name: more).made == 4
    assert not [call for call in more.calls if "exact" in call and not call.startswith("check")]


def test_a_failing_cell_is_written_down_and_the_rest_goes_on(store, engine):
    engine.fails["fp4"] = RuntimeError("the kernel gave up\nat 0x1234")
    found = run(store, lambda name: engine)
    assert (found.done, found.failed, found.made) == (4, 4, 4)
    assert "4 of 8 cells have a result, 4 failed; 4 were run now." in found.sentence
    cell = store.sweep.cells()[0]
    assert store.state(cell) == BROKEN
    assert store.failure(cell)["reason"] == "RuntimeError: the kernel gave up"
    engine.fails.clear()
    assert run(store, lambda name: engine).made == 4
    assert states(store) == {DONE: 8}
    assert not list((store.out / "failed").iterdir())


def test_a_failing_exact_side_is_tried_once_and_fails_its_cells(store, engine):
    engine.fails["exact"] = EngineError("The server is gone: start it.")
    assert run(store, lambda name: engine).failed == 8
    assert sum(call.startswith("start exact") for call in engine.calls) == 4
    assert store.failure(store.sweep.cells()[1])["reason"] == "The exact side failed: The server is gone: start it."


def test_an_engine_that_cannot_be_opened_is_no_failing_cell(store):
    def refuse(name):
        raise EngineError("No server there.")

    with pytest.raises(EngineError, match="No server there"):
        run(store, refuse)
    assert states(store) == {WAITING: 8}


@pytest.mark.parametrize("after", [1, 9, 20, 50])
def test_cancelling_keeps_what_is_finished_and_leaves_nothing_half_done(store, engine, after):
    asked = 0

    def stop():
        nonlocal asked
        asked += 1
        return asked > after

    with pytest.raises(Cancelled, match="run it again"):
        run(store, lambda name: engine, stop=stop)
    assert engine.closed
    found = states(store)
    assert found[BROKEN] == 0
    assert found[WAITING] > 0
    assert not [p for p in store.out.rglob(".*")]
    assert store.busy() == []
    made = run(store, lambda name: FakeEngine()).made
    assert made == found[WAITING]


def test_what_a_listener_raises_is_passed_on(store, engine):
    def listener(fraction, doing):
        if "fp4), run" in doing:
            raise ValueError("the page is gone")

    with pytest.raises(ValueError, match="the page is gone"):
        run(store, lambda name: engine, on_progress=listener)
    assert states(store) == {WAITING: 8}


def test_two_runners_share_the_work_and_run_no_cell_twice(store, tmp_path):
    journal = tmp_path / "journal"
    engines = [FakeEngine(journal, nap=0.002) for _ in range(2)]
    found = []
    threads = [
        threading.Thread(target=lambda e=e: found.append(run(Store.open(store.out), lambda name: e))) for e in engines
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(x.made for x in found) == 8
    assert all((x.done, x.failed) == (8, 0) for x in found)
    lines = Counter(" ".join([x.split()[0], *x.split()[2:]]) for x in journal.read_text().splitlines())
    assert all(count == 2 for what, count in lines.items() if what.startswith(("start", "end")))  # the repeats
    assert all(count == 1 for what, count in lines.items() if what.startswith(("inspect", "second")))


def test_a_cell_that_another_process_holds_is_waited_for_and_taken_over(store, engine, monkeypatch):
    cell = store.sweep.cells()[0]
    held = store.lock(cell.id)
    assert held.__enter__() is True
    assert store.busy() == [cell.id]
    told = []

    def listener(fraction, doing):
        told.append(doing)
        if doing.startswith("waiting"):
            held.__exit__(None, None, None)  # as the system does when a process dies

    assert run(store, lambda name: engine, on_progress=listener).made == 8
    assert told.count("waiting for 1 cells that another process is running") == 1


def test_half_written_results_are_cleared_by_who_holds_the_lock(store, engine):
    cell = store.sweep.cells()[0]
    left = store.out / "cells" / f".{cell.id}-abcdefgh"
    left.mkdir()
    (left / "metrics.json").write_text("{")
    store.folder(cell).mkdir()
    (store.folder(cell) / "metrics.json").write_text("")  # as after a power cut
    run(store, lambda name: engine)
    assert not left.exists()
    assert store.state(cell) == DONE


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY junk", b"garbage"])
def test_a_damaged_exact_side_is_made_again(store, engine, damage):
    run(store, lambda name: engine)
    cell = store.sweep.cells()[0]
    (store.out / "exact" / cell.exact / "video.npy").write_bytes(damage)
    (store.folder(cell) / "metrics.json").unlink()
    again = FakeEngine()
    assert run(Store.open(store.out), lambda name: again).made == 1
    assert sum(call.startswith("start exact") for call in again.calls) == 2


def test_an_exact_side_reads_back_as_it_was_written(store, engine, sweep):
    run(store, lambda name: engine)
    cell = sweep.cells()[0]
    found = store.baseline(cell)
    request = sweep.request(cell.prompt, cell.seed)
    from study_fake import frames

    np.testing.assert_array_equal(found.video, frames(request, 0))
    np.testing.assert_array_equal(found.second, frames(request, 1))
    assert [r.seconds_total for r in found.runs] == [4.2, 4.2]
    assert found.environment["device"] == "fake GPU"


def test_a_folder_of_something_else_is_left_alone(tmp_path, sweep):
    (tmp_path / "thesis.txt").write_text("chapter 1")
    with pytest.raises(InputError, match="holds no sweep"):
        Store.create(tmp_path, sweep)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="is a file"):
        Store.create(tmp_path / "thesis.txt", sweep)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "comfy_sage3.sweep", "schema_version": 99}', "[" * 9999])
def test_a_damaged_or_foreign_sweep_folder_is_refused(store, sweep, text):
    (store.out / "sweep.json").write_text(text)
    with pytest.raises(InputError):
        Store.open(store.out)
    with pytest.raises(InputError):
        Store.create(store.out, sweep)
    assert (store.out / "sweep.json").read_text() == text


def test_what_is_stored_is_strict_json_without_this_machines_folders(store, engine):
    run(store, lambda name: engine)
    for path in store.out.rglob("*.json"):
        text = path.read_text()
        json.loads(text, parse_constant=pytest.fail)
        assert str(store.out) not in text
