"""A shipped workflow in its two formats: the editor's, and the one that the server is given."""

import json
from pathlib import Path

from comfy_sage3.workflow import load_workflow

FOLDER = Path(__file__).resolve().parents[2] / "workflows"


def as_the_editor_reads(client, name):
    """Widget values by position, in the order in which the server names them -> {id: {class_type, inputs}}."""
    editor = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    links = {x[0]: [str(x[1]), x[2]] for x in editor["links"]}
    read = {}
    for node in editor["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        spec = client.object_info(node["type"])[node["type"]]["input"]
        values = iter(node["widgets_values"])
        inputs = {s["name"]: links[s["link"]] for s in node["inputs"] if s["link"] is not None}
        for key, (kind, *rest) in {**spec["required"], **spec.get("optional", {})}.items():
            if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                inputs[key] = next(values)
                if rest and rest[0].get("control_after_generate"):
                    assert next(values) == "fixed"
        assert not list(values)
        read[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return read


def as_the_server_gets(name):
    """{id: {class_type, inputs}}"""
    api = load_workflow(FOLDER / "api" / f"{name}.json")
    return {k: {"class_type": n["class_type"], "inputs": n["inputs"]} for k, n in api.items()}
