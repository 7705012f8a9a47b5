"""The GPU tests: who can run here, and the summary of a run.

python -m pytest tests/gpu                                                        needs a CUDA GPU, skips without
python -m pytest tests/gpu --gpu-summary benchmarks/results/tests-gpu.json        and writes what came out
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import machine, page
from comfy_sage3.kernels import build
from comfy_sage3.kernels.jit.switches import Switches

from . import calls

STARTED = pytest.StashKey[float]()
OUTCOMES = pytest.StashKey[dict[str, Any]]()


@cache
def obstacle(kernel: str | None) -> str | None:
    """Why nothing here can run (None), or why this kernel cannot; builds the kernels where they are not built."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "needs an NVIDIA GPU"
    outcome = build.load()
    if isinstance(outcome, build.Failure):
        if outcome.log:  # there are compilers, and they refuse the sources: a fault, not a lack
            pytest.fail(f"the kernels do not compile: {outcome.reason}", pytrace=False)
        return f"the kernels cannot be built: {outcome.reason}"
    if kernel in calls.LOWEST:
        capability = torch.cuda.get_device_capability()
        lowest, highest = calls.LOWEST[kernel]
        if not lowest <= capability <= highest:
            return f"kernel {kernel} does not serve sm_{capability[0]}{capability[1]}"
    return None


def fp4_operators() -> Any:
    """The library with the 4-bit kernels; skips where they are not meant to be in it, and fails where they are."""
    outcome = build.load()
    assert isinstance(outcome, build.Loaded)
    if not hasattr(outcome.ops, "fp4_attention"):
        emulating = bool(Switches.read(os.environ).emulate_fp4)
        if torch.cuda.get_device_capability()[0] == 12 or (emulating and "90a" in outcome.archs):
            pytest.fail("the library was built for this GPU without its 4-bit kernels", pytrace=False)
        pytest.skip("needs a GPU of sm_120 or sm_121, or SAGE3_EMULATE_FP4=1 on one of sm_90")
    return outcome.ops


@pytest.fixture(params=calls.KERNELS)
def kernel(request: pytest.FixtureRequest) -> calls.Kernel:
    """Each kernel that this GPU has."""
    outcome = build.load()
    assert isinstance(outcome, build.Loaded)
    return calls.Kernel(request.param, outcome.ops)


@pytest.fixture(autouse=True)
def _a_launch_that_failed_is_the_fault_of_the_test_that_made_it():
    yield
    torch.cuda.synchronize()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here. All from this line, so that pytest says each reason once."""
    spec = getattr(item, "callspec", None)
    if why := obstacle(None) or obstacle(spec.params.get("kernel") if spec else None):
        pytest.skip(why)


# ------------------------------------------------------------------------------------------------ the summary
def pytest_addoption(parser: pytest.Parser) -> None:
    """--gpu-summary, where tests/gpu is named on the command line."""
    parser.addoption("--gpu-summary", metavar="FILE", default=None, help="write what the GPU tests gave to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    """Start the clock."""
    config.stash[STARTED] = time.time()
    config.stash[OUTCOMES] = {"passed": 0, "failed": [], "skipped": Counter()}
    config.pluginmanager.register(Collector(config), "gpu-summary")


class Collector:
    """Counts what came out of this folder's tests and writes it down at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.out = config.getoption("gpu_summary", None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of one test."""
        if not self.out or "tests/gpu/" not in report.nodeid.replace("\\", "/"):
            return
        found = self.config.stash[OUTCOMES]
        if report.failed:
            found["failed"].append(report.nodeid if report.when == "call" else f"{report.nodeid} ({report.when})")
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            found["skipped"][machine.tidy(reason.removeprefix("Skipped: "))] += 1
        elif report.when == "call":
            found["passed"] += 1

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Write the file."""
        if self.out:
            content = summary(self.config.stash[OUTCOMES], time.time() - self.config.stash[STARTED], int(exitstatus))
            page.replace(Path(self.out), (json.dumps(content, indent=1) + "\n").encode())


def summary(outcomes: dict[str, Any], seconds: float, exitstatus: int) -> dict[str, Any]:
    """The file's content: where, with what, and what came out."""
    gpu = torch.cuda.is_available()
    smi = machine.smi() if gpu else None
    return {
        "when": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "python -m pytest tests/gpu",
        "commit": machine.commit(),
        "device": machine.device() if gpu else None,
        "driver": smi["driver"] if smi else None,
        "versions": machine.versions(),
        "passed": outcomes["passed"],
        "failed": len(outcomes["failed"]),
        "skipped": sum(outcomes["skipped"].values()),
        "failures": outcomes["failed"],
        "skip_reasons": dict(outcomes["skipped"]),
        "seconds": round(seconds, 1),
        "exit_status": exitstatus,
    }
