"""One sampling with the model's own attention, which is replayed at chosen steps: the override and wrappers that do it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..plan.calibrate import Calibration, spread
from ..plan.costs import costs_of
from .call import HookCall, NotServed
from .hook import Override
from .install import SLOT, hooks_of
from .layers import Layer

KEY = "sage3_calibration"
AT = 1.001  # a sampler is at a step once sigma has come this near to the step's from above


class Calibrator:
    """Looks at a model's attention calls at ``columns`` steps of the sampling that runs on the clone ``attach`` makes.

    ``on_call`` is called before each replay and may raise to stop the sampling.
    """

    def __init__(self, columns: int, *, emulate: bool, min_tokens: int, on_call: Callable[[], None] = lambda: None) -> None:
        self.columns = columns
        self.emulate = emulate
        self.min_tokens = min_tokens
        self.on_call = on_call
        self.calibration: Calibration | None = None  # made at the first sampling, which knows the device
        self.schedule: list[float] = []  # sigmas of all steps
        self.sigmas: list[float] = []  # of the columns reached so far
        self.calls = 0  # of attention, of any length
        self._targets: list[float] = []  # sigmas yet to be reached
        self._column: int | None = None

    def attach(self, model: Any) -> Any:
        """A clone of ``model`` that is looked at; the model itself is left alone.

        Raises InputError for a model that went through Sage3 Attention: its attention would not be the exact one.
        """
        from comfy.patcher_extension import WrappersMP

        if hooks_of(model):
            raise InputError(
                "This model went through Sage3 Attention already: connect the model as it was before that node to Sage3 "
                "Precision Plan."
            )
        model = model.clone()
        options = model.model_options["transformer_options"]
        options[SLOT] = self._override(options.get(SLOT))

        def around_sampling(executor: Any, *args: Any, **kwargs: Any) -> Any:
            sigmas = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
            self.begin([float(s) for s in sigmas.flatten()[:-1]])
            return executor(*args, **kwargs)

        def around_step(executor: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
            self.enter_step(float(t.flatten()[0]))
            try:
                return executor(x, t, *args, **kwargs)
            finally:
                self._column = None

        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, around_sampling)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, around_step)
        return model

    def begin(self, schedule: list[float]) -> None:
        """A sampling over these sigmas begins: choose the steps to look at."""
        self.schedule = [s for s in schedule if s > 0]
        distinct = sorted(set(self.schedule), reverse=True)
        self._targets = [distinct[i] for i in spread(len(distinct), self.columns)]
        self.sigmas = []

    def enter_step(self, sigma: float) -> None:
        """The model is about to be evaluated at ``sigma``: is this a column?

        Samplers evaluate between steps too, and some never at a step's own sigma, so a step counts as reached from its
        sigma on; further evaluations at the same one (the negative prompt's) belong to the same column.
        """
        if self.sigmas and sigma == self.sigmas[-1]:
            self._column = len(self.sigmas) - 1
            return
        self._column = None
        below = not self.sigmas or sigma < self.sigmas[-1]
        if self._targets and 0 < sigma <= self._targets[0] * AT and below:
            while self._targets and sigma <= self._targets[0] * AT:
                self._targets.pop(0)
            self.sigmas.append(sigma)
            self._column = len(self.sigmas) - 1

    def _override(self, previous: Override | None) -> Override:
        def sage3_calibration_override(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
            def own() -> Tensor:  # the attention this call would have had without us
                return func(*args, **kwargs) if previous is None else previous(func, *args, **kwargs)

            self.calls += 1
            if self._column is not None:
                self._look(self._column, own, args, kwargs)
            return own()

        if "torch._dynamo" in sys.modules:  # a compiled model: measuring is not for its graph
            return torch.compiler.disable(sage3_calibration_override)  # type: ignore[no-any-return]
        return sage3_calibration_override

    def _look(self, column: int, own: Callable[[], Tensor], args: Any, kwargs: Any) -> None:
        try:
            call = HookCall.read(*args, **kwargs)
        except (NotServed, TypeError, AttributeError):  # Sage3 Attention leaves such a call alone, too
            return
        if min(call.q_shape[2], call.k_shape[2]) < self.min_tokens:
            return
        self.on_call()
        if self.calibration is None:
            costs = costs_of(call.q.device, self.emulate)
            if not costs.precisions:
                raise InputError(
                    f"No 4- or 8-bit kernel can run here ({costs.missing}), so every layer would stay exact: turn emulate "
                    "on to plan for a GPU that has them."
                )
            self.calibration = Calibration(costs, emulate=self.emulate, min_tokens=self.min_tokens)
        layer = Layer.of(kwargs.get("transformer_options"))
        self.calibration.add(
            "" if layer is None else layer.key, column, call.q, call.k, call.v,
            exact=own, mask=call.mask, scale=call.scale, layout=call.layout,
        )  # fmt: skip
