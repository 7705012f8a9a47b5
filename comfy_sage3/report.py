"""What ran: how many calls each kernel served, and why the others fell back."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import Counter
from typing import TypedDict


class ReportLine(TypedDict):
    """One row: ``calls`` calls that asked for ``wished`` ran on ``kernel`` because of ``reason``."""

    wished: str
    kernel: str
    reason: str
    fell_back: bool
    calls: int


_numbers = itertools.count()
_by_handle: weakref.WeakValueDictionary[str, Report] = weakref.WeakValueDictionary()


class Report:
    """A thread-safe tally of attention calls. One collector, many readers.

    ``handle`` is a text that stands for this report where only plain values can go: inside a torch op.
    ``gradients_in``: another report that counts the backward passes, which come when this one may be gone.
    """

    def __init__(self, gradients_in: Report | None = None) -> None:
        self._lock = threading.Lock()
        self.handle = f"report{next(_numbers)}"
        self.gradient_handle = self.handle if gradients_in is None else gradients_in.handle
        _by_handle[self.handle] = self
        self._calls: Counter[tuple[str, str, str, bool]] = Counter()
        self._gradients: Counter[str] = Counter()

    def __deepcopy__(self, memo: object) -> Report:
        """Itself: a copy of a model counts where the model does."""
        return self

    def record(self, wished: str, kernel: str, reason: str, fell_back: bool, calls: int = 1) -> None:
        """Count ``calls`` calls that asked for ``wished`` and were served by ``kernel``."""
        with self._lock:
            self._calls[(wished, kernel, reason, fell_back)] += calls

    def record_gradient(self, kernel: str, calls: int = 1) -> None:
        """Count ``calls`` backward passes by ``kernel``."""
        with self._lock:
            self._gradients[kernel] += calls

    def reset(self) -> None:
        """Forget every call."""
        with self._lock:
            self._calls.clear()
            self._gradients.clear()

    def lines(self) -> list[ReportLine]:
        """Every distinct outcome, most frequent first."""
        with self._lock:
            items = self._calls.most_common()
        return [{"wished": w, "kernel": k, "reason": r, "fell_back": f, "calls": n} for (w, k, r, f), n in items]

    def gradients(self) -> dict[str, int]:
        """Backward passes by kernel, most frequent first. Exact attention's are PyTorch's own and not counted."""
        with self._lock:
            return dict(self._gradients.most_common())

    @property
    def accelerated(self) -> int:
        """Calls served at the precision that was asked for, other than exact."""
        return sum(x["calls"] for x in self.lines() if not x["fell_back"] and x["kernel"] != "exact")

    @property
    def fell_back(self) -> int:
        """Calls that asked for less than exact precision and did not get what they asked for."""
        return sum(x["calls"] for x in self.lines() if x["fell_back"])

    def summary(self) -> str:
        """A few plain lines for a terminal or a node: totals, then one line per outcome."""
        lines = self.lines()
        total = sum(x["calls"] for x in lines)
        if not total:
            return "no attention calls were seen"
        head = f"{total} attention calls: {self.accelerated} accelerated, {self.fell_back} fell back"
        told = [f"  {x['calls']:>6} x {x['kernel']}: {x['reason']}" for x in lines]
        return "\n".join([head, *told, *(f"  {n:>6} x {kernel}: gradients" for kernel, n in self.gradients().items())])


def note_of(report: Report, wished: str, kernel: str, reason: str, fell_back: bool) -> str:
    """One outcome as a text that a torch op can carry to where the call really runs; see ``record_note``."""
    return f"{report.handle}|{report.gradient_handle}|{wished}|{kernel}|{'fell back' if fell_back else ''}|{reason}"


def record_note(note: str) -> None:
    """Count one call in the report that ``note`` names; "" and a report that is gone count nothing."""
    if note:
        handle, _, wished, kernel, fell_back, reason = note.split("|", 5)
        report = _by_handle.get(handle)
        if report is not None:
            report.record(wished, kernel, reason, bool(fell_back))


def record_gradient_note(note: str) -> None:
    """Count the backward pass of the call that ``note`` tells of; as ``record_note`` else."""
    if note:
        _, handle, _, kernel, _ = note.split("|", 4)
        report = _by_handle.get(handle)
        if report is not None:
            report.record_gradient(kernel)


process_report = Report()
"""Every call made through ``attention`` in this process that was given no report of its own."""
