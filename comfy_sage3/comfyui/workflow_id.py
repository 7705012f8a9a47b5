"""Which workflow a prompt came from, so that the page shows its news on that workflow's nodes and on no other's."""

from __future__ import annotations

from typing import Any

from . import routes


def workflow_of(prompt_id: str | None) -> str | None:
    """The id of the workflow whose prompt runs, as the page gave it with the prompt; None where it gave none.

    Read from the queue, not from a hidden input: a node that ComfyUI has cached is not run again for the same graph in
    another tab, and would keep the first one's.
    """
    queue = getattr(routes.running_server(), "prompt_queue", None)
    if prompt_id is None or queue is None:
        return None
    look = getattr(queue, "get_current_queue_volatile", None) or queue.get_current_queue  # the first copies nothing
    for item in look()[0]:
        if item[1] == prompt_id:
            return _id_in(item[3])
    return None


def _id_in(extra: Any) -> str | None:
    """``extra["extra_pnginfo"]["workflow"]["id"]``, which comes from whoever queued the prompt."""
    for key in ("extra_pnginfo", "workflow", "id"):
        extra = extra.get(key) if isinstance(extra, dict) else None
    return extra if isinstance(extra, str) and 0 < len(extra) <= 100 else None
