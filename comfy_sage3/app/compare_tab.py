"""The Compare tab: what to draw and with which two sides; a run that streams; its result; the blind test."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import gradio as gr
from gradio.context import Context

from ..compare.command import PROMPT
from ..compare.engine import Engine, Request, WorkflowRequest
from ..compare.measure import Comparison
from ..compare.output import enlarged
from ..compare.tables import side_title
from ..demo.prompts import ATTRIBUTES, BACKGROUNDS, FILLERS, SYNONYMS
from ..errors import InputError, Sage3Error
from . import form, kept, words
from .blind import VOTES, Trial, Votes, pair_name
from .runs import Stops, plain, told, watch
from .services import EMBEDDED, GPU, Services
from .widgets import player_data, uri, widget

WAITING = "waiting for its turn"
BLIND_HELP = (
    "The two sides are shown in an order that is drawn anew for every vote and known to the server alone. "
    "Which one is A? Votes are kept in the out folder."
)


def public(services: Services, handler: Callable[..., Any]) -> Callable[..., Any]:
    """``handler`` with its errors as sentences on the page, and nothing else of them."""

    @wraps(handler)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except gr.Error:
            raise
        except Sage3Error as error:
            raise gr.Error(str(error), print_exception=False) from None
        except Exception as error:
            raise gr.Error(told(services, error)) from error

    return guarded


def view(comparison: Comparison, key: str, labels: tuple[str, str] | None = None, swap: bool = False) -> dict[str, Any]:
    """The player's data. ``swap`` shows B first; ``labels`` in place of the sides' own names."""
    m = comparison.metrics
    order = ("b", "a") if swap else ("a", "b")
    names = labels or (side_title(m["sides"][order[0]]), side_title(m["sides"][order[1]]))
    videos = (comparison.videos[order[0]], comparison.videos[order[1]])
    return player_data(key, videos, names, m["quality"]["end_to_end"]["a_vs_b"])


class CompareTab:
    """The tab's handlers; ``build`` puts its parts on the page and ties them together."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.stops = Stops(services.limits.queue)
        self.votes = Votes(services.out)

    # What the page asks for.

    def result(self, name: str) -> tuple[Any, ...]:
        """Updates of (verdict, player, slider, numbers, tally, run name) for a kept run."""
        return self._shown(kept.load(name, self.services.out), name)

    def first(self) -> tuple[Any, ...]:
        """The newest run, or the recorded one, for a page that is opened."""
        try:
            return self.result(kept.latest(self.services.out))
        except InputError:  # a damaged folder must not keep the page from opening
            return self.result(kept.RECORDED)

    def _shown(self, comparison: Comparison, name: str) -> tuple[Any, ...]:
        m = comparison.metrics
        still = len(comparison.videos["a"]) == 1
        pictures = tuple(enlarged(comparison.videos[key])[0] for key in ("a", "b")) if still else None
        return (
            words.verdict(m),
            view(comparison, name),
            gr.update(value=pictures, visible=still, label=" | ".join(side_title(m["sides"][k]) for k in ("a", "b"))),
            words.numbers(m),
            self.tally(m),
            name,
        )

    def ask(self, request: gr.Request) -> tuple[Any, ...]:
        """A run was asked for: it may be stopped from now on."""
        self.stops.ask(str(request.session_hash))
        waiting = {"doing": WAITING, "fraction": 0, "seconds": 0, "running": True, "failed": False, "sides": {}}
        return waiting, gr.update(interactive=False), gr.update(interactive=True)

    def run(
        self,
        prompt: str,
        negative: str,
        seed: float,
        steps: float,
        cfg: float,
        size: str,
        frames: float,
        a: str,
        b: str,
        plan_a: str | None,
        plan_b: str | None,
        saved_a: str,
        saved_b: str,
        repeats: float,
        engine: str,
        server: str,
        workflow: str,
        uploaded: str | None,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        """Both sides, streamed: (progress, verdict, player, slider, numbers, tally, run name)."""
        session = str(request.session_hash)
        stop = self.stops.take(session)
        same = (gr.skip(),) * 6
        try:
            name = form.address(engine, server, self.services)
            served = name != EMBEDDED
            first = form.side("A", a, plan_a, saved_a, served)
            second = form.side("B", b, plan_b, saved_b, served)
            count = form.repeats(repeats, self.services.limits)
            given = form.workflow(workflow, uploaded) if served else None
            open_engine: Callable[[], Engine]
            if given:
                asked: Request = WorkflowRequest.of(given)
                first, second = form.as_given(first, given), form.as_given(second, given)
                open_engine = partial(self.services.open_workflow, name, given)
            else:
                asked = form.request(prompt, negative, seed, steps, cfg, size, frames)
                open_engine = partial(self.services.open_engine, name)
            failed = ""
            keep = partial(kept.keep, out=self.services.out)
            for told_now in watch(self.services, open_engine, asked, first, second, count, stop, keep):
                if isinstance(told_now, tuple):
                    yield (gr.skip(), *self._shown(*told_now))
                else:
                    failed = "" if told_now.stopped else told_now.failed
                    yield (plain(told_now, uri), *same)
            if failed:
                raise gr.Error(failed, print_exception=False)
        except Sage3Error as error:
            raise gr.Error(str(error), print_exception=False) from None
        finally:
            self.stops.drop(session, stop)

    def stop(self, request: gr.Request) -> str:
        """Stop this visitor's run between two steps."""
        return "stopping" if self.stops.stop(str(request.session_hash)) else "nothing runs"

    def finished(self, progress: Any) -> tuple[Any, ...]:
        """The buttons as before; a run that never got its turn leaves no trace."""
        stale = isinstance(progress, dict) and progress.get("doing") == WAITING
        return None if stale else gr.skip(), gr.update(interactive=True), gr.update(interactive=False)

    def left(self, request: gr.Request) -> None:
        """The visitor's tab was closed."""
        self.stops.leave(str(request.session_hash))

    # The blind test.

    def tally(self, m: dict[str, Any]) -> list[words.Block]:
        """Votes so far on this pair of sides."""
        pair = pair_name(m)
        return [{"kind": "heading", "text": f"Votes: {pair}"}, {"kind": "list", "items": self.votes.tally(pair).sentences()}]

    def blind_start(self, name: str) -> tuple[Any, ...]:
        """A new showing: (player, slider, trial, says, vote row, reveal)."""
        comparison = kept.load(name, self.services.out)
        trial = Trial.shuffled(name)
        data = view(comparison, f"blind-{secrets.token_hex(6)}", ("First", "Second"), swap=not trial.a_first)
        wished = comparison.metrics["sides"]["a"]["precision"]
        says = [{"kind": "text", "text": f"Which of the two is A ({wished})?"}]
        return data, gr.update(visible=False), trial, says, gr.update(visible=True), gr.update(visible=False)

    def blind_vote(self, vote: str, trial: Trial | None) -> tuple[Any, ...]:
        """Keep a vote: (trial, says, tally, vote row, reveal)."""
        if vote not in VOTES:
            raise InputError(f"A vote is one of {', '.join(VOTES)}.")
        if not isinstance(trial, Trial) or trial.voted:
            raise InputError("There is nothing to vote on: begin a new showing.")
        trial = Trial(trial.run, trial.a_first, vote)
        m = kept.load(trial.run, self.services.out).metrics
        self.votes.add(pair_name(m), trial)
        says = [{"kind": "text", "text": f"Your vote is kept: {vote}. Reveal the sides, or look at another showing."}]
        return trial, says, self.tally(m), gr.update(visible=False), gr.update(visible=True)

    def blind_reveal(self, trial: Trial | None) -> tuple[Any, ...]:
        """Which was which: (player, says)."""
        if not isinstance(trial, Trial) or not trial.voted:
            raise InputError("Vote first: what is revealed cannot be voted on.")
        comparison = kept.load(trial.run, self.services.out)
        order = ("a", "b") if trial.a_first else ("b", "a")
        titles = [side_title(comparison.metrics["sides"][key]) for key in order]
        labels = (f"First was {titles[0]}", f"Second was {titles[1]}")
        outcome = {True: "Right", False: "Wrong", None: "Undecided"}[trial.right]
        says = [
            {
                "kind": "text",
                "text": f"{outcome}: the {'first' if trial.a_first else 'second'} was A, {titles[order.index('a')]}.",
            }
        ]
        return view(comparison, f"reveal-{secrets.token_hex(6)}", labels, swap=not trial.a_first), says

    def blind_end(self, name: str) -> tuple[Any, ...]:
        """Back to the open comparison: (player, slider, trial, says, vote row, reveal)."""
        _, player, slider, *_ = self.result(name)
        return player, slider, None, None, gr.update(visible=False), gr.update(visible=False)

    # The page.

    def build(self) -> None:
        """Inside an open gr.Tab."""
        guard = partial(public, self.services)
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                progress = widget("progress", elem_id="progress")
                verdict = widget("blocks", elem_id="verdict")
                slider = gr.ImageSlider(
                    format="png", visible=False, interactive=False, elem_id="still", buttons=["fullscreen"], max_height=640
                )
                player = widget("player", elem_id="player")
                blind = self._blind_parts()
            with gr.Column(scale=3, min_width=300):
                inputs, run_button, stop_button = self._form()
        numbers = widget("blocks", elem_id="numbers")
        run_name, trial = gr.State(kept.RECORDED), gr.State(None)
        result = [verdict, player, slider, numbers, blind["tally"], run_name]

        gr.on(
            [run_button.click],
            guard(self.ask),
            None,
            [progress, run_button, stop_button],
            concurrency_limit=None,
            api_visibility="private",
        ).success(
            self.run,
            inputs,
            [progress, *result],
            concurrency_id=GPU,
            concurrency_limit=1,
            show_progress="hidden",
            api_name="compare",
        ).then(self.finished, progress, [progress, run_button, stop_button], queue=False, api_visibility="private")
        answer = gr.Textbox(visible=False)
        stop_button.click(self.stop, None, answer, queue=False, show_progress="hidden", api_name="stop")

        blind_view = [player, slider, trial, blind["says"], blind["votes"], blind["reveal"]]
        for button, name in ((blind["start"], "blind_start"), (blind["again"], "blind_again")):
            button.click(
                guard(self.blind_start), run_name, blind_view, concurrency_limit=None, show_progress="hidden", api_name=name
            )
        for button, vote in zip(blind["buttons"], VOTES, strict=True):
            button.click(
                guard(partial(self.blind_vote, vote)),
                trial,
                [trial, blind["says"], blind["tally"], blind["votes"], blind["reveal"]],
                concurrency_limit=None,
                show_progress="hidden",
                api_name=f"blind_vote_{vote.replace(' ', '_')}",
            )
        blind["show"].click(
            guard(self.blind_reveal),
            trial,
            [player, blind["says"]],
            concurrency_limit=None,
            show_progress="hidden",
            api_name="blind_reveal",
        )
        blind["end"].click(
            guard(self.blind_end),
            run_name,
            blind_view,
            concurrency_limit=None,
            show_progress="hidden",
            api_visibility="private",
        )
        page = Context.root_block
        assert page is not None, "build is called inside an open gr.Blocks"
        page.load(guard(self.first), None, result, queue=False, show_progress="hidden", api_visibility="private")
        page.unload(self.left)

    def _form(self) -> tuple[list[Any], gr.Button, gr.Button]:
        services, choices = self.services, [(text, key) for key, text in form.CHOICES.items()]
        prompt = gr.Textbox(PROMPT, label="Prompt", lines=2, max_length=500, elem_id="prompt")
        groups = [[name, list(values)] for name, values in {**ATTRIBUTES, "background": BACKGROUNDS}.items()]
        words_ = {"target": "prompt", "groups": groups, "synonyms": SYNONYMS, "fillers": sorted(FILLERS)}
        widget("complete", words_, elem_id="words")
        with gr.Row():
            a = gr.Dropdown(choices, value="exact", label="Side A", elem_id="side-a", min_width=130)
            b = gr.Dropdown(choices, value="fp4", label="Side B", elem_id="side-b", min_width=130)
        with gr.Row():
            plan_a = gr.File(label="Plan for A (.json)", file_types=[".json"], visible=False, height=110)
            plan_b = gr.File(label="Plan for B (.json)", file_types=[".json"], visible=False, height=110)
            saved_a = gr.Textbox(label="Plan for A, saved on the server", visible=False, max_length=80)
            saved_b = gr.Textbox(label="Plan for B, saved on the server", visible=False, max_length=80)
        with gr.Row():
            seed = gr.Number(1, label="Seed", precision=0, minimum=0, elem_id="seed", min_width=110)
            next_seed = gr.Button("Next seed", elem_id="next-seed", min_width=90)
        with gr.Row():
            size = gr.Dropdown(list(form.SIZES), value="128x128", label="Size", allow_custom_value=True, min_width=110)
            frames = gr.Dropdown(list(form.FRAMES), value=17, label="Frames", allow_custom_value=False, min_width=90)
        steps = gr.Slider(1, 100, 20, step=1, label="Steps", elem_id="steps")
        with gr.Row():
            run_button = gr.Button("Compare", variant="primary", elem_id="run")
            stop_button = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop")
        with gr.Accordion("More", open=False):
            negative = gr.Textbox("", label="Negative prompt", max_length=500)
            cfg = gr.Slider(1, 20, 3, step=0.5, label="Guidance (1 is off)")
            repeats = gr.Slider(1, services.limits.repeats, 1, step=1, label="Timed runs of each side")
        with gr.Accordion("Engine", open=services.engine != EMBEDDED):
            served = services.engine != EMBEDDED
            engine = gr.Radio(
                [("The bundled model, in this process", EMBEDDED), ("A ComfyUI server", "server")],
                value="server" if served else EMBEDDED,
                label="Engine",
            )
            server = gr.Textbox(
                services.engine if served else "http://127.0.0.1:8188",
                label="Address of the ComfyUI server",
                max_length=200,
                interactive=not services.mask_errors,
                visible=served,
            )
            workflow = gr.Dropdown(
                [form.BUNDLED_GRAPH, *form.workflows()],
                value=form.BUNDLED_GRAPH,
                label="Workflow (its Sage3 Attention node is set, the rest stays as it is)",
                visible=served,
            )
            uploaded = gr.File(
                label="Or your own, exported with Export (API)", file_types=[".json"], visible=served, height=110
            )

        def shown(a: str, b: str, engine: str) -> tuple[Any, ...]:
            at_server, planned = engine != EMBEDDED, (a == form.PLANNED, b == form.PLANNED)
            files = [gr.update(visible=wanted and not at_server) for wanted in planned]
            names = [gr.update(visible=wanted and at_server) for wanted in planned]
            return (*files, *names, *[gr.update(visible=at_server)] * 3)

        gr.on(
            [a.change, b.change, engine.change],
            shown,
            [a, b, engine],
            [plan_a, plan_b, saved_a, saved_b, server, workflow, uploaded],
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
        next_seed.click(
            public(services, lambda seed: (form.whole("seed", seed) + 1) % 2**53),
            seed,
            seed,
            concurrency_limit=None,
            show_progress="hidden",
            api_visibility="private",
        )
        inputs = [prompt, negative, seed, steps, cfg, size, frames, a, b, plan_a, plan_b, saved_a, saved_b]
        return [*inputs, repeats, engine, server, workflow, uploaded], run_button, stop_button

    def _blind_parts(self) -> dict[str, Any]:
        with gr.Accordion("Blind test: can you tell which is which?", open=False, elem_id="blind"):
            gr.Markdown(BLIND_HELP)
            says = widget("blocks", elem_id="blind-says")
            with gr.Row(visible=False) as votes:
                buttons = [gr.Button(text, min_width=90) for text in ("The first is A", "The second is A", "I cannot tell")]
            with gr.Row(visible=False) as reveal:
                show = gr.Button("Reveal", min_width=90)
                again = gr.Button("Another showing", min_width=90)
            with gr.Row():
                start = gr.Button("Begin", min_width=90, elem_id="blind-start")
                end = gr.Button("End the test", min_width=90)
            tally = widget("blocks", elem_id="tally")
        return {
            "says": says,
            "votes": votes,
            "buttons": buttons,
            "reveal": reveal,
            "show": show,
            "again": again,
            "start": start,
            "end": end,
            "tally": tally,
        }


def build(services: Services) -> None:
    """Inside an open gr.Tab."""
    CompareTab(services).build()
