"""docs/training.md: what was trained, what came of it, and whether the claims hold, from the results alone."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from ..files import put
from . import plots, tables
from .results import Group, groups, is_small
from .seeds import MEANING
from .settings import FORMS
from .store import results

BEGIN, END = "<!-- made by train-study report: begin -->", "<!-- made by train-study report: end -->"
IMAGES = {
    "training-loss.png": (plots.loss_plot, "Loss against steps"),
    "training-difference.png": (plots.difference_plot, "Held-out loss less that of exact attention at the same seed"),
    "training-seconds.png": (plots.seconds_plot, "Loss against seconds"),
}
SMALL = (
    "**This is a miniature**: smaller than the study is meant to be, or made on a CPU. It shows that the code runs, and "
    "says nothing about 8-bit attention."
)


def write(source: Path, page: Path) -> list[str]:
    """Write the page and its plots -> what to tell the person. ``source``: a study's folder or its study.json.

    Of a page that is there, only what lies between the two comments is replaced. Raises InputError where there are no
    results or a page without these comments.
    """
    found = groups(results(source))
    before, after = "# Training with 8-bit attention\n\n", "\n"
    if page.exists():
        text = page.read_text("utf-8")
        if text.count(BEGIN) != 1 or text.count(END) != 1:
            raise InputError(f"{page} has no place for the study: put the lines {BEGIN} and {END} where it belongs.")
        before, after = text[: text.index(BEGIN)], text[text.index(END) + len(END) :]
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    drawn = {name: png for name, (draw, _) in IMAGES.items() if (png := draw(found))}
    for name, png in drawn.items():
        put(images / name, png)
    put(page, f"{before}{BEGIN}\n{markdown(found, list(drawn))}\n{END}{after}".encode())
    return [f"wrote {page}", *(f"wrote {images / name}" for name in drawn)]


def markdown(found: list[Group], images: list[str]) -> str:
    """All that lies between the comments."""
    parts = ["## The two claims, tested", *([SMALL] if is_small(found) else [])]
    parts += ["\n".join(f"- {line}" for line in tables.conclusions(found)), _how(found), tables.settings_table(found)]
    parts += [f"![{IMAGES[name][1]}](images/{name})" for name in images]
    for group in found:
        if group.runs:
            parts += [f"### {group.setting.title}", *_before(group), tables.outcome_table(group)]
            parts += [text for text in [tables.difference_table(group)] if text]
    if any(group.paces for group in found):
        parts += ["### Time and memory of a step", "Each alone on the machine, median.", tables.pace_table(found)]
    parts += ["### What ran", _calls(), tables.call_table(found)]
    return "\n\n".join(part for part in parts if part)


def _how(found: list[Group]) -> str:
    forms = "\n".join(f"- **{form}**: {text}." for form, text in FORMS.items() if any(form in g.runs for g in found))
    commands = "\n".join([*tables.commands(found), "python -m comfy_sage3 train-study report"])
    return (
        "Runs of one setting and seed differ in the self-attention of the model and in nothing else: same weights at "
        "the start, same clips, noise levels and noise at every step (`comfy_sage3/training_study`, on the bundled "
        "model's own training code; bf16 autocast on a GPU). Losses are compared seed by seed. The held-out loss is "
        "that of the averaged weights on clips that no run has seen, with fixed noise, and with the run's own "
        f"attention. Prompts are of combinations that no run has seen, drawn with exact attention. {MEANING}\n\n"
        f"{forms}\n\n```\n{commands}\n```\n\n" + "\n".join(f"Made on: {line}." for line in tables.machines(found))
    )


def _before(group: Group) -> list[str]:
    """Of the bundled model before it is trained on: what the VAE and the scorer would let a perfect model reach."""
    truths = [run["truth"] for by in group.runs.values() for run in by.values() if "truth" in run]
    if not truths:
        return []
    return [f"Drawn clips through the VAE and back score {100 * truths[0]['all']:.0f} %, the most that a model can reach."]


def _calls() -> str:
    return (
        "Self-attention calls of all runs of training, by the kernel that served them. Cross-attention, whose 11 keys are "
        "the prompt, is exact in every run. The last column is the 8-bit gradient's own count."
    )
