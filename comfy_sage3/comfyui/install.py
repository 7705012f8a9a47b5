"""The hook on a model: its override in the slot, and the wrappers that tell it where the sampling is.

Installed on a clone as ``transformer_options["optimized_attention_override"]``, one slot for every node. A node that
comes later and throws ours away is taken under ours again, for the step at hand; one that keeps ours is left on top.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .chain import leads_to
from .hook import Hook
from .override import make_override

KEY = "sage3"  # names our wrappers and our attachment on the model
SLOT = "optimized_attention_override"
OPTIONS = 3  # transformer_options among apply_model's arguments after x and t


def install(
    model: Any, hook: Hook, on_done: Callable[[Hook], None], prompt_id: Callable[[], str | None],
    on_step: Callable[[Hook], None] = lambda hook: None,
) -> Any:  # fmt: skip
    """A clone of ``model`` whose attention goes through ``hook``; the model itself is left alone.

    ``on_step`` is called after each step, ``on_done`` after each sampling, also one that fails; ``prompt_id`` names the
    running prompt.
    """
    from comfy.patcher_extension import WrappersMP

    model = model.clone()
    options = model.model_options["transformer_options"]
    options[SLOT] = make_override(hook, options.get(SLOT))
    on_top: dict[int, tuple[Any, Any]] = {}  # of a foreign override: itself, and ours above it

    def around_sampling(executor: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(("noise", "latent_image", "sampler", "sigmas", "denoise_mask", "callback"), args, strict=False))
        given |= kwargs
        hook.begin(prompt_id(), given.get("sampler"), given.get("sigmas"))
        counting = hook.steps.counting(given.get("callback"), lambda: on_step(hook))
        if len(args) > 5:
            args = (*args[:5], counting, *args[6:])
        else:
            kwargs["callback"] = counting
        try:
            return executor(*args, **kwargs)
        finally:
            hook.end()
            on_done(hook)

    def around_look(executor: Any, *args: Any, **kwargs: Any) -> Any:
        hook.steps.look()
        return executor(*args, **kwargs)

    def around_step(executor: Any, x: Any, t: Any, *args: Any, **kwargs: Any) -> Any:
        hook.enter_step(executor.class_obj.model_sampling, t)
        here = args[OPTIONS] if len(args) > OPTIONS else kwargs.get("transformer_options")
        if isinstance(here, dict) and not leads_to(here.get(SLOT), hook.overrides):
            above = {**here, SLOT: _above(here.get(SLOT))}
            hook.replaced += 1
            if len(args) > OPTIONS:
                args = (*args[:OPTIONS], above, *args[OPTIONS + 1 :])
            else:
                kwargs["transformer_options"] = above
        return executor(x, t, *args, **kwargs)

    def _above(foreign: Any) -> Any:
        kept = on_top.get(id(foreign))
        if kept is None:
            kept = on_top[id(foreign)] = (foreign, make_override(hook, foreign))
        return kept[1]

    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, around_sampling)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, around_look)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, around_step)
    model.set_attachments(KEY, (*hooks_of(model), hook))
    return model


def hooks_of(model: Any) -> tuple[Hook, ...]:
    """The hooks of the Sage3 Attention nodes that ``model`` went through, first to last."""
    return model.get_attachment(KEY) or ()
