"""Put Sage3 Attention and Sage3 Report into one of ComfyUI's own templates (or any workflow saved by its editor).

    python workflows/from_template.py --server http://127.0.0.1:8188 video_wan2_2_5B_ti2v --out wan2.2_5b.json

Sage3 Attention goes in front of every sampler's (or guider's) model, behind loaders, LoRAs and switches; Sage3 Report
behind every sampler. Subgraphs are unfolded, so that the badge is in sight. Nothing else is changed. NAME.json is the
editor's file and api/NAME.json, in the same folder, the same graph for a server. The server is asked for its node
definitions, so it must have this pack.
"""

from __future__ import annotations

import argparse
import copy
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Node = dict[str, Any]
SHIPPED = {  # file here -> template, as of ComfyUI 0.33.0 (comfyui-workflow-templates 0.11.44, MIT: see NOTICE.md)
    "wan2.2_14b_text_to_video": "video_wan2_2_14B_t2v",
    "wan2.2_5b_text_to_video": "video_wan2_2_5B_ti2v",
    "flux_dev_text_to_image": "flux_dev_full_text_to_image",
    "qwen_image_text_to_image": "image_qwen_image",
    "hunyuan_video_text_to_video": "hunyuan_video_text_to_video",
    "ltx_video_text_to_video": "ltxv_text_to_video",
}
SAMPLES = {"KSampler", "KSamplerAdvanced", "SamplerCustom"}  # take a model and give a latent
GUIDES = {"BasicGuider", "CFGGuider", "DualCFGGuider"}  # take the model for SamplerCustomAdvanced
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
NOTES = {"Note", "MarkdownNote"}
INSIDE, OUTSIDE = -10, -20  # the ends of a subgraph, as its links name them
MUTED, BYPASSED = 2, 4


class Graph:
    """A workflow of the editor: nodes by id, links as id -> [from, output, to, input, type]."""

    def __init__(self, saved: dict[str, Any]) -> None:
        saved = copy.deepcopy(saved)
        self.nodes: dict[int, Node] = {n["id"]: n for n in saved["nodes"]}
        self.links: dict[int, list[Any]] = {x[0]: x[1:] for x in saved["links"]}
        self.groups = saved.get("groups", [])
        self.subgraphs = {s["id"]: s for s in saved.get("definitions", {}).get("subgraphs", [])}
        while folded := [n for n in self.nodes.values() if n["type"] in self.subgraphs]:
            self._unfold(folded[0])

    def connect(self, origin: int, output: int, target: int, slot: int, kind: str) -> None:
        """A new link; what the input had before is cut."""
        given = self.nodes[target]["inputs"][slot]
        if given.get("link") is not None:
            self.cut(given["link"])
        link = max(self.links, default=0) + 1
        self.links[link] = [origin, output, target, slot, kind]
        given["link"] = link
        made = self.nodes[origin]["outputs"][output]
        made["links"] = [*(made.get("links") or []), link]

    def cut(self, link: int) -> None:
        """Take a link away at both ends."""
        origin, output, target, slot, _ = self.links.pop(link)
        self.nodes[target]["inputs"][slot]["link"] = None
        if origin in self.nodes:
            self.nodes[origin]["outputs"][output]["links"].remove(link)

    def add(self, node: Node, near: Node) -> int:
        """Place a new node above ``near``, where nothing lies."""
        node["id"] = max(self.nodes) + 1
        x, y = near["pos"]
        while any(_overlap((x, y), node["size"], n["pos"], n["size"]) for n in self.nodes.values()):
            y -= 20
        node["pos"] = [x, y]
        self.nodes[node["id"]] = node
        return int(node["id"])

    def _unfold(self, folded: Node) -> None:
        """Replace a subgraph's node by the nodes in it, moving aside what lies to its right."""
        inner = copy.deepcopy(self.subgraphs[folded["type"]])
        into = {x["name"]: self.links[x["link"]][:2] for x in folded["inputs"] if x.get("link") is not None}
        outputs = [[self.links[i][2:4] for i in x.get("links") or []] for x in folded["outputs"]]
        for end in [x["link"] for x in folded["inputs"]] + [i for x in folded["outputs"] for i in x.get("links") or []]:
            if end is not None:
                self.cut(end)
        del self.nodes[folded["id"]]
        left, top = (min(n["pos"][axis] for n in inner["nodes"]) for axis in (0, 1))
        width = max(n["pos"][0] + n["size"][0] for n in inner["nodes"]) - left
        dx, dy = folded["pos"][0] - left, folded["pos"][1] - top
        for n in self.nodes.values():
            if n["pos"][0] > folded["pos"][0]:
                n["pos"] = [n["pos"][0] + width - folded["size"][0], n["pos"][1]]
        number: dict[int, int] = {}
        for n in inner["nodes"]:
            number[n["id"]] = n["id"] if n["id"] not in self.nodes else max([*self.nodes, *number.values()]) + 1
            n["pos"] = [n["pos"][0] + dx, n["pos"][1] + dy]
            for given in n.get("inputs", []):
                given["link"] = None
            for made in n.get("outputs", []):
                made["links"] = []
            n["id"] = number[n["id"]]
            self.nodes[n["id"]] = n
        for group in inner.get("groups", []):
            x, y, *size = group["bounding"]
            self.groups.append(group | {"id": len(self.groups) + 1, "bounding": [x + dx, y + dy, *size]})
        for link in inner["links"]:
            origin, output, target, slot = (link[k] for k in ("origin_id", "origin_slot", "target_id", "target_slot"))
            if origin == INSIDE:
                came = into.get(inner["inputs"][output]["name"])
                if came is not None and target != OUTSIDE:
                    self.connect(came[0], came[1], number[target], slot, link["type"])
            elif target == OUTSIDE:
                for consumer, of_consumer in outputs[slot]:
                    self.connect(number[origin], output, consumer, of_consumer, link["type"])
            else:
                self.connect(number[origin], output, number[target], slot, link["type"])

    def save(self) -> dict[str, Any]:
        """The editor's file."""
        for order, node in enumerate(self.nodes.values()):
            node["order"] = order
        return {
            "last_node_id": max(self.nodes),
            "last_link_id": max(self.links),
            "nodes": list(self.nodes.values()),
            "links": [[i, *link] for i, link in sorted(self.links.items())],
            "groups": self.groups,
            "config": {},
            "extra": {"ds": {"scale": 0.5, "offset": [400, 600]}},
            "version": 0.4,
        }

    def api(self, infos: dict[str, Any]) -> dict[str, Any]:
        """What a server runs: the nodes that are not muted or bypassed, their inputs by name."""
        made = {}
        for number, node in sorted(self.nodes.items()):
            if node["type"] in NOTES or node.get("mode") in (MUTED, BYPASSED):
                continue
            inputs: dict[str, Any] = dict(widgets(node, infos[node["type"]]))
            for given in node.get("inputs", []):
                source = self._source(given.get("link"))
                if source is not None:
                    inputs[given["name"]] = [str(source[0]), source[1]]
            made[str(number)] = {"class_type": node["type"], "inputs": inputs}
        return made

    def _source(self, link: int | None) -> tuple[int, int] | None:
        """Where a value comes from, past bypassed nodes; None where nothing comes."""
        while link is not None:
            origin, output, *_, kind = self.links[link]
            mode = self.nodes[origin].get("mode")
            if mode not in (MUTED, BYPASSED):
                return origin, output
            same = [x["link"] for x in self.nodes[origin]["inputs"] if x["type"] == kind]
            link = same[0] if mode == BYPASSED and same else None
        return None


def widgets(node: Node, info: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(input, value) of a node's widgets: the editor keeps values by position, in the order of the server's definition."""
    values = iter(node.get("widgets_values") or [])

    def read(specs: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, (kind, *rest) in specs.items():
            options = rest[0] if rest else {}
            if not (isinstance(kind, list) or kind in WIDGETS) or options.get("forceInput"):
                continue
            value = next(values, options.get("default"))
            if value is None:  # an input younger than the template, and optional
                continue
            yield prefix + name, value
            if kind == "COMFY_DYNAMICCOMBO_V3":
                chosen = next(o for o in options["options"] if o["key"] == value)["inputs"]
                yield from read({**chosen.get("required", {}), **chosen.get("optional", {})}, f"{prefix}{name}.")
            elif options.get("control_after_generate"):
                next(values, None)

    yield from read({**info["input"].get("required", {}), **info["input"].get("optional", {})})


def insert(graph: Graph, infos: dict[str, Any]) -> None:
    """Sage3 Attention before every sampling, Sage3 Report after it."""
    for node in list(graph.nodes.values()):
        if node["type"] in SAMPLES | GUIDES and node.get("mode", 0) not in (MUTED, BYPASSED):
            slot = _slot(node["inputs"], "model")
            origin, output, *_ = graph.links[node["inputs"][slot]["link"]]
            sage = graph.add(_node("Sage3Attention", infos, [320, 260]), node)
            graph.connect(origin, output, sage, 0, "MODEL")
            graph.connect(sage, 0, node["id"], slot, "MODEL")
            for sampler in [node] if node["type"] in SAMPLES else list(_guided(graph, node)):
                report = graph.add(_node("Sage3Report", infos, [320, 220]), sampler)
                taken = [i for made in sampler["outputs"] if made["type"] == "LATENT" for i in made.get("links") or []]
                consumers = [graph.links[i] for i in taken]
                graph.connect(sage, 0, report, 0, "MODEL")
                graph.connect(sampler["id"], consumers[0][1] if consumers else 0, report, 1, "LATENT")
                for _, _, target, at, _ in consumers:
                    graph.connect(report, 1, target, at, "LATENT")


def _guided(graph: Graph, guider: Node) -> Iterator[Node]:
    for link in guider["outputs"][0].get("links") or []:
        yield graph.nodes[graph.links[link][2]]


def _node(kind: str, infos: dict[str, Any], size: list[int]) -> Node:
    """A node of ours with its default values."""
    info = infos[kind]
    specs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    typed = {name: spec for name, spec in specs.items() if isinstance(spec[0], list) or spec[0] in WIDGETS}
    values = [spec[1].get("default", spec[0][0] if isinstance(spec[0], list) else None) for spec in typed.values()]
    return {
        "type": kind,
        "size": size,
        "flags": {},
        "mode": 0,
        "inputs": [{"name": n, "type": s[0], "link": None} for n, s in specs.items() if n not in typed],
        "outputs": [
            {"name": name, "type": made, "links": []} for name, made in zip(info["output_name"], info["output"], strict=True)
        ],
        "properties": {"cnr_id": "comfy-sage3", "Node name for S&R": kind},
        "widgets_values": values,
    }


def _slot(inputs: list[dict[str, Any]], name: str) -> int:
    return [x["name"] for x in inputs].index(name)


def _overlap(a: Any, size_a: Any, b: Any, size_b: Any, gap: int = 40) -> bool:
    return all(a[i] < b[i] + size_b[i] + gap and b[i] < a[i] + size_a[i] + gap for i in (0, 1))


def fetch(server: str, path: str) -> Any:
    """JSON from the server."""
    with urllib.request.urlopen(f"{server}{path}", timeout=60) as answer:
        return json.load(answer)


def main() -> None:
    """Convert one template, or those that are shipped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, metavar="URL")
    parser.add_argument("template", nargs="?", help="a file, or the name of a template that the server has")
    parser.add_argument("--out", type=Path, metavar="NAME.json", help="where to write it")
    parser.add_argument("--shipped", action="store_true", help="make the files beside this script again")
    args = parser.parse_args()
    if args.shipped == bool(args.template and args.out):
        parser.error("give a template and --out, or --shipped alone")
    infos = fetch(args.server, "/object_info")
    here = Path(__file__).parent
    wanted = {here / f"{name}.json": template for name, template in SHIPPED.items()}
    for out, template in (wanted if args.shipped else {args.out: args.template}).items():
        file = Path(template)
        saved = json.loads(file.read_text("utf-8")) if file.is_file() else fetch(args.server, f"/templates/{template}.json")
        graph = Graph(saved)
        insert(graph, infos)
        (out.parent / "api").mkdir(exist_ok=True)
        for path, made in ((out, graph.save()), (out.parent / "api" / out.name, graph.api(infos))):
            path.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
