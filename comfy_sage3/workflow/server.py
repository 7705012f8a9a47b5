"""Start a ComfyUI from a checkout for one run, in a folder of its own, and end it whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import EngineError, InputError
from .client import ComfyClient

PACK_NAME = "comfy-sage3"
HOST = "127.0.0.1"
START_SECONDS = 180.0


@contextlib.contextmanager
def serve(
    comfyui: Path, *, python: Path | None = None, port: int | None = None, cpu: bool | None = None
) -> Iterator[ComfyClient]:
    """A client of a server started from the checkout ``comfyui`` with this pack as its only custom node.

    The server's custom nodes, outputs and settings live in a temporary folder; its models and inputs are
    those of the checkout. ``cpu`` None asks that Python's torch whether there is a GPU. Raises InputError for
    a path that is no ComfyUI or a port in use, EngineError when the server does not come up. The server ends
    with the block.
    """
    if not (comfyui / "main.py").is_file() or not (comfyui / "comfy").is_dir():
        raise InputError(f"{comfyui} is not a ComfyUI folder (no main.py and comfy/ in it): give the path of a checkout.")
    comfyui = comfyui.resolve()
    interpreter = find_python(comfyui, python)
    if port is not None:
        _check_free(port)
    base = Path(tempfile.mkdtemp(prefix="comfy-sage3-"))
    try:
        with _ended_by_signals(), (base / "server.log").open("wb") as log:
            command = _command(comfyui, interpreter, base, port or _free_port(), _wants_cpu(interpreter, cpu))
            process = subprocess.Popen(
                command,
                cwd=comfyui,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # so that Ctrl-C reaches us alone and we end the server in order
            )
            try:
                with ComfyClient(f"http://{HOST}:{command[command.index('--port') + 1]}") as client:
                    _wait_until_up(client, process, base / "server.log")
                    yield client
            finally:
                _end(process)
    finally:
        shutil.rmtree(base, ignore_errors=True)


def find_python(comfyui: Path, python: Path | None = None) -> Path:
    """The Python to run ComfyUI with: the one given, else the checkout's own environment's, else this one."""
    if python is not None:
        if shutil.which(python) is None:
            raise InputError(f"{python} is not a program that can be run: give the Python of ComfyUI's environment.")
        return python
    inside = [f"{venv}/{exe}" for venv in (".venv", "venv") for exe in ("bin/python", "Scripts/python.exe")]
    for place in (*inside, "../python_embeded/python.exe"):
        if (comfyui / place).exists():
            return comfyui / place
    return Path(sys.executable)


def pack_folder() -> Path:
    """The folder that ComfyUI is to load as a custom node: the checkout this package lies in."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "__init__.py").is_file() or not (root / "web").is_dir():
        raise EngineError(f"{root} is not a checkout of this project, so ComfyUI cannot load it: run this from a git clone.")
    return root


def _command(comfyui: Path, python: Path, base: Path, port: int, cpu: bool) -> list[str]:
    nodes = base / "custom_nodes"
    nodes.mkdir()
    try:
        (nodes / PACK_NAME).symlink_to(pack_folder(), target_is_directory=True)
    except OSError as error:
        raise EngineError(f"A link to the pack cannot be made ({error}): start ComfyUI yourself and use --server.") from None
    command = [str(python), "main.py", "--listen", HOST, "--port", str(port), "--base-directory", str(base)]
    command += ["--disable-auto-launch", "--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK_NAME]
    command += ["--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
    models = comfyui / "models"
    if models.is_dir():
        # JSON is YAML too; each folder of models under its own name, as ComfyUI itself names them
        folders = {d.name: d.name for d in sorted(models.iterdir()) if d.is_dir()}
        config = base / "models.yaml"
        config.write_text(json.dumps({"checkout": {"base_path": str(models), **folders}}), encoding="utf-8")
        command += ["--extra-model-paths-config", str(config)]
    if (comfyui / "input").is_dir():
        command += ["--input-directory", str(comfyui / "input")]
    return [*command, "--cpu"] if cpu else command


def _wants_cpu(python: Path, cpu: bool | None) -> bool:
    if cpu is not None:
        return cpu
    question = "import torch; print(torch.cuda.is_available() or torch.backends.mps.is_available())"
    asked = subprocess.run([str(python), "-c", question], capture_output=True, text=True, check=False)
    if asked.returncode:
        reason = (asked.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise EngineError(f"{python} cannot import torch ({reason}): give ComfyUI's own Python with --python.")
    return asked.stdout.strip() != "True"


def _wait_until_up(client: ComfyClient, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise EngineError(f"ComfyUI stopped while starting (exit status {process.returncode}): {_last_words(log)}")
        with contextlib.suppress(EngineError):
            client.system_stats()
            return
        time.sleep(0.25)
    raise EngineError(f"ComfyUI did not answer within {START_SECONDS:g} s of starting: {_last_words(log)}")


def _last_words(log: Path) -> str:
    lines = [x.strip() for x in log.read_text(encoding="utf-8", errors="replace").splitlines() if x.strip()]
    errors = [x for x in lines if "Error" in x]
    return (errors or lines or ["it printed nothing"])[-1]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server and what it started; a second Ctrl-C meanwhile does not leave it behind."""
    for stop, seconds in ((signal.SIGTERM, 10.0), (getattr(signal, "SIGKILL", signal.SIGTERM), 10.0)):
        if process.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, stop) if hasattr(os, "killpg") else process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
        except KeyboardInterrupt:
            process.kill()
            raise


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that the blocks that end the server run (main thread only)."""
    try:
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that has just ended does not count
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise InputError(f"Port {port} cannot be used ({error}): give another, or leave --port out.") from None
