"""The ComfyUI engine against a small server that speaks the few words of ComfyUI's API it needs."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import queue
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from PIL import Image

from comfy_sage3.cli import main
from comfy_sage3.compare.comfyui_engine import NEEDED_NODES, ComfyUIEngine, prompt_graph, read_report
from comfy_sage3.compare.engine import EMULATED_NOTE, Request, Side
from comfy_sage3.compare.measure import compare
from comfy_sage3.demo.sizes import GPU_SIZE, MIN_TOKENS, Size
from comfy_sage3.errors import EngineError
from comfy_sage3.precision import Precision

SIZE = Size(32, 16, 5)
REQUEST = Request("a red circle on a black background", SIZE, seed=7, steps=2)
EXACT, FP4 = Side("A", Precision.EXACT), Side("B", Precision.FP4)


class Server(ThreadingHTTPServer):
    """Runs prompts at once: events over /ws, then a history entry. ``slow`` is what one step takes, by
    precision.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.prompts: list[dict] = []
        self.history: dict[str, dict] = {}
        self.events: queue.Queue = queue.Queue()
        self.nodes = set(NEEDED_NODES)
        self.slow = {"exact": 0.05, "fp4": 0.02}
        self.cached: list[str] = []
        self.deaf = False
        self.error: dict | None = None
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def tell(self, kind, prompt_id, **data):
        self.events.put(json.dumps({"type": kind, "data": {"prompt_id": prompt_id, **data}}))

    def execute(self, prompt_id, graph):
        precision = graph["attention"]["inputs"]["precision"]
        start = time.time()
        for node in graph:
            self.tell("executing", prompt_id, node=node)
            if node == "sampler":
                steps = graph[node]["inputs"]["steps"]
                for i in range(steps):
                    time.sleep(self.slow[precision])
                    self.tell("progress", prompt_id, node=node, value=i + 1, max=steps)
        kernel = "exact" if precision == "exact" else f"{precision}-emulated"
        line = {"wished": precision, "kernel": kernel, "reason": "asked for", "fell_back": False, "calls": 24}
        outputs = {"report": {"text": ["for people"], "sage3": [line]}}
        if "frames" in graph:
            names = [f"{precision}_{i}.png" for i in range(SIZE.frames)]
            outputs["frames"] = {"images": [{"filename": n, "subfolder": "", "type": "temp"} for n in names]}
        messages = [["execution_start", {"timestamp": int(start * 1000)}]]
        messages.append(["execution_cached", {"nodes": self.cached}])
        messages.append(["execution_success", {"timestamp": int(time.time() * 1000)}])
        status = {"status_str": "success", "completed": True, "messages": messages}
        if self.error:
            outputs, status = (
                {},
                {"status_str": "error", "completed": False, "messages": [["execution_error", self.error]]},
            )
        self.history[prompt_id] = {"outputs": outputs, "status": status}
        self.tell("executing", prompt_id, node=None)


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, data, kind="application/json"):
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        path = urlsplit(self.path)
        words = path.path.strip("/").split("/")
        if words[0] == "ws":
            self.stream()
        elif words[0] == "system_stats":
            system = {
                "comfyui_version": "0.33.0",
                "pytorch_version": "2.13.0",
                "python_version": "3.11.2 (x)",
            }
            self.answer({"system": system, "devices": [{"name": "cpu", "type": "cpu"}]})
        elif words[0] == "object_info":
            self.answer({words[1]: {}} if words[1] in self.server.nodes else {})
        elif words[0] == "history":
            entry = self.server.history.get(words[1])
            self.answer({words[1]: entry} if entry else {})
        elif words[0] == "queue":
            waiting = [[0, f"p{i}"] for i in range(len(self.server.prompts)) if f"p{i}" not in self.server.history]
            self.answer({"queue_running": waiting, "queue_pending": []})
        elif words[0] == "view":
            name = parse_qs(path.query)["filename"][0]
            precision, index = name.removesuffix(".png").split("_")
            buffer = io.BytesIO()
            Image.fromarray(frame(precision, int(index))).save(buffer, "PNG")
            self.answer(buffer.getvalue(), "image/png")
        else:
            self.send_error(404)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/prompt":
            prompt_id = f"p{len(self.server.prompts)}"
            self.server.prompts.append(body["prompt"])
            threading.Thread(target=self.server.execute, args=(prompt_id, body["prompt"]), daemon=True).start()
            self.answer({"prompt_id": prompt_id, "number": 0, "node_errors": {}})
        else:
            self.answer({})

    def stream(self):
        if self.server.deaf:
            self.send_error(404)
            return
        magic = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(magic.encode()).digest()).decode())
        self.end_headers()
        self.close_connection = True
        while True:
            payload = self.server.events.get().encode()
            try:
                self.wfile.write(bytes((0x81, 126)) + struct.pack(">H", len(payload)) + payload)
            except OSError:
                return


def frame(precision: str, index: int) -> np.ndarray:
    pixels = np.random.default_rng(index).integers(20, 200, (SIZE.height, SIZE.width, 3)).astype(np.uint8)
    return pixels if precision == "exact" else pixels + np.uint8(3)


@pytest.fixture
def server():
    running = Server()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def engine(server):
    engine = ComfyUIEngine(server.url)
    yield engine
    engine.close()


def test_a_whole_comparison(engine, server):
    c = compare(engine, REQUEST, EXACT, FP4, repeats=2)
    m = c.metrics
    np.testing.assert_array_equal(c.videos["b"], np.stack([frame("fp4", i) for i in range(SIZE.frames)]))
    assert m["environment"]["comfyui"] == "0.33.0"
    assert m["environment"]["server"] == server.url
    assert m["quality"]["replay"] is None
    assert m["quality"]["end_to_end"]["noise_floor"]["identical"] is True
    assert "two runs" in m["quality"]["noise_floor_method"]
    assert m["sides"]["b"]["report"] == [
        {"wished": "fp4", "kernel": "fp4-emulated", "reason": "asked for", "fell_back": False, "calls": 24}
    ]
    assert m["note"] == EMULATED_NOTE
    assert m["timing"]["a_over_b"] is None
    a, b = (m["timing"][k] for k in "ab")
    assert 0.08 <= a["sampling_seconds"]["min"] < 0.5
    assert 0.03 <= b["sampling_seconds"]["min"] < a["sampling_seconds"]["min"]
    assert len(a["step_seconds"]["values"]) == 4
    assert a["attention_seconds"] is None
    assert a["peak_memory_bytes"] is None
    assert a["decode_seconds"] is not None


def test_prompts_differ_only_in_the_attention_node_and_none_can_come_from_the_cache(engine, server):
    three = dataclasses.replace(REQUEST, steps=3)
    compare(engine, three, EXACT, FP4, repeats=2)
    timed = [g for g in server.prompts if "frames" not in g and g["sampler"]["inputs"]["steps"] == 3]
    settings = []
    for graph in timed:
        inputs = graph["attention"]["inputs"]
        assert 0.9999 < inputs["end_percent"] < 1  # leaves out no step
        settings.append((inputs["precision"], inputs["end_percent"]))
        assert {k: v for k, v in graph.items() if k != "attention"} == {
            k: v for k, v in timed[0].items() if k != "attention"
        }
    assert [p for p, _ in settings] == ["exact", "fp4", "exact", "fp4", "exact"]
    assert len(set(settings)) == len(settings)


def test_the_graph_asks_for_what_the_request_says():
    graph = prompt_graph(REQUEST, Side("B", Precision.INT8, emulate=False))
    assert graph["sampler"]["inputs"]["seed"] == 7
    assert graph["shift"]["inputs"]["shift"] == 3.0
    assert graph["latent"]["inputs"] == {"width": 32, "height": 16, "length": 5, "batch_size": 1}
    assert graph["positive"]["inputs"]["text"] == REQUEST.prompt
    assert (graph["attention"]["inputs"]["precision"], graph["attention"]["inputs"]["emulate"]) == (
        "int8",
        False,
    )
    assert graph["attention"]["inputs"]["min_tokens"] == MIN_TOKENS
    assert prompt_graph(REQUEST, Side("B", Precision.FP4, min_tokens=9))["attention"]["inputs"]["min_tokens"] == 9
    for node in graph.values():
        for value in node["inputs"].values():
            assert not isinstance(value, list) or value[0] in graph


def test_the_graph_takes_the_shift_of_its_size_unless_one_is_given():
    for request, shift in (
        (dataclasses.replace(REQUEST, size=GPU_SIZE, shift=None), 7.0),
        (dataclasses.replace(REQUEST, size=GPU_SIZE, shift=5.0), 5.0),
    ):
        assert prompt_graph(request, FP4)["shift"]["inputs"]["shift"] == shift


def test_without_events_the_servers_own_times_stand_in(server):
    server.deaf = True
    engine = ComfyUIEngine(server.url)
    g = engine.generate(REQUEST, EXACT, lambda done, steps: None)
    assert 0.09 <= g.seconds_total < 2
    assert g.seconds_per_step == []


def test_an_answer_from_the_cache_is_refused(engine, server):
    server.cached = ["model", "sampler"]
    with pytest.raises(EngineError, match="answered from its cache"):
        engine.generate(REQUEST, EXACT, lambda done, steps: None)


def test_a_failing_node_is_named(engine, server):
    server.error = {
        "node_id": "sampler",
        "node_type": "KSampler",
        "exception_type": "RuntimeError",
        "exception_message": "out of memory",
    }
    with pytest.raises(EngineError, match="KSampler.*out of memory"):
        engine.generate(REQUEST, EXACT, lambda done, steps: None)


def test_a_server_without_the_pack_is_told_what_to_do(engine, server):
    server.nodes.discard("Sage3Attention")
    with pytest.raises(EngineError, match="has no node Sage3Attention: put this pack into its custom_nodes"):
        engine.check(REQUEST, (EXACT, FP4))


def test_an_unreachable_server_is_one_sentence_and_leaves_nothing(tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["compare", "--engine", "comfyui", "--server", f"http://127.0.0.1:{port}"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: No ComfyUI server can be reached at")
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_runs_on_a_server(server, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["compare", "--engine", "comfyui", "--server", server.url, "--size", "32x16x5"]
    prompt = ["--prompt", REQUEST.prompt, "--steps", "2", "--repeats", "1"]
    assert main([*arguments, *prompt, "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert EMULATED_NOTE in told
    assert f"--server {server.url}" in (out / "report.html").read_text()
    assert not (out / "attention_error.png").exists()


LINES = [
    {"wished": "fp4", "kernel": "fp4-sm120", "reason": "asked for", "fell_back": False, "calls": 20},
    {"wished": "fp4", "kernel": "int8-sm89", "reason": "head_dim: 160 x 2", "fell_back": True, "calls": 10},
    {"wished": "exact", "kernel": "exact", "reason": "fewer than 64 tokens", "fell_back": False, "calls": 30},
]


@pytest.mark.parametrize("lines", [LINES, []])
def test_the_nodes_own_lines_are_taken_as_they_are(lines):
    entry = {"outputs": {"report": {"text": ["5 x exact: for people"], "sage3": lines}}}
    assert read_report(entry) == lines


@pytest.mark.parametrize(
    "outputs",
    [
        {},
        {"report": {"text": ["20 x fp4-sm120: asked for"]}},
        {"report": {"sage3": "20 x fp4-sm120"}},
        {"report": {"sage3": [{"kernel": "exact"}]}},
        {"report": {"sage3": [LINES[0] | {"calls": "20"}]}},
    ],
)
def test_a_server_whose_report_has_no_such_data_is_told_what_to_do(outputs):
    with pytest.raises(EngineError, match="does not say what ran as data: update this pack"):
        read_report({"outputs": outputs})
