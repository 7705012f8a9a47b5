"""What a caller may wish for: a precision, and the steps and lengths it applies to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .errors import InputError

MIN_TOKENS = 1024
"""The usual least length of a call in less than exact precision: shorter ones gain no time, and 4 bits hold the few,
large weights of cross-attention to a text badly."""


class Precision(str, Enum):
    """How exactly attention is to be computed."""

    AUTO = "auto"  # the fastest here: a kernel of this device, or exact attention
    FP4 = "fp4"  # NVFP4 microscaling (SageAttention3), forward only
    INT8 = "int8"  # 8-bit; the compiled kernels forward only, emulated also backward
    INT8_FAST = "int8-fast"  # 8-bit with exponentials within 6 %: faster on Hopper, forward only
    EXACT = "exact"  # PyTorch's scaled_dot_product_attention

    @classmethod
    def parse(cls, value: str | Precision) -> Precision:
        """The precision named by ``value``; raises InputError naming the choices."""
        try:
            return cls(value)
        except ValueError:
            choices = ", ".join(p.value for p in cls)
            raise InputError(f"Unknown precision {value!r}: choose one of {choices}.") from None


@dataclass(frozen=True)
class PrecisionPlan:
    """Which precision a call gets, by its place in the sampling schedule and its length.

    ``start`` and ``end`` are fractions of the schedule in [0, 1] (0 = first step, pure noise);
    outside the window, and below ``min_tokens`` query or key tokens, attention stays exact.
    """

    precision: Precision = Precision.AUTO
    start: float = 0.0
    end: float = 1.0
    min_tokens: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", Precision.parse(self.precision))
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise InputError(f"The window {self.start} to {self.end} is not usable: give 0 <= start <= end <= 1.")
        if self.min_tokens < 0:
            raise InputError(f"min_tokens is {self.min_tokens}: give 0 or more.")

    def choose(self, progress: float | None, q_tokens: int, k_tokens: int) -> tuple[Precision, str]:
        """The precision for one call and, when the plan keeps it exact, the reason ("" otherwise).

        ``progress`` is the fraction of the schedule already done in [0, 1], or None when unknown
        (then the window does not apply).
        """
        if self.precision is Precision.EXACT:
            return Precision.EXACT, ""  # as wished: no reason is needed
        if progress is not None and not self.start <= progress <= self.end:
            return Precision.EXACT, f"step at {progress:.0%} is outside the window {self.start:.0%} to {self.end:.0%}"
        if min(q_tokens, k_tokens) < self.min_tokens:
            return Precision.EXACT, f"fewer than {self.min_tokens} tokens"
        return self.precision, ""
