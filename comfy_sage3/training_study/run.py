"""Run the arms that have no result yet: paces alone first, then arms side by side in processes, until a budget is spent."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from . import pace
from .arm import train
from .data import clips
from .settings import Arm, Setting, arms
from .store import Store

DONE, CUT, FAILED = "done", "cut", "failed"
Said = Callable[[str], None]


def run(
    settings: Sequence[Setting], out: Path, device: str, *, command: str, workers: int = 1, budget: float = math.inf,
    say: Said = print,
) -> dict[str, list[str]]:  # fmt: skip
    """Run what is missing of ``settings`` -> the names of the arms that are done, cut short and failed.

    ``budget``: seconds from now after which no step begins; a last held-out loss and its prompts still come. Raises
    InputError where a result in ``out`` is of other settings.
    """
    deadline = time.time() + budget
    store = Store(out)
    left = [arm for arm in arms(settings) if not store.done(arm.name, arm.setting)]
    paces = [(s, form) for s in settings if s.steps for form in s.forms if not store.done(pace.name_of(s, form), s)]
    outcome: dict[str, list[str]] = {DONE: [], CUT: [], FAILED: []}
    set_up()
    for setting, form in paces:
        name = pace.name_of(setting, form)
        if time.time() >= deadline:
            outcome[CUT].append(name)
            continue
        try:
            measured = pace.measure(setting, form, store, device, command)
        except Exception as problem:  # one that fails must not take the others with it
            outcome[FAILED].append(name)
            say(f"{name} failed: {_short(problem)}")
            continue
        outcome[DONE].append(name)
        memory = measured["peak_bytes"]
        say(f"{name}: {pace.median_ms(measured):.1f} ms a step" + (f", {memory / 2**30:.2f} GiB" if memory else ""))
    for setting in {arm.setting.data + arm.setting.size: arm.setting for arm in left}.values():
        if time.time() < deadline:  # once, not in every process
            clips(store.data, setting, device)
            clips(store.data, setting, device, for_judging=True)
    begun = time.time()
    jobs = [(arm, out, device, command, deadline) for arm in left]
    for count, (arm, state, text) in enumerate(_each(jobs, workers), 1):
        outcome[state].append(arm.name)
        say(f"{count}/{len(left)} {time.time() - begun:5.0f} s {arm.name}: {text}")
        if state == DONE:
            store.pack()  # after each: whoever is killed keeps what is done
    store.pack()
    return outcome


def _each(jobs: Sequence[tuple[Any, ...]], workers: int) -> Any:
    """(arm, state, text) of every job, as they finish."""
    if workers == 1 or len(jobs) < 2:
        yield from map(_work, jobs)
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")  # a process that is forked cannot use CUDA
    with ProcessPoolExecutor(min(workers, len(jobs)), context, set_up, (threads,)) as pool:
        running = {pool.submit(_work, job): job[0] for job in jobs}
        for future in as_completed(running):
            try:
                yield future.result()
            except BrokenProcessPool:
                yield running[future], FAILED, "its process ended: run the command again, with fewer --workers"


def set_up(threads: int | None = None) -> None:
    """What ``train-demo`` sets, in every process; and a process's share of the cores."""
    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def _work(job: tuple[Arm, Path, str, str, float]) -> tuple[Arm, str, str]:
    arm, out, device, command, deadline = job
    if time.time() >= deadline:
        return arm, CUT, "the budget is spent"
    try:
        result = train(arm, Store(out), device, command, deadline)
    except torch.OutOfMemoryError:  # by the others' needs as well as its own
        return arm, CUT, "the GPU's memory is full: run again, with fewer --workers"
    except Exception as problem:
        return arm, FAILED, _short(problem)
    finally:
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()  # what this arm kept, the other processes may need
    if result is None:
        return arm, CUT, "the budget is spent; it goes on where it is"
    return arm, DONE, told(result)


def told(result: dict[str, Any]) -> str:
    """One arm's result in a line."""
    if result["diverged"] is not None:
        return f"no finite loss or gradient at step {result['diverged']}"
    said = f"held-out loss {result['final']['own']:.5f}, {result['seconds']:.1f} s of training"
    found = result.get("adherence")
    return said + (f", {100 * found['all']:.0f} % of {found['prompts']} prompts shown in full" if found else "")


def _short(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".splitlines()[0][:300]
