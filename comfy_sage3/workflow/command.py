"""``python -m comfy_sage3 run``: a workflow, a server, a folder of results."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import InputError
from .client import ComfyClient
from .document import Workflow, load_workflow, set_input
from .server import serve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``run``."""
    parser.add_argument("workflow", type=Path, help="a workflow in API format, such as workflows/api/text_to_video.json")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--server", metavar="URL", help="a running ComfyUI with this pack, such as http://127.0.0.1:8188")
    where.add_argument("--comfyui", type=Path, metavar="PATH", help="a ComfyUI checkout: start it for this run")
    parser.add_argument("--python", type=Path, metavar="EXE", help="with --comfyui: the Python to run it with")
    parser.add_argument("--port", type=int, help="with --comfyui: the port to use (default: a free one)")
    parser.add_argument("--cpu", action="store_true", default=None, help="with --comfyui: do not use the GPU")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the results go (default: runs/NAME)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NODE.INPUT=VALUE",
        dest="changes",
        help="change an input",
    )
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="give up and cancel after this long")


def run(args: argparse.Namespace) -> int:
    """Run the workflow and save what it made. Every failure is a Sage3Error of one sentence."""
    workflow = load_workflow(args.workflow)
    for change in args.changes:
        set_input(workflow, change)
    out = prepare(args.out or Path("runs") / args.workflow.stem)
    with _client(args) as client:
        system = client.system_stats().get("system", {})
        versions = [system.get(f"{name}_version", "?") for name in ("comfyui", "pytorch")]
        print(f"ComfyUI {versions[0]} with torch {versions[1]} at {client.url}")
        started = time.monotonic()
        entry = execute(client, workflow, args.timeout)
        print(f"finished in {time.monotonic() - started:.1f} s")
        saved = save(client, entry, out)
    for node, text in client.texts(entry).items():
        print(f"node {node} ({workflow.get(node, {}).get('class_type', '?')}):")
        print("\n".join(f"  {line}" for line in text.splitlines()))
    print("\n".join(f"saved {path}" for path in saved))
    return 0


def execute(client: ComfyClient, workflow: Workflow, timeout: float | None = None) -> dict[str, Any]:
    """Submit and wait, with a progress line on stderr; cancelled on the server when interrupted here."""
    prompt_id = client.submit(workflow)
    progress = _ProgressLine(workflow)
    try:
        return client.wait(prompt_id, progress, timeout)
    except (KeyboardInterrupt, SystemExit):
        client.cancel(prompt_id)
        raise
    finally:
        progress.end()


def prepare(out: Path) -> Path:
    """Make the folder for results before any work is done. Raises InputError where nothing can be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(f"Nothing can be written to {out} ({error.strerror}): give another folder with --out.") from None
    return out


def save(client: ComfyClient, entry: dict[str, Any], out: Path) -> list[Path]:
    """Download every output file into ``out``, and outputs.json with all that the nodes reported."""
    saved = []
    for file in client.files(entry):
        name = PurePosixPath(file.filename.replace("\\", "/")).name  # never a path of the server's choosing
        saved.append(_write(out / f"{file.node}_{name}", client.download(file)))
    record = {"status": entry.get("status"), "outputs": entry.get("outputs")}
    saved.append(_write(out / "outputs.json", json.dumps(record, indent=1).encode()))
    return saved


def _write(path: Path, data: bytes) -> Path:
    """Write through a neighbour and rename, so that a file is either whole or not there."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise InputError(f"{path} cannot be written ({error.strerror}): free some space or give another --out.") from None
    return path


def _client(args: argparse.Namespace) -> contextlib.AbstractContextManager[ComfyClient]:
    if args.server:
        if args.python or args.port is not None or args.cpu:
            raise InputError("--python, --port and --cpu start a server: use them with --comfyui, not with --server.")
        return ComfyClient(args.server)
    return serve(args.comfyui, python=args.python, port=args.port, cpu=args.cpu)


class _ProgressLine:
    """One line that is written over on a terminal; one line per node elsewhere."""

    def __init__(self, workflow: Workflow) -> None:
        self.workflow = workflow
        self.live = sys.stderr.isatty()
        self.width = 0

    def __call__(self, node: str, value: float, maximum: float) -> None:
        name = self.workflow.get(node, {}).get("class_type", "")
        if self.live:
            text = f"node {node} {name}" + (f" {value:.0f}/{maximum:.0f}" if maximum else "")
            print(f"\r{text:<{self.width}}", end="", file=sys.stderr, flush=True)
            self.width = len(text)
        elif not maximum or value == maximum:
            print(
                f"node {node} {name}" + (f" {value:.0f}/{maximum:.0f}" if maximum else ""),
                file=sys.stderr,
                flush=True,
            )

    def end(self) -> None:
        """Leave the line."""
        if self.live and self.width:
            print(file=sys.stderr)
