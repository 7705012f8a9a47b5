"""The comparison in words and rows, for terminal and page alike, so that the two cannot disagree."""

from __future__ import annotations

import shlex
from typing import Any, NamedTuple

CLOSE_SSIM = 0.95  # ComfyUI's own quality test calls two images equal from here
ALIKE_SSIM = 0.80
NOT_MEASURED = "n/a"
BASELINE = "baseline"
PRECISION_NAMES = {
    "fp4": "4-bit attention",
    "int8": "8-bit attention",
    "int8-fast": "fast 8-bit attention",
    "exact": "exact attention",
    "auto": "automatic attention",
    "plan": "planned attention",
}


class Row(NamedTuple):
    """One row: what it is, then side A, side B, and the noise floor (or, for times, nothing)."""

    name: str
    a: str
    b: str
    floor: str = ""


def noun(m: dict[str, Any]) -> str:
    """What was made: "picture" where the request was for one frame, else "video"."""
    return "picture" if m["request"]["frames"] == 1 else "video"


def headline(m: dict[str, Any]) -> tuple[str, str]:
    """A verdict a stranger understands, and the numbers it rests on."""
    a, b = m["sides"]["a"], m["sides"]["b"]
    end = m["quality"]["end_to_end"]
    pair, floor = end["a_vs_b"], end["noise_floor"]
    names, made = (PRECISION_NAMES[a["precision"]], PRECISION_NAMES[b["precision"]]), noun(m)
    if pair["identical"]:
        verdict = f"The two {made}s are identical, pixel for pixel,"
    elif pair["ssim"] >= CLOSE_SSIM:
        verdict = f"{names[1].capitalize()} drew nearly the same {made} as {names[0]}"
    elif pair["ssim"] >= ALIKE_SSIM:
        verdict = f"{names[1].capitalize()} drew a similar {made} to {names[0]}, with visible differences"
    else:
        verdict = f"{names[1].capitalize()} drew a different {made} from {names[0]}"
    kept = adherence_counts(m)
    verdict = verdict.removesuffix(",") if not kept["a"][1] else verdict
    verdict += f" and followed the prompt {_versus(kept['b'], kept['a'])}." if kept["a"][1] else "."
    for side in (a, b):
        if side["fell_back"]:
            verdict += f" Side {side['label']} did not run as {side['precision']} throughout: see what ran, and why."
        elif side["kept_exact"] and side["kept_exact"] == side["calls"]:
            verdict += f" Side {side['label']} never ran as {side['precision']}: {kept_exact_sentence(side)}"
    apart = "give the same frames" if floor["identical"] else f"differ by {_apart(floor)}"
    numbers = f"Between the sides: {_apart(pair)}. Two exact runs (the noise floor) {apart}."
    return verdict, numbers


def _apart(pair: dict[str, Any]) -> str:
    return "no difference" if pair["identical"] else f"PSNR {decibels(pair['psnr'])}, SSIM {pair['ssim']:.4f}"


def _versus(b: tuple[int, int], a: tuple[int, int]) -> str:
    if b[0] == a[0]:
        return f"equally well ({b[0]} of {b[1]} details on both sides)"
    return f"{'better' if b[0] > a[0] else 'less well'} ({b[0]} of {b[1]} details, against {a[0]} of {a[1]})"


def adherence_counts(m: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Per side: how many details of the prompt came out, of how many it named."""
    result = {}
    for key, verdicts in m["quality"]["adherence"].items():
        asked = [v for v in verdicts.values() if v is not None]
        result[key] = (sum(asked), len(asked))
    return result


def quality_rows(m: dict[str, Any]) -> list[tuple[str, list[Row]]]:
    """Sections of rows (title, rows), from the kernel outwards to the finished video."""
    q = m["quality"]
    end = q["end_to_end"]
    pair, floor = end["a_vs_b"], end["noise_floor"]
    made = noun(m)
    sections = []
    if q["replay"]:
        for kind, where in (("self", "self-attention"), ("cross", "cross-attention")):
            rows = error_rows(q["replay"]["summary"][kind])
            kept = " and ".join(m["sides"][key]["label"] for key in q["replay"]["kept_exact"][kind])
            where += ", against exact fp32" + (f"; {kept} kept exact" if kept else "")
            sections.append((f"1. Same tensors, each kernel ({where})", rows))
    if q["one_step"]:
        sections.append((f"2. Same noisy {made}, one step (against exact)", error_rows(q["one_step"]["summary"])))
    over_time = [
        Row("worst frame", BASELINE, _worst(pair), _worst(floor)),
        _moving("motion energy", end["motion_energy"]),
        _moving("flicker", end["flicker"]),
    ]
    rows = [
        Row("PSNR", BASELINE, decibels(pair["psnr"]), decibels(floor["psnr"])),
        Row("SSIM", BASELINE, f"{pair['ssim']:.4f}", f"{floor['ssim']:.4f}"),
        *(over_time if made == "video" else []),
        adherence_row(m),
    ]
    return [*sections, (f"3. The finished {made}s (B against A)", rows)]


def error_rows(summary: dict[str, dict[str, float]]) -> list[Row]:
    names = {
        "cosine": ("cosine similarity", "{:.6f}"),
        "relative_l1": ("relative L1 error", "{:.2g}"),
        "rmse": ("RMSE", "{:.2g}"),
        "max_abs": ("largest error", "{:.2g}"),
    }
    rows = []
    for key, (name, form) in names.items():
        values = [summary[side].get(key) for side in ("a", "b", "floor")]
        rows.append(Row(name, *(NOT_MEASURED if v is None else form.format(v) for v in values)))
    return rows


def _worst(pair: dict[str, Any]) -> str:
    worst = pair["worst_frame"]
    return decibels(None) if pair["identical"] else f"{decibels(worst['psnr'])} (no. {worst['index'] + 1})"


def _moving(name: str, values: dict[str, float | None]) -> Row:
    known = (values[key] for key in ("a", "b", "noise_floor"))
    return Row(name, *(NOT_MEASURED if v is None else f"{v:.5f}" for v in known))


def adherence_row(m: dict[str, Any]) -> Row:
    counts = adherence_counts(m)
    known = (counts[k] for k in ("a", "b", "noise_floor"))
    return Row("prompt followed", *(f"{x} of {n}" if n else NOT_MEASURED for x, n in known))


def adherence_rows(m: dict[str, Any]) -> list[Row]:
    """Every detail the prompt named, and whether it came out."""
    found = m["quality"]["adherence"]
    asked = [name for name, value in found["a"].items() if value is not None]
    return [Row(n, *("yes" if found[k][n] else "no" for k in ("a", "b", "noise_floor"))) for n in asked]


def timing_rows(m: dict[str, Any]) -> list[Row]:
    """Times of both sides; an emulated side's are labelled as such and are never set against the other's."""
    t = m["timing"]
    names = {
        "sampling_seconds": "sampling, end to end",
        "step_seconds": "one step",
        "attention_seconds": "attention in one run",
    }
    rows = [Row(name, _spread(t["a"][key]), _spread(t["b"][key])) for key, name in names.items()]
    rows.append(Row(f"decoding the {noun(m)}", _seconds(t["a"]["decode_seconds"]), _seconds(t["b"]["decode_seconds"])))
    rows.append(Row("building kernels", _build(t["a"], m["sides"]["a"]), _build(t["b"], m["sides"]["b"])))
    rows.append(Row("peak GPU memory", _bytes(t["a"]["peak_memory_bytes"]), _bytes(t["b"]["peak_memory_bytes"])))
    return rows


def ratio_rows(m: dict[str, Any]) -> list[tuple[str, str]]:
    """How many times faster B is, only where both sides ran on real kernels as asked."""
    names = {"sampling_seconds": "sampling", "step_seconds": "one step", "attention_seconds": "attention"}
    return [(names[key], f"{value:.2f}x") for key, value in (m["timing"]["a_over_b"] or {}).items()]


def kept_exact_sentence(side: dict[str, Any]) -> str:
    """How many calls a side's own plan kept exact, and which setting did."""
    count, calls = side["kept_exact"], side["calls"]
    plan = "the plan and " if side["precision"] == "plan" else ""
    return f"{count:,} of {calls:,} calls were kept exact by {plan}--min-tokens {side['min_tokens']}."


def side_title(side: dict[str, Any]) -> str:
    return f"{side['label']}: {side['precision']}" + (" (emulated)" if side["emulated"] else "")


def command(m: dict[str, Any]) -> str:
    """The command that makes this comparison again."""
    r, a, b = m["request"], m["sides"]["a"], m["sides"]["b"]
    if r.get("workflow"):
        server = shlex.quote(m["environment"].get("server", "URL"))
        return f"python gradio_app.py --engine {server}  # then the workflow {r['workflow']}"
    words = ["python", "-m", "comfy_sage3", "compare", "--prompt", r["prompt"], "--a", a["precision"]]
    words += [
        "--b",
        b["precision"],
        "--seed",
        str(r["seed"]),
        "--size",
        f"{r['width']}x{r['height']}x{r['frames']}",
    ]
    words += ["--steps", str(r["steps"]), "--cfg", f"{r['cfg']:g}", "--shift", f"{r['shift']:g}"]
    words += ["--min-tokens", str(b["min_tokens"])]
    if r.get("negative"):
        words += ["--negative", r["negative"]]
    words += ["--repeats", str(m["timing"]["repeats"]), "--engine", m["environment"]["engine"]]
    if "server" in m["environment"]:
        words += ["--server", m["environment"]["server"]]
    if not a["emulation_allowed"]:
        words.append("--no-emulate")
    return shlex.join(words)


def terminal(m: dict[str, Any]) -> str:
    """Everything above as plain text, at most 100 columns wide."""
    verdict, numbers = headline(m)
    a, b = m["sides"]["a"], m["sides"]["b"]
    lines = ["", verdict, numbers]
    if m["note"]:
        lines += [m["note"]]
    lines += ["", f"Quality{'':<25} {side_title(a):>20} {side_title(b):>20} {'noise floor':>20}"]
    for title, rows in quality_rows(m):
        lines.append(title)
        lines += [f"  {r.name:<30} {r.a:>20} {r.b:>20} {r.floor:>20}" for r in rows]
    lines += [
        "",
        f"Time, median (min to max) of {m['timing']['repeats']} runs each, order {m['timing']['order']}",
    ]
    if m["note"]:
        lines.append(f"  {m['note']}")
    lines.append(f"  {'':<22} {side_title(a):>34} {side_title(b):>34}")
    lines += [f"  {r.name:<22} {r.a:>34} {r.b:>34}" for r in timing_rows(m)]
    lines += [f"  {name}: B is {value} as fast as A" for name, value in ratio_rows(m)]
    lines += ["", "What ran, and why"]
    for side in (a, b):
        for line in side["report"]:
            mark = "fell back: " if line["fell_back"] else ""
            lines.append(f"  {side['label']}: {line['calls']} calls on {line['kernel']} ({mark}{line['reason']})")
        if not side["report"]:
            lines.append(f"  {side['label']}: no attention calls were reported")
        if side["kept_exact"]:
            lines.append(f"  {side['label']}: {kept_exact_sentence(side)}")
    return "\n".join(lines)


def decibels(value: float | None) -> str:
    return "identical" if value is None else f"{value:.1f} dB"


def _spread(s: dict[str, Any] | None) -> str:
    if s is None:
        return NOT_MEASURED
    return f"{_seconds(s['median'])} ({_seconds(s['min'])} to {_seconds(s['max'])})"


def _seconds(value: float | None) -> str:
    if value is None:
        return NOT_MEASURED
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"


def _build(side: dict[str, Any], data: dict[str, Any]) -> str:
    if side["build_seconds"] is not None:
        return _seconds(side["build_seconds"])
    return "nothing to build" if data["emulated"] or data["precision"] == "exact" else NOT_MEASURED


def _bytes(value: int | None) -> str:
    return NOT_MEASURED if value is None else f"{value / 2**20:,.0f} MiB"
