"""The History tab: every run in the out folder, opened again, set side by side, deleted."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr
from gradio.context import Context

from ..compare import output
from ..errors import InputError
from ..study.report import count_of
from ..study.results import speed_text
from ..study.store import Store
from . import study_view, words
from .compare_tab import public, view
from .services import Services
from .widgets import widget
from .words import Block

MOST_SHOWN = 200  # runs in the list
MOST_CHOSEN = 20
MOST_ROWS = 200
HELP = "Every run is a folder of files in the out folder: it is here again after a restart, and it can be moved by hand."
KINDS = {"foreign": "not a run of this app", "damaged": "damaged"}


class HistoryTab:
    """The tab's handlers; names are folders' names, never paths."""

    def __init__(self, services: Services) -> None:
        self.services = services
        services.history.clean()

    def listing(self, chosen: list[str] | None = None) -> tuple[Any, ...]:
        """The list anew: (words, the choices)."""
        entries = self.services.history.list()
        ours = [e for e in entries if e.ours][:MOST_SHOWN]
        rows = [[e.id, e.when[:16].replace("T", " "), e.kind, e.state, e.title] for e in ours]
        heads = ["run", "when (UTC)", "kind", "state", "of"]
        blocks: list[Block] = [{"kind": "table", "title": "Runs, newest first", "heads": heads, "rows": rows}]
        if not rows:
            blocks = [{"kind": "text", "text": "There are no runs yet: compare something, or make a sweep."}]
        others = [f"{e.id}: {KINDS[e.kind]}, {e.title}" for e in entries if not e.ours][:MOST_SHOWN]
        if others:
            listed = [{"kind": "list", "items": others}]
            said = f"{count_of(len(others), 'other folder')} in the out folder"
            blocks.append({"kind": "more", "text": said, "blocks": listed})
        names = [(f"{e.id}: {e.title}"[:120], e.id) for e in ours]
        kept = [name for name in chosen or [] if name in {v for _, v in names}]
        return blocks, gr.update(choices=names, value=kept)

    def open(self, chosen: list[str]) -> tuple[Any, ...]:
        """One run as it was: (words above, player, plots, words below)."""
        names = self._chosen(chosen)
        if len(names) != 1:
            raise InputError(f"{len(names)} runs are chosen: choose the one to open, or compare them.")
        found = self.services.history.open(names[0])
        if isinstance(found, Store):
            results, any_done = study_view.found_in(found)
            pictures = study_view.pictures(found, results) if any_done else None
            return study_view.summary(results), gr.update(visible=False, value=None), pictures, study_view.details(results)
        comparison = output.read(self.services.history.folder(names[0]))
        player = gr.update(value=view(comparison, f"history-{names[0]}"), visible=True)
        return words.verdict(comparison.metrics), player, None, words.numbers(comparison.metrics)

    def compare(self, chosen: list[str]) -> tuple[Any, ...]:
        """The chosen runs in one table: (words above, player, plots, words below)."""
        rows = self.services.history.compare(self._chosen(chosen))
        heads = ["run", "prompt", "seed", "size", "steps", "A", "B", "PSNR", "SSIM", "attention error", "speed-up"]
        lines = [compared(row) for row in rows]
        blocks: list[Block] = [{"kind": "table", "title": "The chosen runs", "heads": heads, "rows": lines[:MOST_ROWS]}]
        if len({(r["prompt"], r["seed"], r["size"], r["steps"]) for r in rows}) > 1:
            said = "These runs are of different prompts, seeds or sizes: their PSNR does not say which precision is closer."
            blocks.append({"kind": "quiet", "text": said})
        if len(lines) > MOST_ROWS:
            blocks.append({"kind": "quiet", "text": f"The first {MOST_ROWS} of {len(lines)} comparisons."})
        return blocks, gr.update(visible=False, value=None), None, None

    def delete(self, chosen: list[str], sure: bool) -> tuple[Any, ...]:
        """Delete the chosen runs: (words, the choices, the box that makes sure)."""
        names = self._chosen(chosen)
        if sure is not True:
            raise InputError(f"Deleting {len(names)} runs cannot be undone: tick the box to delete them.")
        for name in names:
            self.services.history.delete(name)
        return *self.listing(), False

    def _chosen(self, chosen: Any) -> list[str]:
        names = [chosen] if isinstance(chosen, str) else chosen
        if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
            raise InputError("No run is chosen: choose one or more from the list.")
        if len(names) > MOST_CHOSEN:
            raise InputError(f"{len(names)} runs are chosen: choose at most {MOST_CHOSEN}.")
        return list(dict.fromkeys(names))

    def build(self) -> None:
        """Inside an open gr.Tab."""
        guard = partial(public, self.services)
        options: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None}
        gr.Markdown(HELP)
        chosen = gr.Dropdown([], value=[], multiselect=True, label="Runs", elem_id="history-runs")
        with gr.Row():
            open_button = gr.Button("Open", min_width=90, elem_id="history-open")
            compare_button = gr.Button("Compare", min_width=90, elem_id="history-compare")
            refresh = gr.Button("Look again", min_width=90, elem_id="history-refresh")
        with gr.Row():
            sure = gr.Checkbox(False, label="Delete the chosen runs for good", elem_id="history-sure", min_width=200)
            delete_button = gr.Button("Delete", min_width=90, elem_id="history-delete")
        above = widget("blocks", elem_id="history-above")
        player = widget("player", visible=False, elem_id="history-player")
        plots = widget("plots", elem_id="history-plots")
        below = widget("blocks", elem_id="history-below")
        listing = widget("blocks", elem_id="history-list")
        shown = [above, player, plots, below]
        open_button.click(guard(self.open), chosen, shown, api_name="history_open", **options)
        compare_button.click(guard(self.compare), chosen, shown, api_name="history_compare", **options)
        delete_button.click(
            guard(self.delete), [chosen, sure], [listing, chosen, sure], api_name="history_delete", **options
        )
        refresh.click(guard(self.listing), chosen, [listing, chosen], api_name="history_list", **options)
        page = Context.root_block
        assert page is not None, "build is called inside an open gr.Blocks"
        quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        page.load(guard(self.listing), None, [listing, chosen], **quiet)
        if isinstance(Context.block, gr.Tab):
            Context.block.select(guard(self.listing), chosen, [listing, chosen], **quiet)


def compared(row: dict[str, Any]) -> list[str]:
    """One comparison's line in a table of many."""
    psnr = "identical" if row["identical"] else f"{row['psnr']:.1f} dB"
    error = "n/a" if row.get("self_relative_l1") is None else f"{row['self_relative_l1']:.2g}"
    said = [row["run"], row["prompt"], str(row["seed"]), row["size"], str(row["steps"]), row["a"], row["b"], psnr]
    return [*said, f"{row['ssim']:.4f}", error, speed_text(row)]


def build(services: Services) -> None:
    """Inside an open gr.Tab."""
    HistoryTab(services).build()
