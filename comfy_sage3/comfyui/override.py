"""The attention hook: serve what the door can serve, leave every other call to ComfyUI's own attention.

Installed on a clone of the model as ``transformer_options["optimized_attention_override"]``. The override is
a plain function, not an object: ComfyUI 0.3.x deep-copies a model's options, and a function survives that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..attention import attention
from ..dispatch import Call, choose
from ..errors import InputError, KernelError
from ..kernels.devices import capability_of
from ..precision import Precision, PrecisionPlan
from ..report import Report
from .call import HookCall, NotServed
from .guard import Guard
from .layers import NO_LAYERS, Layer, LayerList

KEY = "sage3"  # names our wrappers and our attachment on the model
SLOT = "optimized_attention_override"
Override = Callable[..., Tensor]  # (func, q, k, v, heads, ...): func is the attention the user chose
log = logging.getLogger("comfy_sage3")


class Hook:
    """What one Sage3 Attention node wishes for, and what became of the calls of the latest run."""

    def __init__(
        self, plan: PrecisionPlan, *, emulate: bool = False, node_id: str | None = None,
        exact_layers: LayerList = NO_LAYERS, stop_on_trouble: bool = False,
    ) -> None:  # fmt: skip
        self.plan = plan
        self.emulate = emulate
        self.node_id = node_id
        self.exact_layers = exact_layers
        self.stop_on_trouble = stop_on_trouble
        self.guard = Guard()
        self.report = Report()
        self.prompt_id: str | None = None  # the queued prompt that the report belongs to
        self.inside_window = True  # of the current step; True while no step has been seen
        self._sampling: Any = None
        self._window = (float("inf"), 0.0)
        self._warned: set[str] = set()

    def begin(self, prompt_id: str | None) -> None:
        """Start counting anew, unless this is another sampler of the same queued prompt."""
        if prompt_id is None or prompt_id != self.prompt_id:
            self.report.reset()
            self.guard.reset()
        self.prompt_id = prompt_id
        self.inside_window = True

    def enter_step(self, model_sampling: Any, sigma: Tensor) -> None:
        """Decide once for a whole forward pass whether the step at ``sigma`` lies in the window."""
        if (self.plan.start, self.plan.end) == (0.0, 1.0):
            return  # reading sigma would wait for the GPU, for nothing
        if self._sampling is not model_sampling:
            to_sigma = model_sampling.percent_to_sigma
            self._window = (float(to_sigma(self.plan.start)), float(to_sigma(self.plan.end)))
            self._sampling = model_sampling
        self.inside_window = self._window[1] <= float(sigma.flatten()[0]) <= self._window[0]

    def wish(self, q_tokens: int, k_tokens: int, layer: Layer | None = None) -> tuple[Precision, str]:
        """The precision for one call and, when the node itself wants it exact, why."""
        if not self.inside_window:
            return Precision.EXACT, f"step outside the window {self.plan.start:.0%} to {self.plan.end:.0%}"
        if self.exact_layers:
            if layer is None:
                return Precision.EXACT, "the model does not say which layer calls, and some are to stay exact"
            if layer in self.exact_layers:
                return Precision.EXACT, "layers that are to stay exact"
        return self.plan.choose(None, q_tokens, k_tokens)

    def count(self, wished: str, reason: str, fell_back: bool) -> None:
        """Count a call that is left to ComfyUI. Not while a graph is traced: that is not a call yet."""
        if not torch.compiler.is_compiling():
            self.report.record(wished, "exact", reason, fell_back)

    def trouble(self, wished: str, reason: str, error: Exception | None = None) -> None:
        """A kernel failed: say so once and count the call as one that fell back, or raise KernelError if that is wished."""
        self.warn_once(reason)
        if self.stop_on_trouble:
            raise KernelError(
                f'Sage3 Attention: {reason}. Set the node\'s "on_trouble" to "fall back" to go on without it.'
            ) from error
        self.count(wished, reason, True)

    def warn_once(self, text: str) -> None:
        """Log ``text`` the first time it comes up."""
        if text not in self._warned:
            self._warned.add(text)
            log.warning("Sage3 Attention: %s", text)


def make_override(hook: Hook, previous: Override | None = None) -> Override:
    """The function for ComfyUI's override slot; ``previous``, an earlier override, serves what we do not."""

    def sage3_attention_override(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        call, wish, layer = _read(hook, args, kwargs)
        out = None if call is None else _serve(hook, call, wish, layer)
        if call is not None and out is not None:
            return call.result(out)
        # the attention this call would have had without us, with its arguments exactly as they came
        return func(*args, **kwargs) if previous is None else previous(func, *args, **kwargs)

    return sage3_attention_override


def _read(hook: Hook, args: Any, kwargs: Any) -> tuple[HookCall | None, Precision, Layer | None]:
    """The call, its wished precision and layer, or None for one that is to stay as it is, which is then counted."""
    if hook.plan.precision is Precision.EXACT:
        hook.count("exact", "exact attention was asked for", False)
        return None, Precision.EXACT, None
    try:
        call = HookCall.read(*args, **kwargs)
    except (NotServed, TypeError, AttributeError) as error:  # the latter two: called in a way we do not know
        hook.count(hook.plan.precision.value, one_line(error), True)
        return None, Precision.EXACT, None
    layer = Layer.of(kwargs.get("transformer_options"))
    wish, reason = hook.wish(call.q_shape[2], call.k_shape[2], layer)
    if wish is Precision.EXACT:
        hook.count("exact", reason, False)
        return None, wish, layer
    return call, wish, layer


def _serve(hook: Hook, call: HookCall, wish: Precision, layer: Layer | None) -> Tensor | None:
    """The result in the call's own layout, or None, counted, where ComfyUI's attention is to serve it."""
    decision = choose(_describe(call), wish, emulate=hook.emulate)
    wished, limited = wish.value, ""  # limited: why the guard gives this layer less than was wished
    while decision.kernel != "exact" and (limit := hook.guard.limit(layer, decision.kernel)):
        wish, limited = limit
        if wish is Precision.EXACT:
            hook.count(wished, limited, True)
            return None
        decision = choose(_describe(call), wish, emulate=hook.emulate)
    if decision.kernel == "exact":  # then the user's own back end is as good as ours
        hook.count(wished, limited or decision.reason, decision.fell_back or bool(limited))
        return None
    # Counted apart until the kernel has returned, so that a failed call is counted once. A compiled graph
    # counts inside its ops, at every run, so there it is the node's own report that it must know.
    compiling = torch.compiler.is_compiling()
    report = hook.report if compiling else Report()
    try:
        out = attention(
            call.q,
            call.k,
            call.v,
            mask=call.mask,
            scale=call.scale,
            enable_gqa=call.q_shape[1] != call.k_shape[1],
            layout=call.layout,
            precision=wish,
            emulate=hook.emulate,
            report=report,
        )
    except InputError as error:
        if not call.all_finite():  # no other kernel can mend that, and a black video would not say why
            raise InputError(f"Sage3 Attention: {error}") from error
        hook.count(wished, one_line(error), True)
        return None
    except Exception as error:  # a kernel must never cost the user the video
        hook.trouble(wished, f"{decision.kernel} failed ({type(error).__name__}: {one_line(error)})", error)
        return None
    assert isinstance(out, Tensor)  # a tuple only with return_lse
    if not compiling:
        wrong = hook.guard.check(layer, decision.kernel, call, out)
        if wrong is not None:
            hook.trouble(wished, wrong)
            return None
        for line in report.lines():
            hook.report.record(**(line | {"wished": wished, "reason": limited, "fell_back": True} if limited else line))
    return out


def install(
    model: Any, hook: Hook, on_done: Callable[[Hook], None], prompt_id: Callable[[], str | None]
) -> Any:
    """A clone of ``model`` whose attention goes through ``hook``; the model itself is left alone.

    ``on_done`` is called after each sampling, also one that fails; ``prompt_id`` names the running prompt.
    """
    from comfy.patcher_extension import WrappersMP

    model = model.clone()
    options = model.model_options["transformer_options"]
    options[SLOT] = make_override(hook, options.get(SLOT))

    def around_sampling(executor: Any, *args: Any, **kwargs: Any) -> Any:
        hook.begin(prompt_id())
        try:
            return executor(*args, **kwargs)
        finally:
            on_done(hook)

    def around_step(executor: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        hook.enter_step(executor.class_obj.model_sampling, t)
        return executor(x, t, *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, around_sampling)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, around_step)
    model.set_attachments(KEY, (*hooks_of(model), hook))
    return model


def hooks_of(model: Any) -> tuple[Hook, ...]:
    """The hooks of the Sage3 Attention nodes that ``model`` went through, first to last."""
    return model.get_attachment(KEY) or ()


def one_line(error: Exception, limit: int = 200) -> str:
    """The start of an error's message: a reason in a report is one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 4] + " ..."


def _describe(call: HookCall) -> Call:
    return Call(
        q_shape=call.q_shape,
        k_shape=call.k_shape,
        dtype=call.q.dtype,
        device_type=call.q.device.type,
        capability=capability_of(call.q.device),
        has_mask=call.mask is not None,
        needs_grad=call.needs_grad,
    )
