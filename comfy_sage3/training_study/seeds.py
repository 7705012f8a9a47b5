"""Is a difference more than what seeds do? Means, spreads, confidence intervals and a verdict, from numbers alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Student's t at 0.975, for 1 to 30 degrees of freedom; beyond, the last: a little wide rather than too narrow.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """One form of attention less another, seed by seed.

    mean, low, high: of the differences, with a 95 % confidence interval (infinite for one seed); spread: the standard
    deviation of the other's own values from seed to seed, None for fewer than two.
    """

    seeds: int
    mean: float
    low: float
    high: float
    spread: float | None

    @property
    def kind(self) -> str:
        """ "few", "within", "small", "beyond" or "open": see ``WORDS``."""
        if self.seeds < 2 or self.spread is None:
            return "few"
        if self.low > self.spread or self.high < -self.spread:
            return "beyond"
        if -self.spread <= self.low and self.high <= self.spread:
            return "within" if self.low <= 0 <= self.high else "small"
        return "open"


WORDS = {
    "few": "too few seeds to say",
    "within": "within seed noise",
    "small": "real, but less than seed noise",
    "beyond": "beyond seed noise",
    "open": "not decided",
}
MEANING = (
    "Verdicts weigh the 95 % interval of the mean difference (Student's t) against the standard deviation from seed to seed "
    "of what it is compared with. *Within seed noise*: the interval holds 0 and lies within one standard deviation. *Real, "
    "but less than seed noise*: it lies within one, and leaves out 0. *Beyond seed noise*: it lies outside of one. *Not "
    "decided*: it reaches from inside to outside. With so few seeds the standard deviation itself is known only roughly."
)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of ``values`` and its 95 % confidence interval by Student's t; infinite for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = _T[min(len(values) - 1, len(_T)) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def compare(mine: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
    """``mine`` less ``other`` over the seeds that both have; None where there is none."""
    both = sorted(mine.keys() & other.keys())
    if not both:
        return None
    mean, low, high = interval([mine[s] - other[s] for s in both])
    spread = statistics.stdev(other[s] for s in both) if len(both) > 1 else None
    return Difference(len(both), mean, low, high, spread)
