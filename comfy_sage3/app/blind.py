"""The blind test: sides hidden and shuffled, a vote, and what guessing alone would have made of it."""

from __future__ import annotations

import json
import math
import os
import secrets
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError

VOTES_FILE = "blind-votes.json"
MOST_VOTES = 10_000
VOTES = ("first", "second", "cannot tell")


@dataclass(frozen=True)
class Trial:
    """One showing: whether A is shown first is known to the server alone."""

    run: str
    a_first: bool
    voted: str = ""

    @classmethod
    def shuffled(cls, run: str) -> Trial:
        return cls(run, bool(secrets.randbelow(2)))

    @property
    def right(self) -> bool | None:
        """Whether the vote named A; None for no vote or "cannot tell"."""
        if self.voted not in VOTES[:2]:
            return None
        return (self.voted == "first") == self.a_first


@dataclass(frozen=True)
class Tally:
    """Votes on one pair of sides."""

    right: int = 0
    wrong: int = 0
    undecided: int = 0

    def chance(self) -> float:
        """P(at least this many right of so many votes) when every vote is a coin's: exact, one-sided binomial."""
        votes = self.right + self.wrong
        return sum(math.comb(votes, k) for k in range(self.right, votes + 1)) / 2**votes

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Clopper and Pearson's exact interval of the share that is right; (0, 1) without votes."""
        votes, tail = self.right + self.wrong, (1 - level) / 2
        low = 0.0 if not self.right else _solve(lambda p: _at_least(self.right, votes, p) - tail)
        high = 1.0 if not self.wrong else _solve(lambda p: tail - (1 - _at_least(self.right + 1, votes, p)))
        return low, high

    def sentences(self) -> list[str]:
        """The tally for people."""
        votes = self.right + self.wrong
        spared = f" {self.undecided} more could not tell." if self.undecided else ""
        if not votes:
            return [f"No vote that names a side yet.{spared}"]
        p, (low, high) = self.chance(), self.interval()
        said = f"{self.right} of {votes} votes found A.{spared}"
        odds = f"By guessing alone, that many or more happen in {_percent(p)} of cases (exact binomial test)"
        if p <= 0.05:
            verdict = f"Confidence that people can tell: {_percent(1 - p)}."
        elif votes < 5:
            verdict = "Too few votes for either answer: 5 right ones in a row are the fewest that say something."
        else:
            verdict = f"Confidence that people can tell: {_percent(1 - p)}, which is not enough to say so (95 % is usual)."
        share = f"The share of right votes lies between {_percent(low)} and {_percent(high)} (95 %, exact)."
        return [said, f"{odds}. {verdict}", share]


def _at_least(k: int, n: int, p: float) -> float:
    """P(at least k of n) for 0 < p < 1, by logarithms: the coefficients of a thousand votes are no floats."""

    def log_of(i: int) -> float:
        choices = math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
        return choices + i * math.log(p) + (n - i) * math.log1p(-p)

    return math.fsum(math.exp(log_of(i)) for i in range(k, n + 1))


def _solve(rising: Any) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2


def _percent(p: float) -> str:
    if 0.999 < p < 1:  # never rounded up to certainty
        return f"{min(100 * p, 99.99):.4g} %"
    return f"{100 * p:.2g} %" if p < 0.1 else f"{100 * p:.1f} %"


class Votes:
    """All votes, in one file of the out folder: written whole or not at all, one writer at a time."""

    def __init__(self, out: Path) -> None:
        self.path = out / VOTES_FILE
        self._lock = threading.Lock()

    def tally(self, pair: str) -> Tally:
        """Of the pair of sides with this name."""
        found = [vote["right"] for vote in self._read() if vote.get("pair") == pair]
        return Tally(found.count(True), found.count(False), found.count(None))

    def add(self, pair: str, trial: Trial) -> None:
        """Keep one vote. Raises InputError where it cannot be written."""
        with self._lock:
            votes = [*self._read(), {"pair": pair, "run": trial.run, "right": trial.right}][-MOST_VOTES:]
            self._write(votes)

    def _read(self) -> list[dict[str, Any]]:
        try:
            votes = json.loads(self.path.read_text("utf-8"))
        except (OSError, ValueError):
            return []
        right = (True, False, None)
        return [v for v in votes if isinstance(v, dict) and v.get("right", "") in right] if isinstance(votes, list) else []

    def _write(self, votes: list[dict[str, Any]]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(dir=self.path.parent, prefix=".votes-")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(votes, file)
                os.replace(part, self.path)
            except BaseException:
                Path(part).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise InputError(f"The vote cannot be kept ({error.strerror}): free some space or give another --out.") from None


def pair_name(metrics: dict[str, Any]) -> str:
    """What votes are counted under: both sides' wishes."""
    return f"{metrics['sides']['a']['precision']} against {metrics['sides']['b']['precision']}"
