"""The Study tab: make a sweep or go on with one, one progress bar, and what it has found."""

from __future__ import annotations

import logging
import queue
import re
import secrets
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context

from ..compare.command import PROMPT
from ..compare.sides import read_plan
from ..errors import InputError, Sage3Error
from ..study.run import Cancelled, Outcome
from ..study.run import run as run_sweep
from ..study.store import Store
from ..study.sweep import MAX_FILE_BYTES, Sweep, loads, parse
from . import form, study_view
from .compare_tab import public
from .memory import give_back
from .runs import TELL_SECONDS, Stops, told
from .services import EMBEDDED, GPU, Services
from .widgets import widget

log = logging.getLogger("comfy_sage3")
CHOICES = ("fp4", "int8", "int8-fast", "auto")
MOST_TEXT = 40_000  # characters of all prompts
MOST_SEEDS_TEXT = 2_000
MOST_CELLS_FOR_OTHERS = 24  # of a sweep that a visitor of a public app may run
WAITING = "waiting for its turn"
HELP = (
    "Every prompt with every seed in every precision, each against exact attention, which is made once per prompt and "
    "seed. Everything is kept in the out folder as it is finished: stop it, close the page or the app, and go on later."
)
EMPTY = "No sweep is open: describe a new one and press Make and run, or choose an earlier one. Its results appear here."


class StudyTab:
    """The tab's handlers; ``build`` puts its parts on the page and ties them together."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.stops = Stops(services.limits.queue)

    # What the page asks for.

    def make(
        self,
        name: Any,
        prompts: Any,
        seeds: Any,
        precisions: Any,
        plans: Any,
        size: Any,
        frames: Any,
        steps: Any,
        cfg: Any,
        repeats: Any,
        file: Any,
    ) -> str:
        """A new sweep's folder, by its name, from the form or from an uploaded sweep file."""
        sweep = self._read(Path(file)) if file else self._typed(
            name, prompts, seeds, precisions, plans, size, frames, steps, cfg, repeats
        )  # fmt: skip
        self._allow(sweep)
        folder = f"{datetime.now():%Y%m%d-%H%M%S}-sweep-{secrets.token_hex(2)}"
        return Store.create(self.services.out / folder, sweep).out.name

    def run(self, name: str, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """Run or go on with a sweep, streamed: (progress, summary, plots, details, csv, json, report)."""
        session = str(request.session_hash)
        stop = self.stops.take(session)
        nothing = (gr.skip(),) * 6
        try:
            store = self._store(name)
            self._allow(store.sweep)
            asked_to_stop = False
            for state, news in self._watch(store, stop):
                asked_to_stop = asked_to_stop or stop.is_set()
                told_now = state if state["running"] else state | {"doing": "drawing the plots", "running": True}
                words = study_view.summary(study_view.found_in(store)[0]) if news else gr.skip()
                yield (told_now, words, *nothing[1:])
            yield (state, *self.show(name))
            if state["failed"] and not asked_to_stop:
                raise gr.Error(state["doing"], print_exception=False)
        except Sage3Error as error:
            raise gr.Error(str(error), print_exception=False) from None
        finally:
            self.stops.drop(session, stop)

    def show(self, name: str) -> tuple[Any, ...]:
        """What a sweep has found so far: (summary, plots, details, csv, json, report)."""
        store = self._store(name)
        found, any_done = study_view.found_in(store)
        pictures = study_view.pictures(store, found) if any_done else None
        files = study_view.files(store)
        return (
            study_view.summary(found),
            pictures,
            study_view.details(found),
            *(gr.update(value=path, interactive=True) for path in files),
        )

    def sweeps(self, chosen: str | None = None) -> Any:
        """The sweeps in the out folder, newest first, as choices."""
        found = [(f"{e.id} ({e.state}): {e.title}", e.id) for e in self.services.history.list() if e.kind == "sweep"]
        value = chosen if chosen in [v for _, v in found] else (found[0][1] if found else None)
        return gr.update(choices=found, value=value)

    def ask(self, request: gr.Request) -> tuple[Any, ...]:
        """A run was asked for: it may be stopped from now on."""
        self.stops.ask(str(request.session_hash))
        return _state(WAITING, 0.0, 0.0), *[gr.update(interactive=False)] * 2, gr.update(interactive=True)

    def stop(self, request: gr.Request) -> str:
        """Stop this visitor's sweep between two steps."""
        return "stopping" if self.stops.stop(str(request.session_hash)) else "nothing runs"

    def finished(self, progress: Any) -> tuple[Any, ...]:
        """The buttons as before; a run that never got its turn leaves no trace."""
        stale = isinstance(progress, dict) and progress.get("doing") == WAITING
        return None if stale else gr.skip(), *[gr.update(interactive=True)] * 2, gr.update(interactive=False)

    def left(self, request: gr.Request) -> None:
        """The visitor's tab was closed."""
        self.stops.leave(str(request.session_hash))

    # How it is done.

    def _typed(self, name: Any, prompts: Any, seeds: Any, precisions: Any, plans: Any, *rest: Any) -> Sweep:
        size, frames, steps, cfg, repeats = rest
        lines = [line.strip() for line in form._text("list of prompts", prompts, MOST_TEXT).splitlines()]
        count = form.repeats(repeats, self.services.limits)
        one = form.request(PROMPT, "", 1, steps, cfg, size, frames)  # which reads and bounds them
        data: dict[str, Any] = {
            "name": form._text("title", name, form.LONGEST).strip(),
            "prompts": [line for line in lines if line],
            "seeds": seeds_of(form._text("list of seeds", seeds, MOST_SEEDS_TEXT)),
            "precisions": list(precisions) if isinstance(precisions, (list, tuple)) else [precisions],
            "plans": [_plan(path) for path in plans or ()],
            "size": str(one.size),
            "steps": one.steps,
            "cfg": one.cfg,
            "repeats": count,
            "engine": self.services.engine,
        }
        return parse(data)

    def _read(self, path: Path) -> Sweep:
        """An uploaded sweep file; plans lie inside it, for it may name no files of this machine."""
        try:
            text = path.read_bytes()[: MAX_FILE_BYTES + 1].decode("utf-8")
        except (OSError, UnicodeDecodeError):
            raise InputError("The sweep file cannot be read: give a .json or .toml file in UTF-8.") from None
        if len(text) > MAX_FILE_BYTES:
            raise InputError(f"The sweep file is longer than {MAX_FILE_BYTES >> 20} MB: give a shorter one.")
        return parse(loads(text, path.suffix.lower()))

    def _allow(self, sweep: Sweep) -> None:
        """Raise InputError for what this app does not do for its visitors."""
        if sweep.engine != EMBEDDED:
            form.address("server", sweep.engine, self.services)
        if sweep.repeats > self.services.limits.repeats:
            form.repeats(sweep.repeats, self.services.limits)
        if self.services.mask_errors and len(sweep.cells()) > MOST_CELLS_FOR_OTHERS:
            raise InputError(f"This sweep has {len(sweep.cells())} cells: here {MOST_CELLS_FOR_OTHERS} are the most.")

    def _store(self, name: Any) -> Store:
        found = self.services.history.open(name) if isinstance(name, str) and name else None
        if not isinstance(found, Store):
            raise InputError("There is no such sweep: make one, or choose one from the list.")
        return found

    def _watch(self, store: Store, stop: threading.Event) -> Iterator[tuple[dict[str, Any], bool]]:
        """Run the sweep in a thread, yielding (state, whether a cell was finished since) a few times a second."""
        done: queue.Queue[tuple[str, Outcome | None]] = queue.Queue()
        now: dict[str, Any] = {"fraction": 0.0, "doing": "waiting for the GPU"}
        began, seen = time.monotonic(), -1

        def progress(fraction: float, doing: str) -> None:
            now.update(fraction=fraction, doing=doing)

        def work() -> None:
            try:
                with self.services.gpu:
                    outcome = run_sweep(store, self.services.open_engine, on_progress=progress, stop=stop.is_set)
                done.put((outcome.sentence, outcome))
            except Cancelled:
                done.put(("Stopped: what was finished is kept, choose the sweep again to go on.", None))
            except Sage3Error as error:
                done.put((str(error), None))
            except Exception as error:
                log.exception("A sweep failed")
                done.put((told(self.services, error), None))

        thread = threading.Thread(target=work, name="sage3-study", daemon=True)
        thread.start()
        try:
            while True:
                try:
                    said, outcome = done.get(timeout=TELL_SECONDS)
                except queue.Empty:
                    finished = sum(path.is_dir() for path in (store.out / "cells").iterdir() if path.name[0] != ".")
                    news, seen = finished != seen, finished
                    yield _state(now["doing"], now["fraction"], time.monotonic() - began), news
                    continue
                fraction = 1.0 if outcome else now["fraction"]
                failed = outcome is None and not stop.is_set()  # who asked for a stop is told of no failure
                ended = _state(said, fraction, time.monotonic() - began, running=False, failed=failed)
                yield ended, True
                return
        finally:
            stop.set()
            thread.join()
            give_back()

    # The page.

    def build(self) -> None:
        """Inside an open gr.Tab."""
        guard = partial(public, self.services)
        private: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        gr.Markdown(HELP)
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                progress = widget("progress", elem_id="study-progress")
                summary = widget("blocks", [{"kind": "text", "text": EMPTY}], elem_id="study-summary")
                plots = widget("plots", elem_id="study-plots")
                details = widget("blocks", elem_id="study-details")
                with gr.Row():
                    downloads = [
                        gr.DownloadButton(label, interactive=False, min_width=120, elem_id=f"study-{key}")
                        for key, label in (("csv", "Table (CSV)"), ("json", "Results (JSON)"), ("report", "report.html"))
                    ]
            with gr.Column(scale=3, min_width=300):
                chosen = gr.Dropdown([], label="Sweeps in the out folder, newest first", elem_id="study-sweep")
                with gr.Row():
                    resume = gr.Button("Run or go on", min_width=110, elem_id="study-resume")
                    stop_button = gr.Button("Stop", variant="stop", interactive=False, min_width=80, elem_id="study-stop")
                with gr.Accordion("A new sweep", open=True):
                    inputs, make_button = self._form()
        result = [summary, plots, details, *downloads]
        buttons = [progress, make_button, resume, stop_button]
        made = gr.State("")

        running: dict[str, Any] = {"concurrency_id": GPU, "concurrency_limit": 1, "show_progress": "hidden"}
        begun = make_button.click(guard(self.make), inputs, made, show_progress="hidden", api_name="study_make")
        listed = begun.success(guard(self.sweeps), made, chosen, queue=False, **private)
        listed.success(guard(self.ask), None, buttons, queue=False, **private).success(
            self.run, made, [progress, *result], api_visibility="private", **running
        ).then(self.finished, progress, buttons, queue=False, **private).then(guard(self.sweeps), chosen, chosen, **private)
        resume.click(guard(self.ask), None, buttons, queue=False, **private).success(
            self.run, chosen, [progress, *result], api_name="study_run", **running
        ).then(self.finished, progress, buttons, queue=False, **private).then(guard(self.sweeps), chosen, chosen, **private)
        answer = gr.Textbox(visible=False)
        stop_button.click(self.stop, None, answer, queue=False, show_progress="hidden", api_name="study_stop")
        chosen.input(guard(self.show), chosen, result, show_progress="hidden", api_name="study_show")

        page = Context.root_block
        assert page is not None, "build is called inside an open gr.Blocks"
        page.load(guard(self.sweeps), None, chosen, queue=False, **private)
        if isinstance(Context.block, gr.Tab):
            Context.block.select(guard(self.sweeps), chosen, chosen, queue=False, **private)
        page.unload(self.left)

    def _form(self) -> tuple[list[Any], gr.Button]:
        name = gr.Textbox("", label="Title (optional)", max_length=80, elem_id="study-name")
        prompts = gr.Textbox(PROMPT, label="Prompts, one a line", lines=3, max_length=MOST_TEXT, elem_id="study-prompts")
        seeds = gr.Textbox("1, 2", label="Seeds, such as 1, 2, 5-8", max_length=MOST_SEEDS_TEXT, elem_id="study-seeds")
        precisions = gr.CheckboxGroup(
            list(CHOICES), value=["fp4", "int8"], label="Against exact", elem_id="study-precisions"
        )
        with gr.Row():
            size = gr.Dropdown(list(form.SIZES), value="128x128", label="Size", allow_custom_value=True, min_width=110)
            frames = gr.Dropdown(list(form.FRAMES), value=5, label="Frames", min_width=90)
        steps = gr.Slider(1, 100, 8, step=1, label="Steps", elem_id="study-steps")
        with gr.Accordion("More", open=False):
            cfg = gr.Slider(1, 20, 3, step=0.5, label="Guidance (1 is off)")
            repeats = gr.Slider(1, self.services.limits.repeats, 1, step=1, label="Timed runs of each side")
            plans = gr.File(label="Saved plans (.json)", file_types=[".json"], file_count="multiple", height=110)
            file = gr.File(label="Or a whole sweep (.json or .toml)", file_types=[".json", ".toml"], height=110)
        button = gr.Button("Make and run", variant="primary", elem_id="study-make")
        return [name, prompts, seeds, precisions, plans, size, frames, steps, cfg, repeats, file], button


def seeds_of(text: str) -> list[int]:
    """ "1, 2, 5-8" -> [1, 2, 5, 6, 7, 8]. Raises InputError for anything else."""
    found: list[int] = []
    for part in filter(None, (p.strip() for p in re.split(r"[,;\s]+(?!-)", text))):
        match = re.fullmatch(r"(\d{1,19})(?:-(\d{1,19}))?", part, re.ASCII)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not match or high < low or high - low > 1000:
            raise InputError(f"Cannot read the seeds at {part[:40]!r}: give such as 1, 2, 5-8.")
        found += range(low, high + 1)
    return found


def _plan(path: Any) -> dict[str, Any]:
    """An uploaded plan, inside the sweep."""
    import json

    file = Path(form._text("plan", path, 4096))
    return {"name": file.stem[:80], "plan": json.loads(read_plan(file).to_json())}


def _state(doing: str, fraction: float, seconds: float, running: bool = True, failed: bool = False) -> dict[str, Any]:
    """As progress.js shows it: a sweep has no two sides."""
    state: dict[str, Any] = {"doing": doing, "fraction": fraction, "seconds": round(seconds, 1)}
    return state | {"running": running, "failed": failed, "sides": {}}


def build(services: Services) -> None:
    """Inside an open gr.Tab."""
    StudyTab(services).build()
