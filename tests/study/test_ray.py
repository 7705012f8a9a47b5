"""Cells as Ray tasks on a cluster of two workers, one of which is killed midway: nothing lost, nothing written twice."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import Counter

import pytest
import study_fake
from study_fake import Open

from comfy_sage3.errors import EngineError
from comfy_sage3.study.ray_runner import run_on_ray
from comfy_sage3.study.results import results
from comfy_sage3.study.run import Cancelled
from comfy_sage3.study.store import DONE, Store
from comfy_sage3.study.sweep import parse

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'comfy-sage3[ray]'")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="workers are killed with a POSIX signal")


@pytest.fixture(scope="module")
def cluster():
    import ray.cloudpickle

    os.environ["RAY_DISABLE_IMPORT_WARNING"] = "1"
    ray.cloudpickle.register_pickle_by_value(study_fake)  # workers cannot import this folder
    ray.init(
        num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, configure_logging=False,
        object_store_memory=80 << 20, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )  # fmt: skip
    yield
    ray.shutdown()


def events(journal):
    return [line.split() for line in journal.read_text().splitlines()] if journal.exists() else []


@pytest.mark.usefixtures("cluster")
def test_a_worker_killed_midway_loses_nothing_and_nothing_is_written_twice(store, tmp_path, monkeypatch):
    journal, written, killed, over = tmp_path / "journal", Counter(), [], threading.Event()
    finish = Store.finish

    def counted(self, cell, comparison):
        written[cell.id] += 1
        finish(self, cell, comparison)

    monkeypatch.setattr(Store, "finish", counted)

    def kill():
        """The first worker that is inside a contestant's run."""
        while not killed and not over.wait(0.005):
            starts = Counter(tuple(x[1:]) for x in events(journal) if x[0] == "start" and x[2] != "exact")
            ends = Counter(tuple(x[1:]) for x in events(journal) if x[0] == "end" and x[2] != "exact")
            for running in starts - ends:
                os.kill(int(running[0]), signal.SIGKILL)
                killed.append(running)
                break

    thread = threading.Thread(target=kill)
    thread.start()
    told = []
    try:
        found = run_on_ray(store, "local", Open(journal, 0.1), on_progress=lambda *x: told.append(x))
    finally:
        over.set()
        thread.join(10)
    assert len(killed) == 1
    assert (found.done, found.failed, found.made) == (8, 0, 8)
    assert written == {cell.id: 1 for cell in store.sweep.cells()}
    pids = {x[1] for x in events(journal)}
    assert killed[0][0] in pids
    assert len(pids) >= 2  # two workers, and whoever took the killed one's place
    # Whoever was killed had not come to the last event of its task; each task came to it exactly once.
    last = Counter(tuple(x[2:]) for x in events(journal) if x[0] == "inspect")
    assert len(last) == 8
    assert set(last.values()) == {1}
    begun = Counter(tuple(x[2:]) for x in events(journal) if x[0] == "warm-up")
    assert begun[killed[0][1:]] == 2
    assert [f for f, _ in told] == sorted(f for f, _ in told)
    assert store.busy() == []
    assert not list(store.out.rglob(".*"))

    again = run_on_ray(Store.open(store.out), "local", Open(tmp_path / "second"))
    assert (again.done, again.made) == (8, 0)
    assert not (tmp_path / "second").exists()


@pytest.mark.usefixtures("cluster")
def test_failing_cells_are_recorded_and_not_retried(store, tmp_path):
    journal = tmp_path / "journal"
    found = run_on_ray(store, "local", Open(journal, 0.0, "int8"))
    assert (found.done, found.failed) == (4, 4)
    reasons = {row["reason"] for row in results(store)["rows"] if row["state"] == "failed"}
    assert reasons == {"RuntimeError: the kernel gave up"}
    assert sum(x[0] == "start" and x[2] == "int8" for x in events(journal)) == 4


@pytest.mark.usefixtures("cluster")
def test_cancelling_lets_go_of_every_lock(tmp_path, data):
    store = Store.create(tmp_path / "study", parse({**data, "seeds": [1]}))
    asked = iter(range(1000))
    with pytest.raises(Cancelled):
        run_on_ray(store, "local", Open(tmp_path / "journal", 0.2), stop=lambda: next(asked) > 2)
    assert store.busy() == []
    found = run_on_ray(store, "local", Open(tmp_path / "again", 0.0))
    assert found.done == 4
    assert all(store.state(cell) == DONE for cell in store.sweep.cells())


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("127.0.0.1:1", "There is no Ray cluster at '127.0.0.1:1'"),
        ("ray://127.0.0.1:1", "There is no Ray cluster at 'ray://127.0.0.1:1'"),
        ("nonsense", "is no Ray cluster's address"),
        ("host:99999", "is no Ray cluster's address"),
    ],
)
def test_no_cluster_is_one_sentence(store, monkeypatch, address, sentence):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(EngineError, match=sentence):
        run_on_ray(store, address, lambda name: None)
