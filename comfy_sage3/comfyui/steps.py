"""Which step of the schedule runs, known without asking the GPU.

A sampler calls back once a step, after the step's first look at the model, so the calls back are counted. What a sampler
evaluates between two steps (the second look of heun, dpm_2 and their like) lies nearer to the step that follows and counts
as that one. Samplers that place their own steps, and what is no sampler of the usual kind (training), are not counted: there
the noise level is read off the device, where it is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

OWN_STEPS = ("dpm_fast_function", "dpm_adaptive_function")  # in ComfyUI's comfy/samplers.py
MOST_LOOKS = 32  # at the model within a step; more, and this sampler does not call back


class Steps:
    """The schedule of one sampling and the place in it. ``sigmas`` are noise levels, falling; the last is not evaluated."""

    def __init__(self) -> None:
        self.sigmas: tuple[float, ...] = ()
        self.index = 0
        self._counted = False  # whether ``index`` can be believed
        self._looks = 0

    @property
    def count(self) -> int:
        """How many steps there are; 0 outside a sampling."""
        return max(len(self.sigmas) - 1, 0)

    @property
    def sigma(self) -> float | None:
        """The noise level of the step that runs, or None where it has to be read off the device."""
        return self.sigmas[min(self.index, len(self.sigmas) - 1)] if self._counted and self.sigmas else None

    def begin(self, sampler: Any, sigmas: Tensor | None) -> None:
        """A sampling over ``sigmas`` (steps + 1,) begins: they are read here, before the loop."""
        self.sigmas = () if sigmas is None else tuple(sigmas.detach().float().cpu().tolist())
        self.index, self._looks = 0, 0
        function = getattr(sampler, "sampler_function", None)
        self._counted = function is not None and getattr(function, "__name__", "") not in OWN_STEPS

    def end(self) -> None:
        """The sampling is over: nothing is known any more."""
        self._counted = False

    def look(self) -> None:
        """The sampler is about to evaluate the model."""
        self._looks += 1
        if self._looks > MOST_LOOKS:
            self._counted = False

    def counting(self, callback: Callable[..., Any] | None, then: Callable[[], None]) -> Callable[..., Any]:
        """``callback`` of a sampler (step, denoised, x, total), which also counts and then calls ``then``."""

        def counted(step: int, *args: Any, **kwargs: Any) -> Any:
            self.index, self._looks = int(step) + 1, 0
            then()
            return None if callback is None else callback(step, *args, **kwargs)

        return counted
