"""What the node says after sampling: the text, and the event that carries it to the browser."""

from __future__ import annotations

import logging

from .override import Hook

EVENT = "sage3.status"
NEVER_CALLED = (
    "0 attention calls seen: this model never called ComfyUI's attention hook, so nothing was accelerated. "
    "Its own code, or another node's patch, computes attention elsewhere."
)
log = logging.getLogger("comfy_sage3")


def text(hook: Hook) -> str:
    """A few plain lines: calls accelerated, calls that fell back, and why."""
    lines = hook.report.lines()
    if not lines:
        return NEVER_CALLED
    total = sum(x["calls"] for x in lines)
    kept = total - hook.report.accelerated - hook.report.fell_back
    head = (
        f"{total} attention calls: {hook.report.accelerated} accelerated, {hook.report.fell_back} fell back"
    )
    if kept:
        head += f", {kept} left exact"
    return "\n".join([head, *(f"{x['calls']} x {x['kernel']}: {x['reason']}" for x in lines)])


def publish(hook: Hook) -> None:
    """Log the outcome once and send it to the browsers that watch; silent where there is no server."""
    message = text(hook)
    log.log(logging.INFO if hook.report.lines() else logging.WARNING, "Sage3 Attention: %s", message)
    try:
        from server import PromptServer
    except ImportError:  # ComfyUI's nodes used without its server
        return
    server = getattr(PromptServer, "instance", None)
    if server is None or hook.node_id is None:
        return
    payload = {
        "node": hook.node_id,
        "text": message,
        "accelerated": hook.report.accelerated,
        "fell_back": hook.report.fell_back,
        "lines": hook.report.lines(),
    }
    try:
        server.send_sync(EVENT, payload)
    except Exception as error:  # a status that cannot be shown must not lose a finished video
        log.warning("Sage3 Attention: the status could not be sent to the browser: %s", error)


def current_prompt() -> str | None:
    """The id of the prompt being executed, or None outside ComfyUI's executor."""
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    return None if context is None else context.prompt_id
