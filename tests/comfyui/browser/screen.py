"""ComfyUI's page with the A/B workflow on it, and what the page complains of."""

from __future__ import annotations

import json
import os
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comfy_sage3.workflow import ComfyClient

ROOT = Path(__file__).resolve().parents[3]
FRAMES, STEPS, LAYERS = 9, 3, 6
HOSTS = ("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:")
# What ComfyUI's own page says on a fresh server, without this pack too: files of the user that are not there, a model that
# it would look up, a graph that one of its parts reads early; in 0.3.64, a setting that it changes before it is there.
COMFYUIS_OWN = (
    "the server responded with a status of 404",
    "huggingface.co",
    "ComfyApp graph accessed before initialization",
    "Cannot read properties of undefined (reading 'id') (at onChange in ComfyUI's files)",
)


@dataclass
class Screen:
    """The page, what it complained of, and what the server knows of its run."""

    client: ComfyClient
    page: Any
    renderer: str
    faults: list[str] = field(default_factory=list)
    outputs: dict[str, Any] = field(default_factory=dict)
    live: list[str] = field(default_factory=list)  # what the low-bit node said while it sampled

    def node(self, name: str, scale: float = 1.0) -> None:
        """Bring the node with this id into the middle."""
        self.page.evaluate(
            """([id, scale]) => {
                const node = app.graph.getNodeById(id), view = app.canvas.ds;
                const box = app.canvas.canvas.getBoundingClientRect();
                view.scale = scale;
                view.offset = [box.width / scale / 2 - node.pos[0] - node.size[0] / 2,
                               box.height / scale / 2 - node.pos[1] - node.size[1] / 2];
                app.canvas.setDirty(true, true);
            }""",
            [int(name), scale],
        )
        self.page.wait_for_timeout(400)

    def element(self, name: str, kind: str) -> Any:
        """The element of our widget on the node with this id."""
        return self.page.locator(f".sage3-{kind}[data-node='{name}']")

    def send(self, event: str, detail: dict[str, Any]) -> None:
        """Let the page hear an event as if the server had sent it."""
        self.page.evaluate(
            """([event, detail]) => window.comfyAPI.api.api.dispatchEvent(new CustomEvent(event, { detail }))""",
            [event, detail],
        )

    def picture(self, name: str) -> None:
        """Keep a screenshot, where that is wished."""
        if folder := os.environ.get("SAGE3_SCREENSHOTS"):
            self.page.screenshot(path=Path(folder) / f"{self.renderer}-{name}.png")


def post(client: ComfyClient, path: str, body: dict[str, Any]) -> None:
    request = urllib.request.Request(client.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=30).close()


def open_page(client: ComfyClient, browser: Any, renderer: str, **settings: Any) -> Screen:
    """ComfyUI's page, ready; whatever it asks of another host is refused."""
    fixed = {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": renderer == "vue", "Comfy.Locale": "en"}
    post(client, "/settings", fixed | {"Comfy.NodeSearchBoxImpl": "default"} | settings)
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    screen = Screen(client, page, renderer)
    page.route(lambda url: not url.startswith(HOSTS), lambda route: route.abort())
    page.on("pageerror", lambda error: screen.faults.append(told(error)))
    page.on("console", lambda said: said.type == "error" and screen.faults.append(said.text))
    page.on("response", lambda answer: answer.status >= 400 and screen.faults.append(f"{answer.status} {answer.url}"))
    page.goto(client.url)
    page.wait_for_function("() => window.app?.vueAppReady && window.app.extensionManager", timeout=60_000)
    page.wait_for_function("() => document.querySelector('link[href*=\"sage3.css\"]')", timeout=60_000)
    page.wait_for_timeout(1000)  # the default workflow, which a fresh page opens by itself
    return screen


def told(error: Any) -> str:
    """An error that nobody caught; if ComfyUI's own files raised it, with the function that did."""
    frames = [line.strip() for line in (error.stack or "").splitlines() if line.strip().startswith("at ")]
    if not frames or "/assets/" not in frames[0]:
        return str(error)
    return f"{error} ({frames[0].split(' (')[0]} in ComfyUI's files)"


def ours(fault: str) -> bool:
    """Whether a complaint of the page is not one of ComfyUI's own."""
    if fault[:3].isdigit():
        return any(part in fault for part in ("comfy-sage3", "/sage3/", "/view"))
    return not any(known in fault for known in COMFYUIS_OWN)


def workflow(seed: int, name: str = "text_to_video_ab") -> dict[str, Any]:
    """The A/B workflow as the editor opens it, at test size."""
    made = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    for node in made["nodes"]:
        values = node.get("widgets_values")
        if node["type"] == "EmptyHunyuanLatentVideo":
            values[:3] = [64, 64, FRAMES]
        elif node["type"] == "KSampler":
            values[0], values[2] = seed, STEPS
        elif node["type"] == "Sage3Attention":
            values[3] = 16
    return made
