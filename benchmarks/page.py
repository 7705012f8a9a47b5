"""A result as Markdown and as a plot, from nothing but its JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comfy_sage3.errors import InputError
from comfy_sage3.files import put

SCHEMA = 1
NONE = "–"
MARK = {"aim": "aim reached", "must": "must reached", "missed": "**missed**", "not measured": "not measured"}


def write(result: dict[str, Any], out: Path) -> list[str]:
    """JSON to ``out``, Markdown and plot beside it -> what to tell the person."""
    replace(out, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    return [f"wrote {out}", *render(result, out)]


def render(result: dict[str, Any], out: Path) -> list[str]:
    """Markdown and plot beside ``out`` -> what to tell the person."""
    replace(out.with_suffix(".md"), markdown(result).encode())
    said = [f"wrote {out.with_suffix('.md')}"]
    image = plot(result)
    if image is None:
        return [*said, "no plot: matplotlib is not installed (pip install matplotlib), or nothing was timed"]
    replace(out.with_suffix(".png"), image)
    return [*said, f"wrote {out.with_suffix('.png')}"]


def read(path: Path) -> dict[str, Any]:
    """A result that ``write`` wrote. Raises InputError for anything else."""
    try:
        result = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give the JSON of an earlier run.") from None
    except (OSError, ValueError) as problem:
        raise InputError(f"{path} cannot be read as a result: {problem}.") from None
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise InputError(f"{path} is not a result of this benchmark (schema {SCHEMA}).")
    return result


def replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    put(path, content)


# ------------------------------------------------------------------------------------------------ Markdown
def markdown(result: dict[str, Any]) -> str:
    """The whole page."""
    lines = [f"# Attention on {result['device']['name']}", "", *_where(result)]
    if result.get("stopped"):
        lines += ["", f"**Stopped early:** {result['stopped']}"]
    for direction, title in TITLES.items():
        rows = [r for r in result["rows"] if r["direction"] == direction]
        if rows:
            lines += ["", f"## {title}: TFLOPS (and times the speed of SDPA cuDNN)", ""]
            lines += _grid(result, rows, _speed)
    forward = [r for r in result["rows"] if r["direction"] == "forward"]
    for kind, text in result.get("kinds", {}).items():
        with_error = [r for r in forward if kind in (r.get("error") or {})]
        if with_error:
            lines += ["", f"## Relative L1 error, inputs {text}", ""]
            lines += _grid(result, with_error, lambda row, kind=kind: _error(row, kind))
    backward = [r for r in result["rows"] if r["direction"] == "backward" and (r.get("error") or {}).get("normal")]
    if backward:
        lines += ["", "## Relative L1 error of dQ, inputs N(0,1)", ""]
        lines += _grid(result, backward, lambda row: _error(row, "normal"))
    moved = [r for r in forward if r.get("gb_per_s")]
    if moved:
        lines += ["", f"## Quantisation alone (a copy on this device: {result['copy_gb_per_s']:.0f} GB/s)", ""]
        lines += _table(("shape", "ms", "GB/s", "of the copy"), [
            (r["shape"], _ms(r), f"{r['gb_per_s']:.0f}", f"{100 * r['gb_per_s'] / result['copy_gb_per_s']:.0f} %")
            for r in moved
        ])  # fmt: skip
    if result["verdicts"]:
        lines += ["", "## Bars", ""]
        lines += _table(("bar", "must", "aim", "here", "verdict"), [verdict_cells(v) for v in result["verdicts"]])
    missing = [f"{p['label']}: {p['absent']}" for p in result["peers"] if p["absent"]]
    refused: dict[tuple[str, str], list[str]] = {}
    for r in result["rows"]:
        if r.get("missing"):
            refused.setdefault((r["peer"], r["missing"]), []).append(r["shape"])
    missing += [f"{_label(result, peer)} at {', '.join(at)}: {why}" for (peer, why), at in refused.items()]
    if missing:
        lines += ["", "## Not measured", "", *(f"- {line}" for line in missing)]
    lines += ["", "## Milliseconds per call: median (p10 to p90; samples x calls)", ""]
    lines += _table(("shape", "peer", "ms", "p10", "p90", "samples"), [
        (r["shape"], _label(result, r["peer"]), _ms(r), f"{r['ms']['p10']:.4g}", f"{r['ms']['p90']:.4g}",
         f"{r['ms']['samples']} x {r['ms']['calls']}{' (graph)' if r['ms']['by'] == 'graph' else ''}")
        for r in result["rows"] if r.get("ms")
    ])  # fmt: skip
    return "\n".join(lines) + "\n"


def verdict_cells(v: dict[str, Any]) -> tuple[str, ...]:
    """One bar: what, must, aim, here, verdict."""
    aim = NONE if v["aim"] is None else f"{v['sign']} {v['aim']:g}"
    here = NONE if v["value"] is None else f"{v['value']:.4f}" if v["value"] < 0.1 else f"{v['value']:.2f}"
    why = f" ({v['why']})" if v["why"] else ""
    return v["text"], f"{v['sign']} {v['must']:g}", aim, here, MARK[v["verdict"]] + why


def _where(result: dict[str, Any]) -> list[str]:
    device, versions, commit = result["device"], result["versions"], result["commit"]
    known = {"torch": "torch", "cuda": "CUDA", "cudnn": "cuDNN", "comfy_kitchen": "comfy-kitchen", "kernels": "kernels"}
    named = [f"{text} {versions[key]}" for key, text in known.items() if versions.get(key)]
    lines = [
        f"`{result['command']}`, {result['when']}, inputs {result['dtype']}.",
        f"{device['name']} (compute capability {device['capability']}, {device['multiprocessors']} multiprocessors, "
        f"{device['memory_gib']:g} GiB); {', '.join(named)}.",
    ]
    clocks = {when: c for when, c in result["clocks"].items() if c}
    if clocks:
        driver = next(iter(clocks.values())).get("driver")
        said = [
            f"{when} {c['sm_mhz'] or 0:.0f} MHz, {c['power_w'] or 0:.0f} W, {c['celsius'] or 0:.0f} °C"
            for when, c in clocks.items()
        ]
        lines.append(f"Driver {driver}; {'; '.join(said)}.")
    if commit:
        lines.append(f"Commit {commit['hash'][:12]}{', with changes' if commit['changed'] else ''}.")
    return [line + "  " for line in lines[:-1]] + [lines[-1]]


def _grid(result: dict[str, Any], rows: Sequence[dict[str, Any]], cell: Any) -> list[str]:
    """Shapes down, peers across."""
    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    peers = [p["name"] for p in result["peers"] if any(r["peer"] == p["name"] and cell(r) for r in rows)]
    by = {(r["shape"], r["peer"]): r for r in rows}
    head = ("shape", "", *(_label(result, p) for p in peers))
    return _table(head, [
        (s, next(r["text"] for r in rows if r["shape"] == s),
         *(cell(by[s, p]) or NONE if (s, p) in by else NONE for p in peers))
        for s in shapes
    ])  # fmt: skip


def _speed(row: dict[str, Any]) -> str | None:
    if row.get("tflops") is None:
        return None
    ratio = row["ratio_to_cudnn"]
    return f"{row['tflops']:.0f}" + (f" ({ratio:.2f}x)" if ratio is not None else "")


def _error(row: dict[str, Any], kind: str) -> str | None:
    found = (row.get("error") or {}).get(kind)
    if not found:
        return None
    return "NaN" if found["relative_l1"] is None else f"{found['relative_l1']:.4f}"


def _ms(row: dict[str, Any]) -> str:
    return f"{row['ms']['median']:.4g}"


def _label(result: dict[str, Any], peer: str) -> str:
    return next((p["label"] for p in result["peers"] if p["name"] == peer), peer)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return [line(head), "|" + " --- |" * len(head), *(line(row) for row in rows)]


# ------------------------------------------------------------------------------------------------ plot
TITLES = {"forward": "Forward", "backward": "Backward", "both": "Forward and backward"}
COLOURS = ("#9aa3b0", "#5b6472", "#c9b458", "#d1792f", "#0b62d6", "#6cb0ff", "#12805c", "#78c7a5", "#8e5bd0", "#c9a4ec")


def plot(result: dict[str, Any]) -> bytes | None:
    """TFLOPS as PNG, a panel for each direction, a group of bars per shape; None without matplotlib or without a figure."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    timed = [r for r in result["rows"] if r.get("tflops") and r["peer"] != "sm90-mask"]
    panels = [(title, mine) for d, title in TITLES.items() if (mine := [r for r in timed if r["direction"] == d])]
    if not panels:
        return None
    names = list(dict.fromkeys(_same(r) for _, rows in panels for r in rows))  # of a peer in any direction
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    sizes = [len({r["shape"] for r in rows}) * (len({r["peer"] for r in rows}) + 1.5) for _, rows in panels]
    figure = Figure(figsize=(8.5, 1.0 + 0.4 * len(panels) + 0.17 * sum(sizes)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=sizes)[:, 0]
    for axes, (title, rows) in zip(all_axes, panels, strict=True):
        shapes = list(dict.fromkeys(r["shape"] for r in rows))
        peers = [p["name"] for p in result["peers"] if any(r["peer"] == p["name"] for r in rows)]
        by = {(r["shape"], r["peer"]): r for r in rows}
        step = 0.86 / len(peers)
        for i, peer in enumerate(peers):
            mine = [(n, by[s, peer]) for n, s in enumerate(shapes) if (s, peer) in by]
            at = [n - 0.43 + (i + 0.5) * step for n, _ in mine]
            name = _same(mine[0][1])
            axes.barh(at, [r["tflops"] for _, r in mine], step * 0.94, color=colours[name], edgecolor="white", linewidth=0.3,
                      label=_label(result, name), hatch="///" if name.endswith("-kernel") else None)  # fmt: skip
            for y, (_, row) in zip(at, mine, strict=True):
                axes.text(row["tflops"], y, f" {row['tflops']:.0f}", va="center", fontsize=6)
        axes.set_yticks(range(len(shapes)), shapes, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(f"TFLOPS, {title.lower()}; more is faster", fontsize=9)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
    all_axes[0].set_title(f"Attention on {result['device']['name']}", fontsize=10)
    shown = {label: bar for axes in all_axes for bar, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _same(row: dict[str, Any]) -> str:
    """The name that a peer has forward: "sm90" for "sm90-backward"."""
    return str(row["peer"]).removesuffix(f"-{row['direction']}")
