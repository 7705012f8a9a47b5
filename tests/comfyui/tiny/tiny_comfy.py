"""A real ComfyUI in this process: its loaders, its executor, this pack, a few nodes for tests, and a watch on attention.

    comfy = Comfy(COMFYUI, PACK, FOLDER)     # FOLDER: models, custom nodes and outputs of this run

Private parts of ComfyUI are used (the executor); what they give is what a queued prompt would.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACK = "comfy-sage3"


class Server:
    """What the executor wants of the server: somewhere to send events."""

    def __init__(self) -> None:
        self.client_id = None
        self.last_node_id = None
        self.last_prompt_id = None
        self.sockets_metadata: dict[str, Any] = {}
        self.events: list[tuple[str, Any]] = []
        self.prompt_queue = self  # ComfyUI asks it for the running tasks
        self.routes = Routes()
        self.node_replace_manager = Anything()

    def send_sync(self, event: str, data: Any, sid: Any = None) -> None:
        self.events.append((event, data))

    def send_progress_text(self, *args: Any, **kwargs: Any) -> None: ...

    def queue_updated(self) -> None: ...

    def get_current_queue_volatile(self) -> tuple[list[Any], list[Any]]:
        """What runs and what waits: prompts here never pass through a queue."""
        return [], []


class Routes:
    """Takes every route and serves none."""

    def _take(self, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        return lambda function: function

    get = post = put = patch = delete = static = view = _take


def start(comfyui: Path, folder: Path) -> None:
    """Make ComfyUI importable and let it read its command line; before any other import of it."""
    for name in ("custom_nodes", "models/diffusion_models", "models/loras", "output", "input", "temp", "user"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(comfyui))
    sys.argv = ["main.py", "--cpu", "--base-directory", str(folder), "--disable-api-nodes"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import utils.extra_config  # noqa: F401  (before the nodes, as main.py does)


class Anything:
    """Takes every call of every method."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class Comfy:
    """The executor with the stock nodes, the pack and the nodes of ``tiny_nodes``."""

    def __init__(self, pack: Path, folder: Path) -> None:
        import comfy.model_management as management
        import comfy.utils
        import execution
        import nodes
        import server

        def progress(*args: Any, **kwargs: Any) -> None:  # main.py's also looks at every step whether the user has cancelled
            management.throw_exception_if_processing_interrupted()

        comfy.utils.set_progress_bar_global_hook(progress)
        self.server = Server()
        server.PromptServer.instance = self.server
        self._nodes = nodes
        self._execution = execution
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._load(pack, folder))
        self._numbers = itertools.count()
        self.fresh()

    async def _load(self, pack: Path, folder: Path) -> None:
        if hasattr(self._nodes, "init_public_apis"):
            await self._nodes.init_public_apis()
        await self._nodes.init_builtin_extra_nodes()
        link = folder / "custom_nodes" / PACK
        link.symlink_to(pack, target_is_directory=True)
        if not await self._nodes.load_custom_node(str(link), module_parent="custom_nodes"):
            raise RuntimeError("the pack did not load")
        self.pack = str(link)

    def module(self, name: str) -> Any:
        """A module of the pack as ComfyUI loaded it, such as "reference"."""
        import importlib

        return importlib.import_module(f"{self.pack.replace('.', '_x_')}.comfy_sage3.{name}")

    def fresh(self) -> None:
        """Forget what was computed: the next prompt loads its models anew."""
        made = self._execution.PromptExecutor
        classic: dict[str, Any] = {"cache_type": self._execution.CacheType.CLASSIC}
        if "cache_args" in inspect.signature(made).parameters:  # not in 0.3.64
            classic["cache_args"] = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
        self.executor = made(self.server, **classic)

    def run(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Queue ``prompt``: {"ok", "outputs" (by node), "error" (ComfyUI's message, or None)}."""
        number = f"prompt-{next(self._numbers)}"
        return self._loop.run_until_complete(self._run(prompt, number))

    async def _run(self, prompt: dict[str, Any], number: str) -> dict[str, Any]:
        valid = await self._execution.validate_prompt(number, prompt, None)
        if not valid[0]:
            return {"ok": False, "outputs": {}, "error": {"refused": str(valid[1]), "nodes": str(valid[3])}}
        executor = self.executor
        await executor.execute_async(prompt, number, {}, valid[2])
        error = None
        for event, data in executor.status_messages:
            if event in ("execution_error", "execution_interrupted"):
                error = {"event": event} | {
                    k: str(v) for k, v in data.items() if k.startswith("exception") or k == "node_type"
                }
        outputs = executor.history_result["outputs"] if executor.success else {}
        return {"ok": executor.success, "outputs": outputs, "error": error}


class Watch:
    """Sees every call of attention that a model makes, and what exact attention would have given.

    Models hold ComfyUI's attention function by name in their own modules; the watch takes its place there, outside the
    hook, so that it needs nothing of the pack.
    """

    def __init__(self) -> None:
        from comfy.ldm.modules import attention

        self.calls: list[dict[str, Any]] = []
        self.before: Callable[[int], None] | None = None  # called with a call's number before it
        self.compare = False
        self.outs: list[Any] = []  # what the model was given, call by call
        self.instead: list[Any] | None = None  # such a list of another run, which the model is given in place of its own
        for name in ("optimized_attention", "optimized_attention_masked"):
            real = getattr(attention, name)
            seen = self._around(real)
            for module in list(sys.modules.values()):
                if getattr(module, "__name__", "").startswith("comfy.") and getattr(module, name, None) is real:
                    setattr(module, name, seen)

    def start(
        self, compare: bool = False, before: Callable[[int], None] | None = None, instead: list[Any] | None = None
    ) -> None:
        self.calls, self.compare, self.before = [], compare, before
        self.outs, self.instead = [], instead

    def _around(self, real: Callable[..., Any]) -> Callable[..., Any]:
        import torch

        def watched(q: Any, k: Any, v: Any, heads: int, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or not hasattr(q, "shape"):
                return real(q, k, v, heads, *args, **kwargs)
            if self.before is not None:
                self.before(len(self.calls))
            options = kwargs.get("transformer_options") or {}
            mask = args[0] if args else kwargs.get("mask")
            before = [t.clone() for t in (q, k, v)] if self.compare else []
            out = real(q, k, v, heads, *args, **kwargs)
            call: dict[str, Any] = {
                "block": options.get("block"),
                "block_type": options.get("block_type"),
                "block_index": options.get("block_index"),
                "step": None if options.get("sigmas") is None else float(options["sigmas"][0]),
                "q": q.shape[-2],
                "k": k.shape[-2],
                "mask": mask is not None,
            }
            if self.compare:
                call["untouched"] = all(bool((a == b).all()) for a, b in zip((q, k, v), before, strict=True))
                exact = real.__wrapped__(*before, heads, *args, **kwargs)
                call["error"] = error(out, exact, mask, heads)
                call["shape"] = out.shape == exact.shape and out.dtype == exact.dtype
            self.calls.append(call)
            if call["step"] is None:  # not of the model: a control net's own network
                return out
            if self.instead is not None:
                out = self.instead[len(self.outs)].clone()
            self.outs.append(out.clone())
            return out

        return watched


def error(out: Any, exact: Any, mask: Any, heads: int) -> float:
    """Relative distance, over the rows that may attend something: what the others become, nobody looks at."""
    if mask is not None:
        alive = mask if str(mask.dtype) == "torch.bool" else mask > -1e30
        alive = alive.any(-1).flatten()
        if out.ndim != 3 or out.shape[0] != 1 or alive.numel() not in (1, out.shape[1]):
            alive = alive.all().expand(1)
        if alive.numel() > 1:
            out, exact = out[:, alive], exact[:, alive]
    return float((out - exact).norm() / exact.norm())


def quiet() -> None:
    """ComfyUI's log to stderr; stdout carries the result alone."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
