"""What one Sage3 Attention node wishes for, step by step and layer by layer, and what became of it in the latest run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..dispatch import Call, Decision, choose
from ..errors import KernelError
from ..precision import Precision, PrecisionPlan
from ..report import Report
from .guard import Guard
from .layers import NO_LAYERS, Layer, LayerList
from .steps import Steps
from .tally import Tally
from .usage import Usage

Override = Callable[..., Tensor]  # (func, q, k, v, heads, ...): func is the attention the user chose
Wish = tuple[Precision, str]  # and, where the node itself wants a call exact, why
log = logging.getLogger("comfy_sage3")


class Table(Protocol):
    """A precision for every layer and noise level: ``comfy_sage3.plan``'s LayerPlan."""

    def choose(self, layer: str, sigma: float) -> Precision:
        """The precision of a layer, by its name in reports, at a noise level."""
        ...


class Hook:
    """One node's wishes, and the latest run: its report, its tally by layer and step, its guard."""

    def __init__(
        self, plan: PrecisionPlan, *, emulate: bool = False, node_id: str | None = None,
        exact_layers: LayerList = NO_LAYERS, stop_on_trouble: bool = False, table: Table | None = None,
        usage: Usage | None = None,
    ) -> None:  # fmt: skip
        self.plan = plan
        self.emulate = emulate
        self.node_id = node_id
        self.exact_layers = exact_layers
        self.stop_on_trouble = stop_on_trouble
        self.table = table
        self.usage = usage  # of a training: its time and memory
        self.guard = Guard()
        self.report = Report()
        self.tally = Tally()
        self.steps = Steps()
        self.overrides: list[Override] = []  # what was made for this hook: see ``chain``
        self.passing = False  # while an earlier override serves a call that was left to it
        self.running = False
        self.replaced = 0  # steps in which another node's override had to be taken back under ours
        self.prompt_id: str | None = None  # the queued prompt that the report belongs to
        self.inside_window = True  # of the current step; True while no step has been seen
        self.sigma: float | None = None
        self._earlier_steps = 0  # of other samplers of the same prompt
        self._sampling: Any = None
        self._window = (float("inf"), 0.0)
        self._wishes: dict[Layer | None, Wish] = {}  # of the current step
        self._decisions: dict[tuple[Any, ...], Decision] = {}
        self._warned: set[str] = set()

    @property
    def step(self) -> int:
        """The step that runs, counted over every sampler of the prompt."""
        return self._earlier_steps + min(self.steps.index, max(self.steps.count - 1, 0))

    @property
    def step_count(self) -> int:
        """Steps of every sampler of the prompt so far."""
        return self._earlier_steps + self.steps.count

    def begin(self, prompt_id: str | None, sampler: Any = None, sigmas: Tensor | None = None) -> None:
        """Start counting anew, unless this is another sampler of the same queued prompt."""
        if prompt_id is None or prompt_id != self.prompt_id:
            self.report.reset()
            self.guard.reset()
            self.tally = Tally()
            self._earlier_steps = self.replaced = 0
        else:
            self._earlier_steps = self.step_count
        self.prompt_id = prompt_id
        if self.usage is not None:
            self.usage.begin()
        self.running = True
        self.inside_window, self.sigma = True, None
        self._wishes.clear()
        self._decisions.clear()
        self.steps.begin(sampler, sigmas)

    def end(self) -> None:
        """The sampling is over, or has failed."""
        self.running = False
        self.steps.end()
        self.tally.settle()
        if self.usage is not None:
            self.usage.end()

    def enter_step(self, model_sampling: Any, sigma: Tensor) -> None:
        """Decide for a whole forward pass at noise level ``sigma`` (B,), which is read only if nothing else tells it."""
        self.guard.begin_pass()
        whole = (self.plan.start, self.plan.end) == (0.0, 1.0)
        known = self.steps.sigma
        if known is None and not (whole and self.table is None):
            known = float(sigma.flatten()[0])  # waits for the GPU
        if known != self.sigma:
            self._wishes.clear()
        self.sigma = known
        if whole or known is None:
            return
        if self._sampling is not model_sampling:
            to_sigma = model_sampling.percent_to_sigma
            self._window = (float(to_sigma(self.plan.start)), float(to_sigma(self.plan.end)))
            self._sampling = model_sampling
        self.inside_window = self._window[1] <= known <= self._window[0]

    def wish(self, q_tokens: int, k_tokens: int, layer: Layer | None = None) -> Wish:
        """The precision for one call and, when the node itself wants it exact, why."""
        if torch.compiler.is_compiling():
            wished = self._wish_of(layer)
        else:
            found = self._wishes.get(layer)
            wished = self._wishes[layer] = self._wish_of(layer) if found is None else found
        if wished[0] is Precision.EXACT:
            return wished
        if min(q_tokens, k_tokens) < self.plan.min_tokens:
            return Precision.EXACT, f"fewer than {self.plan.min_tokens} tokens"
        return wished

    def _wish_of(self, layer: Layer | None) -> Wish:
        """What a layer's calls get in this step, whatever their length."""
        if not self.inside_window:
            return Precision.EXACT, f"step outside the window {self.plan.start:.0%} to {self.plan.end:.0%}"
        if layer is None and self.exact_layers:
            return Precision.EXACT, "the model does not say which layer calls, and some are to stay exact"
        if layer is not None and layer in self.exact_layers:
            return Precision.EXACT, "layers that are to stay exact"
        if self.table is None:
            return self.plan.precision, ""
        if self.sigma is None:
            return Precision.EXACT, "outside a sampling, where the plan does not apply"
        planned = self.table.choose("" if layer is None else layer.key, self.sigma)
        return planned, "exact by the plan" if planned is Precision.EXACT else ""

    def decide(self, call: Call, wish: Precision) -> Decision:
        """Which kernel serves ``call``; asked once for calls that look alike."""
        if torch.compiler.is_compiling():
            return choose(call, wish, emulate=self.emulate)
        key = (wish, call)
        found = self._decisions.get(key)
        if found is None:
            found = self._decisions[key] = choose(call, wish, emulate=self.emulate)
        return found

    def count(self, layer: Layer | None, wished: str, kernel: str, reason: str, fell_back: bool, weight: int = 0) -> None:
        """Count a call of ``weight`` scores. Not while a graph is traced: that is not a call yet."""
        if not torch.compiler.is_compiling():
            self.report.record(wished, kernel, reason, fell_back)
            key = "" if layer is None else layer.key
            self.tally.record(key, self.step, kernel, reason, fell_back, weight)

    def trouble(self, reason: str, error: Exception | None = None) -> None:
        """A kernel failed: say so once, or raise KernelError if that is wished."""
        self.warn_once(reason)
        if self.stop_on_trouble:
            raise KernelError(
                f'Sage3 Attention: {reason}. Set the node\'s "on_trouble" to "fall back" to go on without it.'
            ) from error

    def warn_once(self, text: str) -> None:
        """Log ``text`` the first time it comes up."""
        if text not in self._warned:
            self._warned.add(text)
            log.warning("Sage3 Attention: %s", text)
