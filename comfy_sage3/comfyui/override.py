"""The attention override: serve what the door can serve, leave every other call to ComfyUI's own attention.

The override is a plain function, not an object: ComfyUI 0.3.x deep-copies a model's options, and a function survives that.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..attention import attention, attention_freeing
from ..dispatch import COMPILED, Call, Decision
from ..errors import InputError, KernelError
from ..kernels.devices import capability_of
from ..precision import Precision
from ..report import Report
from .call import HookCall, NotServed
from .hook import Hook, Override
from .layers import Layer


def make_override(hook: Hook, previous: Override | None = None) -> Override:
    """The function for ComfyUI's override slot; ``previous``, an earlier override, serves what we do not.

    Its attribute ``container_function`` serves calls that hand over q, k and v for good (ComfyUI 0.32 and later).
    """

    def left(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The attention this call would have had without us, with its arguments exactly as they came."""
        if previous is None:
            return func(*args, **kwargs)
        hook.passing = True
        try:
            return previous(func, *args, **kwargs)
        finally:
            hook.passing = False

    def sage3_attention_override(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if hook.passing:  # previous has led back to us, as a node's does that keeps what it found in the slot
            return func(*args, **kwargs)
        served = _Served(hook, args, kwargs)
        out = served.run()
        if out is not None:
            return out
        with served.timing("exact"):
            return left(func, *args, **kwargs)

    def with_containers(*args: Any, **kwargs: Any) -> Tensor:
        held, rest = args[:3], args[3:]
        if not hook.passing:
            served = _Served(hook, (*(c.peek() for c in held), *rest), kwargs)
            out = served.run_freeing(held)
            if out is not None:
                return out
        from comfy.ldm.modules import attention as backends  # what was chosen at start-up

        own = getattr(previous, "container_function", None)
        if previous is not None and own is not None:
            return own(*args, **kwargs)  # type: ignore[no-any-return]
        if previous is None:
            return backends.optimized_attention(*args, **kwargs)  # type: ignore[no-any-return]
        func = getattr(backends.optimized_attention, "__wrapped__", backends.optimized_attention)
        return left(func, *(c.take() for c in held), *rest, **kwargs)

    sage3_attention_override.container_function = with_containers  # type: ignore[attr-defined]
    hook.overrides.append(sage3_attention_override)
    return sage3_attention_override


class _Served:
    """One call on its way: read, decided, run, looked at, counted."""

    def __init__(self, hook: Hook, args: Any, kwargs: Any) -> None:
        self.hook = hook
        self.layer = Layer.of(kwargs.get("transformer_options"))
        self.place: Layer | int | None = None  # in the forward pass, for the guard
        self.call: HookCall | None = None
        self.wish = Precision.EXACT
        self.wished = hook.plan.precision.value  # for the report
        self._weight = 0
        self._shape: tuple[Any, ...] = ()
        self._device: torch.device | None = None
        if hook.plan.precision is Precision.EXACT:
            self._leave("exact attention was asked for", False)
            return
        try:
            call = HookCall.read(*args, **kwargs)
        except (NotServed, TypeError, AttributeError) as error:  # the latter two: called in a way we do not know
            self._leave(one_line(error), True)
            return
        (_, _, lq, _), (_, _, lk, _) = call.q_shape, call.k_shape
        self._weight = lq * lk
        self._shape = (call.q_shape, call.k_shape, call.q.dtype, call.mask is not None)
        self._device = call.q.device
        self.wish, reason = hook.wish(lq, lk, self.layer)
        self.wished = self.wish.value
        if self.wish is Precision.EXACT:
            self._leave(reason, False)
            return
        if not torch.compiler.is_compiling():  # where the guard does not look, and a count would compile anew
            self.place = hook.guard.place(self.layer)
        self.call = call

    def run(self) -> Tensor | None:
        """The result in the call's own form, or None, counted, where ComfyUI's attention is to serve it."""
        decided = self._decide()
        if decided is None or self.call is None:
            return None
        decision, wish, limited = decided
        call, hook = self.call, self.hook
        # Counted apart until the kernel has returned, so that a failed call is counted once. A compiled graph
        # counts inside its ops, at every run, so there it is the node's own report that it must know.
        compiling = torch.compiler.is_compiling()
        report = hook.report if compiling else Report(gradients_in=hook.report)
        try:
            with self.timing(decision.kernel):
                out = attention(call.q, call.k, call.v, report=report, **self._options(call, wish))
        except Exception as error:  # a kernel must never cost the user the video
            self._failed(decision, error)
            return None
        assert isinstance(out, Tensor)  # a tuple only with return_lse
        if not compiling:
            wrong = hook.guard.check(self.layer, decision.kernel, call, out, self.place)
            if wrong is not None:
                self._trouble(wrong)
                return None
            self._count(report, limited)
        return call.result(out)

    def run_freeing(self, held: tuple[Any, Any, Any]) -> Tensor | None:
        """As ``run`` for tensors in containers, which are emptied as soon as a compiled kernel has its copy."""
        decided = self._decide()
        if decided is None or self.call is None:
            return None
        decision, wish, limited = decided
        call, hook, report = self.call, self.hook, Report()
        if decision.kernel not in COMPILED or call.needs_grad or torch.compiler.is_compiling():
            out = self.run()
            if out is not None:
                for container in held:
                    container.take()
            return out
        options = self._options(call, wish)
        first = hook.guard.is_new(self.place, decision.kernel, call)
        if first and not self._proven(decision, call, options):
            return None
        nothing = call.q.new_empty(0)
        form = replace(call, q=nothing, k=nothing, v=nothing)  # how the result is wanted
        hold = [call.q, call.k, call.v]
        del call
        self.call = None
        for container in held:
            container.take()
        try:
            with self.timing(decision.kernel):
                out = attention_freeing(hold, report=report, **options)
        except Exception as error:
            if not hold:  # let go already
                raise KernelError(f"Sage3 Attention: {decision.kernel} failed ({one_line(error)}).") from error
            self.call = replace(form, q=hold[0], k=hold[1], v=hold[2])
            for container, tensor in zip(held, hold, strict=True):
                container.tensor = tensor
            self._failed(decision, error)
            return None
        if first and not bool(torch.isfinite(out).all()):
            raise KernelError(
                f"Sage3 Attention: {decision.kernel}'s result is not finite at {self.layer or 'a layer without a number'}: "
                "list that layer under exact_layers, or set precision to exact."
            )
        self._count(report, limited)
        return form.result(out)

    def _proven(self, decision: Decision, call: HookCall, options: dict[str, Any]) -> bool:
        """Whether a kernel does well on a few heads of a call, after which nothing will be left to fall back to."""
        part, guard = call.of_few_heads(), self.hook.guard
        try:
            out = attention(part.q, part.k, part.v, report=Report(), **options | {"mask": part.mask})
            wrong = guard.check(self.layer, decision.kernel, part, out, self.place)
        except Exception as error:  # as in run
            self._failed(decision, error)
            return False
        if wrong is not None:
            self._trouble(wrong)
            return False
        guard.seen(self.place, decision.kernel, call)
        return True

    def timing(self, kernel: str) -> AbstractContextManager[None]:
        """Time what ``kernel`` does for this call; nothing where the call could not be read."""
        if self._device is None or torch.compiler.is_compiling():
            return nullcontext()
        layer = "" if self.layer is None else self.layer.key
        return self.hook.tally.timing(layer, kernel, self._shape, self._device)

    def _decide(self) -> tuple[Decision, Precision, str] | None:
        """The kernel, its precision and why the guard gives this layer less than was wished; None: ComfyUI's attention."""
        call, hook = self.call, self.hook
        if call is None:
            return None
        described, wish, limited = describe(call), self.wish, ""
        decision = hook.decide(described, wish)
        while decision.kernel != "exact" and (limit := hook.guard.limit(self.layer, decision.kernel, call)):
            wish, limited = limit
            if wish is Precision.EXACT:
                self._leave(limited, True)
                return None
            decision = hook.decide(described, wish)
        if decision.kernel == "exact":  # then the user's own back end is as good as ours
            self._leave(limited or decision.reason, decision.fell_back or bool(limited))
            return None
        return decision, wish, limited

    def _options(self, call: HookCall, wish: Precision) -> dict[str, Any]:
        return {
            "mask": call.mask, "scale": call.scale, "enable_gqa": call.q_shape[1] != call.k_shape[1],
            "layout": call.layout, "precision": wish, "emulate": self.hook.emulate,
        }  # fmt: skip

    def _failed(self, decision: Decision, error: Exception) -> None:
        """A kernel raised ``error``: count the call as one that fell back, or raise what the user has to know."""
        call = self.call
        if isinstance(error, InputError):
            if call is not None and not call.all_finite():  # no other kernel can mend that, and a black video says nothing
                raise InputError(f"Sage3 Attention: {error}") from error
            self._leave(one_line(error), True)
            return
        if isinstance(error, torch.cuda.OutOfMemoryError) and call is not None:
            reason = self.hook.guard.no_room(decision.kernel, call)  # not again in this run: each try costs seconds
            self._trouble(reason, error)
            return
        self._trouble(f"{decision.kernel} failed ({type(error).__name__}: {one_line(error)})", error)

    def _trouble(self, reason: str, error: Exception | None = None) -> None:
        self.hook.trouble(reason, error)
        self._leave(reason, True)

    def _leave(self, reason: str, fell_back: bool) -> None:
        wished = "exact" if not fell_back and self.wish is Precision.EXACT else self.wished
        self.hook.count(self.layer, wished, "exact", reason, fell_back, self._weight)

    def _count(self, report: Report, limited: str) -> None:
        for line in report.lines():
            reason, fell_back = (limited, True) if limited else (line["reason"], line["fell_back"])
            self.hook.count(self.layer, self.wished, line["kernel"], reason, fell_back, self._weight)


def describe(call: HookCall) -> Call:
    """What ``dispatch`` wants to know of a call."""
    return Call(
        q_shape=call.q_shape,
        k_shape=call.k_shape,
        dtype=call.q.dtype,
        device_type=call.q.device.type,
        capability=capability_of(call.q.device),
        has_mask=call.mask is not None,
        needs_grad=call.needs_grad,
        mask_needs_grad=torch.is_grad_enabled() and call.mask is not None and call.mask.requires_grad,
    )


def one_line(error: Exception, limit: int = 200) -> str:
    """The start of an error's message: a reason in a report is one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 4] + " ..."
