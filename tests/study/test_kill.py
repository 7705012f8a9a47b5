"""A sweep whose process is killed with SIGKILL goes on where it was, and two processes share one folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from comfy_sage3.study.results import results
from comfy_sage3.study.store import DONE, WAITING, Store

SCRIPT = Path(__file__).with_name("sweep_script.py")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is a POSIX signal")


def start(store: Store, journal: Path, nap: float) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(store.out), str(journal), str(nap)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def wait_for(journal: Path, text: str, count: int, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if journal.exists() and journal.read_text().count(text) >= count:
            return
        time.sleep(0.01)
    pytest.fail(f"{text!r} was not seen {count} times")


def events(journal: Path) -> Counter[tuple[str, ...]]:
    """How often each (what, precision, seed, prompt) happened, whoever did it."""
    return Counter((x[0], *x[2:]) for x in map(str.split, journal.read_text().splitlines()))


@pytest.mark.parametrize("moment", [("start", " fp4 ", 3), ("inspect", " ", 2), ("decode", " second ", 2)])
def test_after_kill_9_done_cells_stay_and_half_done_ones_are_run_again(store, tmp_path, moment):
    what, of, count = moment
    first, second = tmp_path / "first", tmp_path / "second"
    process = start(store, first, 0.03)
    try:
        until = time.monotonic() + 90
        while sum(line.startswith(what) and of in line for line in _lines(first)) < count:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
    before = {cell.id: store.folder(cell).stat().st_mtime_ns for cell in store.sweep.cells() if store.state(cell) == DONE}
    assert len(before) < 8
    assert store.busy() == []  # the system let go of the locks

    process = start(store, second, 0.0)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert f"8 of 8 cells have a result; {8 - len(before)} were run now." in said
    again = Store.open(store.out)
    assert results(again)["states"] == {"done": 8, "failed": 0, WAITING: 0}
    for cell in again.sweep.cells():
        if cell.id in before:
            assert again.folder(cell).stat().st_mtime_ns == before[cell.id]
            wanted = ("end", cell.contestant.name, str(cell.seed), cell.prompt.replace(" ", "_"))
            assert events(second)[wanted] == 0
    assert not [path for path in store.out.rglob(".*")]


def test_two_processes_share_a_sweep_and_one_that_is_killed_is_replaced(store, tmp_path):
    journals = [tmp_path / "a", tmp_path / "b"]
    processes = [start(store, journal, 0.03) for journal in journals]
    try:
        wait_for(journals[0], "start", 2)
        processes[0].send_signal(signal.SIGKILL)
        processes[0].communicate(timeout=30)
        said = processes[1].communicate(timeout=120)[0]
    finally:
        for process in processes:
            process.kill()
    assert processes[1].returncode == 0, said
    assert results(Store.open(store.out))["states"][DONE] == 8
    both = events(journals[0]) + events(journals[1])
    finished = [count for (what, *_), count in both.items() if what == "inspect"]
    assert len(finished) == 8
    assert sum(finished) <= 9  # at most the one that was killed was begun twice


def _lines(journal: Path) -> list[str]:
    return journal.read_text().splitlines() if journal.exists() else []
