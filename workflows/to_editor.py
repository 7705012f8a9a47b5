"""Write NAME.json, which ComfyUI's editor and its template browser open, for each api/NAME.json, which a server runs.

    python workflows/to_editor.py --server http://127.0.0.1:8188 workflows/api/text_to_video_ab.json

The server is asked for its node definitions, so it must have this pack. The editor's format is LiteGraph's
0.4: nodes with positions, widget values by position, and links as [id, from, output, to, input, type].
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from pathlib import Path
from typing import Any

COLUMN, GAP, TOP = 400, 50, 0
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
EXTRA_HEIGHT = {
    "SaveAnimatedWEBP": 260, "Sage3Report": 220, "Sage3Attention": 150, "Sage3DemoPrompt": 80, "Sage3Compare": 500,
    "PreviewImage": 300,
}  # fmt: skip
EXTRA_WIDTH = {"Sage3Compare": 240, "Sage3Report": 40}


def definitions(info: dict[str, Any]) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Input name -> (type, options) of one node, in the editor's order."""
    inputs = info["input"]
    found = {}
    for group in ("required", "optional"):
        for name, spec in inputs.get(group, {}).items():
            found[name] = (spec[0], spec[1] if len(spec) > 1 else {})
    return found


def is_widget(kind: Any, options: dict[str, Any]) -> bool:
    """Whether an input is typed into the node itself; a list of choices is a combo of the older kind."""
    return (isinstance(kind, list) or kind in WIDGETS) and not options.get("forceInput")


def widget_values(inputs: dict[str, Any], info: dict[str, Any]) -> list[Any]:
    """The values in the editor's order; a seed is followed by what happens to it after a run."""
    values = []
    for name, (kind, options) in definitions(info).items():
        if is_widget(kind, options):
            values.append(inputs[name])
            if options.get("control_after_generate"):
                values.append("fixed")
    return values


def depths(workflow: dict[str, Any]) -> dict[str, int]:
    """The longest way from a node without links to each node: its column."""
    found: dict[str, int] = {}

    def depth(key: str) -> int:
        if key not in found:
            links = [v[0] for v in workflow[key]["inputs"].values() if isinstance(v, list)]
            found[key] = 1 + max(map(depth, links), default=-1)
        return found[key]

    for key in workflow:
        depth(key)
    return found


def to_editor(workflow: dict[str, Any], infos: dict[str, Any], note: str) -> dict[str, Any]:
    """``workflow`` in the editor's format, laid out in columns, with ``note`` above it."""
    nodes: dict[str, dict[str, Any]] = {}
    links: list[list[Any]] = []
    bottom: dict[int, float] = {}
    columns = depths(workflow)
    for order, key in enumerate(sorted(workflow, key=lambda k: (columns[k], int(k)))):
        node = workflow[key]
        info, column = infos[node["class_type"]], columns[key]
        sockets = [
            {"name": name, "type": kind, "link": None}
            for name, (kind, options) in definitions(info).items()
            if not is_widget(kind, options)
        ]
        values = widget_values(node["inputs"], info)
        rows = max(len(sockets), len(info["output"])) + len(values)
        height = 40 + 26 * rows + EXTRA_HEIGHT.get(node["class_type"], 0)
        y = bottom.get(column, TOP)
        bottom[column] = y + height + GAP
        nodes[key] = {
            "id": int(key),
            "type": node["class_type"],
            "pos": [column * COLUMN, y],
            "size": [COLUMN - 80 + EXTRA_WIDTH.get(node["class_type"], 0), height],
            "flags": {},
            "order": order,
            "mode": 0,
            "inputs": sockets,
            "outputs": [
                {"name": name, "type": kind, "slot_index": i, "links": []}
                for i, (name, kind) in enumerate(zip(info["output_name"], info["output"], strict=True))
            ],
            "properties": {"Node name for S&R": node["class_type"]},
            "widgets_values": values,
        }
        if title := node.get("_meta", {}).get("title"):
            nodes[key]["title"] = f"{info['display_name'] or node['class_type']}: {title}"
    for key, node in workflow.items():
        for slot, socket in enumerate(nodes[key]["inputs"]):
            if not isinstance(source := node["inputs"].get(socket["name"]), list):
                continue
            link = len(links) + 1
            output = nodes[source[0]]["outputs"][source[1]]
            output["links"].append(link)
            socket["link"] = link
            links.append([link, int(source[0]), source[1], int(key), slot, output["type"]])
    last = max(map(int, workflow)) + 1
    remark = {
        "id": last,
        "type": "MarkdownNote",
        "pos": [0, TOP - 240],
        "size": [2 * COLUMN - 80, 180],
        "flags": {},
        "order": len(nodes),
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [note],
    }
    return {
        "last_node_id": last,
        "last_link_id": len(links),
        "nodes": [*nodes.values(), remark],
        "links": links,
        "groups": [],
        "config": {},
        "extra": {"ds": {"scale": 0.7, "offset": [80, 320]}},
        "version": 0.4,
    }


NOTE = """**The same prompt and seed, once with exact attention (A) and once with 4-bit attention (B).**

The model is bundled and tiny; its prompts use a small vocabulary (colours, shapes, motions, backgrounds).
`emulate` runs the 4-bit method in plain PyTorch where no kernel exists: quality is real, speed is not.
After a run each Sage3 Attention node says how many calls it served and why others fell back. The tab Sage3 of the
bottom panel has the map of layers and steps.
"""
TEXT_NOTE = """**A video from a prompt, with Sage3 Attention put in front of the sampler and no widget touched.**

The model is bundled and tiny; its prompts use a small vocabulary (colours, shapes, motions, backgrounds).
`auto` runs attention in fewer bits where this GPU has a kernel that is faster so, and leaves it exact elsewhere: on a CPU
always, on a Hopper GPU below 4096 tokens (this video has 1280; 480 x 480, 33 frames and shift 7 have 8100). Sage3 Report
says what it did and why.
"""
PLAN_NOTE = """**Calibrate once, then run with the plan.**

Sage3 Precision Plan samples with exact attention, measures what 4 and 8 bits would cost in each layer at four steps, and
finds the fastest precisions within the budget; its heat map shows both. Sage3 Attention follows the plan, and Sage3 Report
says layer by layer whether it could. The plan is saved as "demo": next time Sage3 Load Plan will do.

`emulate` plans for a GPU with 4-bit kernels, and runs them in plain PyTorch where there are none: quality is real, speed
is not.
"""
COMPARE_NOTE = """Sage3 Compare, on the right, shows both videos with a wipe, frame by frame.
"""
LATENT_NOTE = """
This variant saves latents, not videos: ComfyUI before 0.3.76 cannot load a Wan VAE of the bundled width.
"""


def main() -> None:
    """Convert each workflow named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", required=True, metavar="URL")
    parser.add_argument("workflows", nargs="+", type=Path)
    args = parser.parse_args()
    with urllib.request.urlopen(f"{args.server}/object_info", timeout=60) as answer:
        infos = json.load(answer)
    for path in args.workflows:
        workflow = json.loads(path.read_text(encoding="utf-8"))
        saves_latents = any(n["class_type"] == "SaveLatent" for n in workflow.values())
        compares = any(n["class_type"] == "Sage3Compare" for n in workflow.values())
        plans = any(n["class_type"] == "Sage3PrecisionPlan" for n in workflow.values())
        note = PLAN_NOTE if plans else NOTE if compares or saves_latents else TEXT_NOTE
        editor = to_editor(workflow, infos, note + COMPARE_NOTE * compares + LATENT_NOTE * saves_latents)
        text = json.dumps(editor, indent=1) + "\n"
        (path.parent.parent / path.name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
