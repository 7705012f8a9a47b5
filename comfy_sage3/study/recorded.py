"""The attention benchmark's results that come with this package, recorded on other GPUs, and how they are made.

    python -m comfy_sage3.study.recorded            recorded.json anew from benchmarks/results/*.json of a checkout

``benchmarks/`` is not part of an installed package, so what a page shows of its results is copied here, condensed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError

FILE = Path(__file__).with_name("recorded.json")
SCHEMA, BENCHMARK_SCHEMA = "comfy_sage3.recorded", 1
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BASELINE = "cudnn"  # SDPA on cuDNN, which ratios are against


def condensed(result: dict[str, Any]) -> dict[str, Any]:
    """What a table and a plot need of one result of benchmarks/attention.py. Raises InputError for anything else."""
    try:
        if result["schema"] != BENCHMARK_SCHEMA:
            raise KeyError("schema")
        labels = {p["name"]: (p["label"], p["part"]) for p in result["peers"] if p["direction"] == "forward"}
        rows = [_row(r, labels) for r in result["rows"] if r["direction"] == "forward" and r.get("tflops")]
        return {
            "device": str(result["device"]["name"]),
            "capability": str(result["device"]["capability"]),
            "when": str(result["when"]),
            "command": str(result["command"]),
            "commit": (result["commit"] or {}).get("hash", "")[:12],
            "versions": {name: str(v) for name, v in result["versions"].items() if v and name in ("torch", "cuda", "cudnn")},
            "stopped": result.get("stopped"),
            "rows": rows,
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"This is not a result of benchmarks/attention.py ({error}): run it anew.") from None


def _row(row: dict[str, Any], labels: dict[str, tuple[str, str]]) -> dict[str, Any]:
    label, part = labels[row["peer"]]
    error = ((row.get("error") or {}).get("normal") or {}).get("relative_l1")
    return {
        "shape": row["shape"],
        "text": row["text"],
        "peer": row["peer"],
        "label": label,
        "part": part,
        "tflops": round(row["tflops"], 1),
        "ms": float(f"{row['ms']['median']:.4g}"),
        "ratio": None if row["ratio_to_cudnn"] is None else round(row["ratio_to_cudnn"], 3),
        "relative_l1": None if error is None else float(f"{error:.3g}"),
    }


def gather(folder: Path) -> dict[str, Any]:
    """Each GPU's result of the attention benchmark under ``folder``, condensed, by the name of the GPU.

    That is the file with the GPU's name alone (h200.json): backward-h200.json is a run of some peers only.
    """
    found = []
    for path in sorted(p for p in folder.glob("*.json") if "-" not in p.stem):
        result = json.loads(path.read_text("utf-8"))
        if isinstance(result, dict) and result.get("schema") == BENCHMARK_SCHEMA and "peers" in result:
            found.append(condensed(result))
    return {"schema": SCHEMA, "results": sorted(found, key=lambda r: (r["device"], r["when"]))}


def recorded() -> list[dict[str, Any]]:
    """The recorded results; an empty list where the file is missing or is somebody else's."""
    try:
        found = json.loads(FILE.read_text("utf-8"))
    except (OSError, ValueError):
        return []
    return found["results"] if isinstance(found, dict) and found.get("schema") == SCHEMA else []


def shapes_of(result: dict[str, Any]) -> list[str]:
    """The shapes that were measured, in their order."""
    return list(dict.fromkeys(row["shape"] for row in result["rows"]))


def table(result: dict[str, Any], value: str = "ratio") -> tuple[list[str], list[list[str]]]:
    """(heads, rows): shapes down, peers across; value is "ratio" (times SDPA cuDNN), "tflops" or "relative_l1"."""
    forms = {"ratio": "{:.2f}x", "tflops": "{:.0f}", "relative_l1": "{:.4f}"}
    peers = whole_calls(result)
    by = {(row["shape"], row["peer"]): row for row in result["rows"]}
    lines = []
    for shape in shapes_of(result):
        mine = [by.get((shape, peer)) for peer in peers]
        text = next(row["text"] for row in result["rows"] if row["shape"] == shape)
        lines.append(
            [f"{shape} ({text})", *("–" if r is None or r[value] is None else forms[value].format(r[value]) for r in mine)]
        )
    return ["shape", *peers.values()], lines


def whole_calls(result: dict[str, Any]) -> dict[str, str]:
    """Peers that were timed as a caller sees them, quantisation included: name -> label."""
    return {row["peer"]: row["label"] for row in result["rows"] if row["part"] in ("no quantisation", "with quantisation")}


def main(argv: Sequence[str] | None = None) -> int:
    """Write recorded.json. Returns 2 outside a checkout."""
    folder = Path(argv[0]) if argv else BENCHMARKS / "results"
    if not folder.is_dir():
        print(f"error: there is no {folder.name} folder of the benchmark here: run this in a checkout.", file=sys.stderr)
        return 2
    from ..files import put

    put(FILE, (json.dumps(gather(folder), indent=0, allow_nan=False) + "\n").encode())
    print(f"wrote {FILE.name}: {', '.join(r['device'] for r in recorded())}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
