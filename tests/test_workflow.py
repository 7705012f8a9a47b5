"""The headless runner: documents, the client against a small server, and a server of its own."""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from comfy_sage3.cli import main
from comfy_sage3.errors import EngineError, InputError
from comfy_sage3.workflow import ComfyClient, OutputFile, load_workflow, serve
from comfy_sage3.workflow import server as server_module
from comfy_sage3.workflow.document import set_input

ROOT = Path(__file__).resolve().parents[1]
# the bundled model's; those for real models: tests/comfyui/test_workflows.py
OWN = ("text_to_video", "text_to_video_ab", "text_to_video_ab_latent", "calibrate_then_run")
WORKFLOWS = [ROOT / "workflows" / "api" / f"{name}.json" for name in OWN]
SMALL = {"1": {"class_type": "Source", "inputs": {"text": "a", "n": 2}}}


# --- documents ---


def write(path, data):
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_shipped_workflows_are_sound(path):
    workflow = load_workflow(path)
    for key, node in workflow.items():
        for value in node["inputs"].values():
            if isinstance(value, list):
                assert value[0] in workflow, f"node {key} links to a node that is not there"
    if "_ab" not in path.stem:
        return
    samplers = [n["inputs"] for n in workflow.values() if n["class_type"] == "KSampler"]
    kinds = [workflow[s["model"][0]]["inputs"]["precision"] for s in samplers]
    assert sorted(kinds) == ["exact", "fp4"]
    same = [{k: v for k, v in s.items() if k != "model"} for s in samplers]
    assert same[0] == same[1], "the two sides may differ in nothing but attention"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_the_editor_format_holds_the_same_graph(path):
    """Node for node and link for link; widget values are checked against a real server in tests/comfyui."""
    workflow = load_workflow(path)
    editor = json.loads((path.parent.parent / path.name).read_text())
    nodes = {str(n["id"]): n for n in editor["nodes"] if n["type"] != "MarkdownNote"}
    assert {k: n["type"] for k, n in nodes.items()} == {k: n["class_type"] for k, n in workflow.items()}
    assert editor["last_node_id"] == max(n["id"] for n in editor["nodes"])
    assert editor["last_link_id"] == max(x[0] for x in editor["links"])
    wanted = {
        (*value, key, name)
        for key, node in workflow.items()
        for name, value in node["inputs"].items()
        if isinstance(value, list)
    }
    found = set()
    for link, source, output, target, slot, kind in editor["links"]:
        socket_in, socket_out = nodes[str(target)]["inputs"][slot], nodes[str(source)]["outputs"][output]
        assert socket_in["link"] == link
        assert link in socket_out["links"]
        assert socket_in["type"] == socket_out["type"] == kind
        found.add((str(source), output, str(target), socket_in["name"]))
    assert found == wanted
    for key, node in workflow.items():
        plain = [v for v in node["inputs"].values() if not isinstance(v, list)]
        shown = nodes[key]["widgets_values"]
        assert [v for v in shown if v != "fixed"] == plain


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "is not a workflow"),
        ("{}", "is not a workflow"),
        ({"1": {"inputs": {}}}, "node '1'"),
        ({"1": "x"}, "node '1'"),
        ({"nodes": [], "links": []}, "editor's format"),
    ],
)
def test_other_files_are_refused(tmp_path, content, says):
    with pytest.raises(InputError, match=says):
        load_workflow(write(tmp_path / "w.json", content))


def test_the_editor_format_points_to_its_sibling(tmp_path):
    write(tmp_path / "w.json", SMALL)
    with pytest.raises(InputError, match=r"or give .*w\.json\.$"):
        load_workflow(write(tmp_path / "w.ui.json", {"nodes": [], "links": []}))
    (tmp_path / "api").mkdir()
    write(tmp_path / "api" / "v.json", SMALL)
    with pytest.raises(InputError, match=r"or give .*api.v\.json\.$"):
        load_workflow(write(tmp_path / "v.json", {"nodes": [], "links": []}))


def test_missing_files_folders_and_bytes(tmp_path):
    with pytest.raises(InputError, match="no workflow file"):
        load_workflow(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot be read"):
        load_workflow(tmp_path)
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not valid JSON"):
        load_workflow(tmp_path / "b.json")


def test_a_request_body_is_unwrapped(tmp_path):
    assert load_workflow(write(tmp_path / "w.json", {"prompt": SMALL, "client_id": "x"})) == SMALL


def test_set_input():
    workflow = json.loads(json.dumps(SMALL))
    set_input(workflow, "1.n=5")
    set_input(workflow, "1.text=a red circle = round")
    assert workflow["1"]["inputs"] == {"n": 5, "text": "a red circle = round"}
    for bad, says in (
        ("1.n", "NODE.INPUT"),
        ("n=1", "NODE.INPUT"),
        ("2.n=1", "no node"),
        ("1.m=1", "no input"),
    ):
        with pytest.raises(InputError, match=says):
            set_input(workflow, bad)


# --- the client, against a server that behaves as told ---


def text_frame(text, opcode=1, final=True):
    data = text.encode()
    size = bytes((len(data),)) if len(data) < 126 else b"\x7e" + struct.pack(">H", len(data))
    return bytes((opcode | (0x80 if final else 0),)) + size + data


class FakeComfy:
    """ComfyUI's HTTP API with one scripted prompt: ``history`` answer by answer, events as raw ``frames``."""

    def __init__(self):
        fake = self
        self.history = [{}, {"p1": done()}]  # one answer after another; the last one stays
        self.prompt_reply = (200, {"prompt_id": "p1", "number": 1, "node_errors": {}})
        self.queue = {"queue_running": [[0, "p1", {}]], "queue_pending": []}
        self.frames = b""
        self.pongs = b""
        self.posted = []
        self.files = {"video.webp": b"RIFF"}

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def reply(self, status, body):
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self):
                path, _, query = self.path.partition("?")
                if path == "/ws":
                    self.events()
                elif path.startswith("/history"):
                    self.reply(200, fake.history.pop(0) if len(fake.history) > 1 else fake.history[0])
                elif path == "/queue":
                    self.reply(200, fake.queue)
                elif path == "/system_stats":
                    self.reply(200, {"system": {"comfyui_version": "9.9.9", "pytorch_version": "2.13.0"}})
                elif path == "/view":
                    name = dict(x.split("=") for x in query.split("&"))["filename"]
                    found = fake.files.get(name)
                    self.reply(200 if found else 404, found or b"")
                elif path == "/object_info":
                    self.reply(200, b"<html>")
                else:
                    self.reply(404, {})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.posted.append((self.path, body))
                self.reply(*(fake.prompt_reply if self.path == "/prompt" else (200, {})))

            def events(self):
                self.close_connection = True
                if not fake.frames:
                    return self.reply(404, {})
                self.wfile.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n" + fake.frames[:5])
                self.wfile.flush()
                time.sleep(0.05)  # the frame is cut in two
                self.wfile.write(fake.frames[5:])
                self.connection.settimeout(0.5)
                with contextlib.suppress(OSError):
                    fake.pongs = self.connection.recv(100)
                return None

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def done(**outputs):
    return {"status": {"status_str": "success", "completed": True, "messages": []}, "outputs": outputs}


def failed(kind, data):
    return {"status": {"status_str": "error", "completed": False, "messages": [[kind, data]]}, "outputs": {}}


@pytest.fixture
def fake():
    made = FakeComfy()
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_submit_wait_and_download(fake):
    video = {"filename": "video.webp", "subfolder": "s", "type": "output"}
    fake.history[-1] = {"p1": done(**{"9": {"images": [video], "animated": [True]}, "8": {"text": ["36 calls"]}})}
    with ComfyClient(fake.url) as client:
        entry = client.wait(client.submit(SMALL))
        assert client.files(entry) == [OutputFile("9", "video.webp", "s", "output")]
        assert client.texts(entry) == {"8": "36 calls"}
        assert client.download(client.files(entry)[0]) == b"RIFF"
        with pytest.raises(EngineError, match="HTTP 404"):
            client.download(OutputFile("9", "other", "", "output"))
    assert fake.posted[0] == ("/prompt", {"prompt": SMALL, "client_id": client.client_id})


def test_progress_arrives_over_the_websocket(fake):
    def event(kind, **data):
        return json.dumps({"type": kind, "data": data | {"prompt_id": "p1"}})

    step = event("progress", node="3", value=1, max=4)
    fake.frames = (
        text_frame(event("executing", node="3"))
        + text_frame("ping!", opcode=9)
        + text_frame(step[:20], final=False)
        + text_frame(step[20:], opcode=0)  # a message in two fragments
        + text_frame("\x00\x01 a preview", opcode=2)
        + text_frame("not json")
        + text_frame(json.dumps({"type": "progress", "data": {"prompt_id": "another", "node": "5", "value": 9, "max": 9}}))
        + text_frame(event("status", filler="x" * 300))
        + text_frame(event("progress", node="3", value=4, max=4))
        + text_frame(event("executing", node=None))
    )
    fake.history = [{}, {"p1": done()}]
    seen = []
    with ComfyClient(fake.url) as client:
        client.wait(client.submit(SMALL), lambda *a: seen.append(a))
    assert seen == [("3", 0, 0), ("3", 1, 4), ("3", 4, 4)]
    time.sleep(0.1)
    assert fake.pongs[:2] == bytes((0x8A, 0x85))
    mask, body = fake.pongs[2:6], fake.pongs[6:11]
    assert bytes(b ^ m for b, m in zip(body, mask + mask, strict=False)) == b"ping!"


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (
            failed(
                "execution_error",
                {
                    "node_id": "4",
                    "node_type": "VAELoader",
                    "exception_type": "RuntimeError",
                    "exception_message": "no\n fit",
                },
            ),
            r"^Node 4 \(VAELoader\) failed: RuntimeError: no fit$",
        ),
        (failed("execution_interrupted", {}), "was interrupted"),
        (failed("execution_start", {}), "does not say why"),
    ],
)
def test_a_failing_node_is_named(fake, entry, says):
    fake.history = [{"p1": entry}]
    with ComfyClient(fake.url) as client, pytest.raises(EngineError, match=says):
        client.wait(client.submit(SMALL))


def test_a_message_of_hundreds_of_lines_is_cut(fake):
    data = {"node_id": "4", "node_type": "X", "exception_type": "E", "exception_message": "line\n" * 500}
    fake.history = [{"p1": failed("execution_error", data)}]
    with ComfyClient(fake.url) as client, pytest.raises(EngineError) as caught:
        client.wait(client.submit(SMALL))
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_a_refused_workflow_says_which_input(fake):
    errors = [{"message": "Value not in list", "details": "unet_name: 'x' not in []"}]
    node_errors = {"1": {"class_type": "UNETLoader", "errors": errors}}
    fake.prompt_reply = (
        400,
        {"error": {"message": "Prompt outputs failed validation"}, "node_errors": node_errors},
    )
    with ComfyClient(fake.url) as client:
        with pytest.raises(EngineError, match=r"node 1 \(UNETLoader\): Value not in list: unet_name"):
            client.submit(SMALL)
        fake.prompt_reply = (400, {"error": {"message": "Cannot execute", "details": "node X not found"}})
        with pytest.raises(EngineError, match="Cannot execute: node X not found"):
            client.submit(SMALL)
        fake.prompt_reply = (500, b"Internal")
        with pytest.raises(EngineError, match="Internal"):
            client.submit(SMALL)


def test_a_partly_refused_workflow_is_withdrawn(fake):
    node_errors = {"2": {"class_type": "Save", "errors": [{"message": "Required input is missing", "details": "x"}]}}
    fake.prompt_reply = (200, {"prompt_id": "p1", "node_errors": node_errors})
    with ComfyClient(fake.url) as client, pytest.raises(EngineError, match="refused part .*Required input"):
        client.submit(SMALL)
    assert fake.posted[1:] == [("/queue", {"delete": ["p1"]}), ("/interrupt", {"prompt_id": "p1"})]


def test_a_timeout_cancels(fake):
    fake.history = [{}]
    with ComfyClient(fake.url) as client, pytest.raises(EngineError, match=r"within 0\.2 s"):
        client.wait(client.submit(SMALL), timeout=0.2)
    assert ("/interrupt", {"prompt_id": "p1"}) in fake.posted


def test_a_forgotten_prompt_ends_the_wait(fake):
    fake.history = [{}]
    fake.queue = {"queue_running": [], "queue_pending": []}
    with ComfyClient(fake.url) as client, pytest.raises(EngineError, match="no longer knows"):
        client.wait(client.submit(SMALL))


def test_other_servers_and_no_server(fake):
    with pytest.raises(EngineError, match="is this a ComfyUI server"):
        ComfyClient(fake.url).object_info()
    with pytest.raises(EngineError, match="HTTP 404"):
        ComfyClient(fake.url).object_info("X")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(EngineError, match="No ComfyUI server can be reached at .*: start it"):
            ComfyClient(f"http://127.0.0.1:{taken.getsockname()[1]}").system_stats()
    for url in ("127.0.0.1:8188", "ftp://x", "http://"):
        with pytest.raises(InputError, match="address of a server"):
            ComfyClient(url)


# --- the command ---


def test_run_against_a_server(fake, tmp_path, capsys):
    items = [{"filename": "video.webp", "subfolder": "", "type": "output"}]
    fake.files["../../evil.webp"] = b"?"
    fake.history[-1] = {"p1": done(**{"1": {"images": items, "text": ["12 attention calls"]}})}
    path = write(tmp_path / "w.json", SMALL)
    status = main(["run", str(path), "--server", fake.url, "--out", str(tmp_path / "o"), "--set", "1.n=7"])
    assert status == 0
    printed = capsys.readouterr().out
    assert "ComfyUI 9.9.9" in printed
    assert "12 attention calls" in printed
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["1_video.webp", "outputs.json"]
    assert (tmp_path / "o" / "1_video.webp").read_bytes() == b"RIFF"
    assert fake.posted[0][1]["prompt"]["1"]["inputs"]["n"] == 7


def test_a_file_name_from_the_server_cannot_leave_the_folder(fake, tmp_path):
    from comfy_sage3.workflow.command import save

    fake.files["..%2F..%2Fevil.webp"] = b"?"
    entry = done(**{"1": {"images": [{"filename": "../../evil.webp", "type": "output"}]}})
    out = tmp_path / "a" / "b"
    out.mkdir(parents=True)
    saved = save(ComfyClient(fake.url), entry, out)
    assert [p.relative_to(out).as_posix() for p in saved] == ["1_evil.webp", "outputs.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_bad_input_is_one_sentence_and_leaves_nothing(fake, tmp_path, capsys):
    path = write(tmp_path / "w.json", SMALL)
    (tmp_path / "file").write_text("")
    blocked = str(tmp_path / "file" / "out")
    cases = [
        (["run", str(tmp_path / "none.json"), "--server", fake.url], "no workflow file"),
        (["run", str(path), "--server", fake.url, "--out", blocked], "Nothing can be written"),
        (["run", str(path), "--server", fake.url, "--port", "1", "--out", str(tmp_path / "o")], "--comfyui"),
        (
            ["run", str(path), "--comfyui", str(tmp_path), "--out", str(tmp_path / "o")],
            "is not a ComfyUI folder",
        ),
        (
            ["run", str(path), "--server", "http://127.0.0.1:9", "--out", str(tmp_path / "o")],
            "can be reached",
        ),
    ]
    for argv, says in cases:
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
    assert list((tmp_path / "o").iterdir()) == []


def test_a_broken_download_leaves_no_half_file(fake, tmp_path, monkeypatch):
    from comfy_sage3.workflow import command

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="No space left"):
        command._write(tmp_path / "x", b"123")
    assert list(tmp_path.iterdir()) == []


# --- a server of its own ---

FAKE_MAIN = """
import json, os, sys, time, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
here = os.path.dirname(os.path.abspath(__file__))
open(os.path.join(here, "argv.json"), "w").write(json.dumps(sys.argv))
open(os.path.join(here, "pid"), "w").write(str(os.getpid()))
base = sys.argv[sys.argv.index("--base-directory") + 1]
pack = os.path.realpath(os.path.join(base, "custom_nodes", "comfy-sage3"))
open(os.path.join(here, "pack"), "w").write(pack)
if os.path.exists(os.path.join(here, "fail")):
    print("starting"); print("ImportError: no module named x"); print("bye"); sys.exit(3)
class H(BaseHTTPRequestHandler):
    def log_message(self, *a): pass
    def send(self, data):
        data = json.dumps(data).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(data)))
        self.end_headers(); self.wfile.write(data)
    def do_GET(self):
        if self.path == "/queue": return self.send({"queue_running": [[0, "p1"]], "queue_pending": []})
        self.send({"system": {}} if self.path == "/system_stats" else {})
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        open(os.path.join(here, "posted"), "a").write(self.path + " ")
        self.send({"prompt_id": "p1"})
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), H).serve_forever()
"""


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "ComfyUI"
    for folder in ("comfy", "models/loras", "models/vae", "input"):
        (root / folder).mkdir(parents=True)
    (root / "main.py").write_text(textwrap.dedent(FAKE_MAIN))
    return root


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" if Path("/proc").exists() else True


def test_serve_starts_with_the_pack_and_ends(checkout):
    with serve(checkout, cpu=True) as client:
        assert client.system_stats() == {"system": {}}
        argv = json.loads((checkout / "argv.json").read_text())
        pid = int((checkout / "pid").read_text())
        config = json.loads(Path(argv[argv.index("--extra-model-paths-config") + 1]).read_text())
        assert alive(pid)
    assert "--cpu" in argv
    assert argv[argv.index("--listen") + 1] == "127.0.0.1"
    assert argv[argv.index("--whitelist-custom-nodes") + 1] == "comfy-sage3"
    assert argv[argv.index("--input-directory") + 1] == str(checkout / "input")
    assert config == {"checkout": {"base_path": str(checkout / "models"), "loras": "loras", "vae": "vae"}}
    assert (checkout / "pack").read_text() == str(ROOT)
    assert not alive(pid)
    assert not Path(argv[argv.index("--base-directory") + 1]).exists()


def test_serve_ends_the_server_on_any_exception(checkout):
    with pytest.raises(ZeroDivisionError), serve(checkout, cpu=True):
        raise ZeroDivisionError
    assert not alive(int((checkout / "pid").read_text()))


def test_a_server_that_dies_says_its_last_error(checkout):
    (checkout / "fail").write_text("")
    with (
        pytest.raises(EngineError, match=r"exit status 3\): ImportError: no module named x"),
        serve(checkout, cpu=True),
    ):
        pass


def test_a_port_in_use(checkout):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(InputError, match=f"Port {port} cannot be used"),
            serve(checkout, port=port, cpu=True),
        ):
            pass
    assert not (checkout / "pid").exists()


def test_a_python_that_cannot_be_run(checkout, tmp_path):
    with (
        pytest.raises(InputError, match="not a program"),
        serve(checkout, python=tmp_path / "no-python", cpu=True),
    ):
        pass


def test_the_checkouts_own_environment_is_preferred(checkout):
    assert server_module.find_python(checkout) == Path(sys.executable)
    own = checkout / "venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.write_text("")
    assert server_module.find_python(checkout) == own
    assert server_module.find_python(checkout, Path(sys.executable)) == Path(sys.executable)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_cancels_and_leaves_no_server(checkout, tmp_path, sent, status):
    path = write(tmp_path / "w.json", SMALL)
    command = [sys.executable, "-m", "comfy_sage3", "run", str(path), "--comfyui", str(checkout), "--cpu"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "o")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background shell ignores it
    )
    deadline = time.monotonic() + 60
    while not (checkout / "posted").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.3)
    process.send_signal(sent)
    _, error = process.communicate(timeout=30)
    assert process.returncode == status
    assert "Traceback" not in error
    assert "/interrupt" in (checkout / "posted").read_text()
    assert not alive(int((checkout / "pid").read_text()))
