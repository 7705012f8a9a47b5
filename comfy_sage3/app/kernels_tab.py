"""The Kernels tab: what this machine can run, the attention benchmark on its GPU, and what was recorded on others."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import gradio as gr

from .. import doctor
from ..kernels import describe
from ..study import benchmark, recorded
from ..study.plots import benchmark_plot
from .compare_tab import public
from .services import GPU, Services
from .study_view import picture
from .widgets import widget
from .words import Block

VALUES = {
    "times the speed of SDPA cuDNN": "ratio",
    "TFLOPS": "tflops",
    "relative L1 error": "relative_l1",
}
LOG_LINES = 12
NONE = "No recorded results came with this package."


class KernelsTab:
    """The tab's handlers."""

    def __init__(self, services: Services) -> None:
        self.services = services

    def machine(self) -> list[Block]:
        """The doctor's findings. Where there is a GPU this builds its kernels, as any first use does."""
        with self.services.gpu:
            found = doctor.examine()
        return machine_blocks(found, hide_paths=self.services.mask_errors)

    def measure(self, groups: list[str]) -> Iterator[tuple[Any, ...]]:
        """The benchmark, streamed: (words, plots)."""
        lines: list[str] = []
        with self.services.gpu:
            for told in benchmark.measure(groups):
                if isinstance(told, dict):
                    yield result_blocks(told, "ratio", "Measured here, now"), plots_of(told)
                elif told:
                    lines = [*lines, told][-LOG_LINES:]
                    yield [{"kind": "code", "text": "\n".join(lines)}], gr.skip()

    def recorded(self, device: str, value: str) -> tuple[Any, ...]:
        """One recorded GPU: (words, plots)."""
        found = next((r for r in recorded.recorded() if r["device"] == device), None)
        if found is None:
            return [{"kind": "text", "text": NONE}], None
        said = f"Recorded on another machine, not measured here: {found['when']}"
        return result_blocks(found, VALUES.get(value, "ratio"), said), plots_of(found)

    def build(self) -> None:
        """Inside an open gr.Tab."""
        guard = partial(public, self.services)
        quiet: dict[str, Any] = {"show_progress": "minimal"}
        gr.Markdown("### This machine")
        machine = widget("blocks", [{"kind": "text", "text": _short()}], elem_id="machine")
        examine = gr.Button("Examine this machine", elem_id="examine")
        examine.click(
            guard(self.machine), None, machine, concurrency_id=GPU, concurrency_limit=1, api_name="kernels_machine", **quiet
        )

        gr.Markdown("### The attention benchmark on this GPU")
        problem = benchmark.why_not()
        if problem:
            widget("blocks", [{"kind": "text", "text": problem}], elem_id="benchmark")
        else:
            with gr.Row():
                groups = gr.CheckboxGroup(list(benchmark.GROUPS), value=["square", "wan", "flux"], label="Shapes of")
                start = gr.Button("Measure", variant="primary", elem_id="measure", min_width=110)
                stop = gr.Button("Stop", variant="stop", min_width=80)
            words, plots = widget("blocks", elem_id="benchmark"), widget("plots", elem_id="benchmark-plots")
            running = start.click(
                _streamed(self.services, self.measure), groups, [words, plots],
                concurrency_id=GPU, concurrency_limit=1, api_name="kernels_measure", **quiet,
            )  # fmt: skip
            stop.click(None, None, None, cancels=[running])

        gr.Markdown("### Recorded on other GPUs")
        devices = [r["device"] for r in recorded.recorded()]
        first = devices[-1] if devices else ""
        begin = self.recorded(first, next(iter(VALUES)))
        with gr.Row():
            device = gr.Dropdown(devices, value=first or None, label="GPU", elem_id="recorded-gpu")
            value = gr.Dropdown(list(VALUES), value=next(iter(VALUES)), label="Numbers", elem_id="recorded-value")
        words, plots = widget("blocks", begin[0], elem_id="recorded"), widget("plots", begin[1], elem_id="recorded-plots")
        gr.on(
            [device.input, value.input], guard(self.recorded), [device, value], [words, plots],
            show_progress="hidden", api_name="kernels_recorded",
        )  # fmt: skip


def machine_blocks(found: dict[str, Any], hide_paths: bool = False) -> list[Block]:
    """The doctor's findings; ``hide_paths`` for visitors, whom this machine's folders do not concern."""
    versions = found["versions"]
    said = f"comfy_sage3 {versions['comfy_sage3']}, torch {versions['torch']}, Python {versions['python']}"
    blocks: list[Block] = [{"kind": "quiet", "text": f"{said}; {versions['platform']}"}]
    for device in found["devices"]:
        items = [
            f"{x['precision']} runs as {x['kernel']}{' (falls back)' if x['fell_back'] else ''}: {x['reason']}"
            for x in found["decisions"]
            if x["device"] == device["device"]
        ]
        blocks.append({"kind": "heading", "text": f"{device['device']}: {device['description']}"})
        blocks.append({"kind": "list", "items": items})
    tests = [
        [t["kernel"] or t["precision"], t["device"], "failed: " + t["error"] if t["error"] else "passed"]
        + (["", ""] if t["error"] else [f"{t['cosine']:.6f}", f"{t['relative_l1']:.6f}"])
        for t in found["self_test"]
    ]
    heads = ["kernel", "device", "self-test", "cosine", "relative L1"]
    blocks.append({"kind": "table", "title": "Self-test against exact attention", "heads": heads, "rows": tests})
    if not hide_paths:
        blocks.append({"kind": "code", "text": "\n".join(describe.lines(found["kernels"]))})
    return blocks


def result_blocks(found: dict[str, Any], value: str, where: str) -> list[Block]:
    """One result of the benchmark as a table, named for where it is from."""
    heads, rows = recorded.table(found, value)
    kind = next(name for name, key in VALUES.items() if key == value)
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return [
        {"kind": "banner", "text": where},
        {"kind": "table", "title": f"{found['device']}: {kind}", "heads": heads, "rows": rows},
        {"kind": "quiet", "text": f"Whole calls, quantisation included; {versions}; {found['command']}"},
    ]


def plots_of(found: dict[str, Any]) -> list[dict[str, str]] | None:
    """The bars against SDPA."""
    one = picture(benchmark_plot, found, f"{found['device']}: times the speed of SDPA cuDNN, quantisation included")
    return [one] if one else None


def _short() -> str:
    """What is known without examining anything."""
    import torch

    if not torch.cuda.is_available():
        return (
            "No CUDA GPU that PyTorch can use: low-bit attention is emulated here, which shows its quality, not its speed."
        )
    return f"{torch.cuda.get_device_name(0)}. Examine it to build its kernels and test them."


def _streamed(services: Services, handler: Any) -> Any:
    """``public`` for a handler that yields."""

    def guarded(*args: Any) -> Iterator[Any]:
        turns = public(services, handler)(*args)
        step = public(services, lambda: next(turns, None))
        try:
            while (told := step()) is not None:
                yield told
        finally:
            turns.close()

    return guarded


def build(services: Services) -> None:
    """Inside an open gr.Tab."""
    KernelsTab(services).build()
