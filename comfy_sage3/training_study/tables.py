"""Tables and sentences of a study, as Markdown. Every number and every verdict is computed from the results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from .pace import median_ms
from .results import PAIRS, Group, Value, exact_loss, loss, shown
from .seeds import WORDS, Difference
from .settings import AGAIN, EXACT, FORMS, INT8, REFERENCE, UNSMOOTHED

NONE = "–"
ASPECTS = (("everything", "all"), ("the new shape", "new"), ("the old shapes", "old"))


def outcome_table(group: Group) -> str:
    """One setting: the mean and standard deviation over seeds of all that was measured, a row a form."""
    head = ["attention", "seeds", "held-out loss", "the same weights, exact attention"]
    prompts = [(f"prompts: {text}", shown(key)) for text, key in ASPECTS] if group.setting.prompts else []
    head += [text for text, _ in prompts] + ["broke off", "steps with a gradient that is not finite"]
    rows = []
    for form in group.forms:
        runs = group.runs[form].values()
        row = [form, str(len(runs)), *(_spread(group, form, value, 5) for value in (loss, exact_loss))]
        row += [_spread(group, form, value, 1, " %") for _, value in prompts]
        row += [str(group.broken(form)), str(sum(r["non_finite_gradients"] for r in runs))]
        rows.append(row)
    return table(head, rows)


def difference_table(group: Group) -> str:
    """One setting: differences seed by seed, with intervals and verdicts. "" where there is nothing to compare."""
    rows = []
    measures: list[tuple[str, Value, int]] = [("held-out loss", loss, 5)]
    if group.setting.prompts:
        measures += [("prompts shown in full (points)", shown("all"), 1), ("new shape shown (points)", shown("new"), 1)]
    for form, other in PAIRS:
        for text, value, digits in measures:
            d = group.difference(form, other, value)
            if d is not None:
                spread = NONE if d.spread is None else f"{d.spread:.{digits}f}"
                rows.append([f"{form} − {other}", text, str(d.seeds), _signed(d, digits), spread, WORDS[d.kind]])
    if not rows:
        return ""
    return table(["difference", "of", "seeds", "mean (95 % interval)", "seeds' spread", "verdict"], rows)


def conclusions(found: Sequence[Group]) -> list[str]:
    """The two claims, each settled or not by the numbers; a sentence or two each."""
    by = {g.setting.name: g for g in found}
    said = []
    if "finetune" in by:
        group = by["finetune"]
        said += [_claim("Fine-tuning in 8 bits loses nothing against exact attention", group, INT8, EXACT)]
        if group.runs.get(UNSMOOTHED):
            said += [_claim("Fine-tuning in 8 bits without K smoothing is as good as with it", group, UNSMOOTHED, REFERENCE)]
        if group.runs.get(AGAIN):
            d = group.difference(AGAIN, EXACT, loss)
            if d is not None:
                said += [f"For scale: two exact kernels, which differ in rounding alone, end {_signed(d, 5)} apart there."]
    for name, group in by.items():
        if name.startswith("pretrain"):
            tokens = f"{group.setting.tokens:,} tokens a step"
            norm = "with" if group.setting.qk_norm else "without"
            said += [_claim(f"Pretraining at {tokens} {norm} QK norm loses nothing in 8 bits", group, INT8, EXACT)]
    return said


def pace_table(found: Sequence[Group]) -> str:
    """Time and memory of a step of each kind of arm, alone on the machine."""
    rows = []
    for group in found:
        exact = group.paces.get(EXACT)
        for form in (form for form in FORMS if form in group.paces):
            made = group.paces[form]
            against = NONE if exact is None or form == EXACT else f"{median_ms(exact) / median_ms(made):.2f}"
            memory = NONE if made["peak_bytes"] is None else f"{made['peak_bytes'] / 2**30:.2f}"
            if exact is not None and form != EXACT and exact["peak_bytes"] and made["peak_bytes"]:
                memory += f" ({made['peak_bytes'] / exact['peak_bytes']:.2f} ×)"
            s = group.setting
            rows.append([s.name, f"{s.shape.tokens:,} × {s.batch}", form, f"{median_ms(made):.1f}", against, memory])
    return table(
        ["setting", "tokens × batch", "attention", "ms a step", "times as fast as exact", "peak memory (GiB)"], rows
    )


def call_table(found: Sequence[Group]) -> str:
    """Which kernels served the self-attention of the arms, forward and backward."""
    rows = []
    for group in found:
        for form in group.forms:
            totals: dict[str, list[int]] = {}
            for run in group.runs[form].values():
                for i, way in enumerate(("forward", "backward", "gradients")):
                    for kernel, calls in run["calls"][way].items():
                        totals.setdefault(kernel, [0, 0, 0])[i] += calls
            for kernel, counts in totals.items():
                own = f"{counts[2]:,}" if counts[2] else NONE
                rows.append([group.setting.name, form, kernel, f"{counts[0]:,}", f"{counts[1]:,}", own])
    return table(["setting", "attention", "kernel", "forward", "backward", "by its own count"], rows)


def settings_table(found: Sequence[Group]) -> str:
    """What was trained."""
    rows = [
        [g.setting.name, g.setting.title, g.setting.size, f"{g.setting.batch} ({g.setting.tokens:,} tokens)", str(g.steps),
         f"{g.setting.rate:g}", "yes" if g.setting.qk_norm else "no", f"{g.setting.rank or NONE}"]
        for g in found
    ]  # fmt: skip
    return table(["setting", "", "size", "batch", "steps", "rate", "QK norm", "adapters' rank"], rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are set right."""
    lines = [f"| {' | '.join(head)} |", "| " + " | ".join(["---"] + ["---:"] * (len(head) - 1)) + " |"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _claim(claim: str, group: Group, form: str, other: str) -> str:
    d = group.difference(form, other, loss)
    broken = group.broken(form)
    fault = ""
    if broken:
        fault = (
            f" {broken} of {len(group.runs[form])} runs of {form} broke off at a number that is not finite "
            f"({group.broken(other)} of {other})."
        )
    if d is None:
        return f"**{claim}**: not tested.{fault}"
    settled = {
        "few": "not tested enough",
        "within": "holds here",
        "small": "holds here within what seeds do, though the difference is real",
        "beyond": "does not hold here" if d.mean > 0 else "holds here (it is even better)",
        "open": "not decided",
    }
    verdict = "does not hold here" if broken > group.broken(other) else settled[d.kind]
    spread = "" if d.spread is None else f", where seeds alone spread by {d.spread:.5f}"
    return (
        f"**{claim}: {verdict}.** Held-out loss of {form} less {other}, over {d.seeds} seed{'s' if d.seeds > 1 else ''}: "
        f"{_signed(d, 5)}{spread}; {WORDS[d.kind]}.{fault}"
    )  # fmt: skip


def _signed(d: Difference, digits: int) -> str:
    if math.isinf(d.low):
        return f"{d.mean:+.{digits}f}"
    return f"{d.mean:+.{digits}f} ({d.low:+.{digits}f} to {d.high:+.{digits}f})"


def _spread(group: Group, form: str, value: Value, digits: int, unit: str = "") -> str:
    values = list(group.values(form, value).values())
    if not values:
        return NONE
    around = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{around}{unit}"


def machines(found: Sequence[Group]) -> list[str]:
    """Every device with its versions, once."""
    said: dict[str, None] = {}
    for result in _all(found):
        versions = ", ".join(f"{name} {v}" for name, v in result["versions"].items())
        said[f"{result['device']}; {versions}"] = None
    return list(said)


def commands(found: Sequence[Group]) -> list[str]:
    """Every command that made a result, once."""
    return list(dict.fromkeys(result["command"] for result in _all(found)))


def _all(found: Sequence[Group]) -> list[dict[str, Any]]:
    return [r for g in found for r in (*g.paces.values(), *(run for by in g.runs.values() for run in by.values()))]
