"""``python -m tests.app.soak --minutes 30``: two clients compare without a pause; memory is to stay flat and no file behind.

Prints resident memory and the app's files each minute. Ends with 1 where memory grew by more than a tenth after the first
quarter, or where the temporary folder outlived the app.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gradio_client

from comfy_sage3.app.launch import private_folder, start
from comfy_sage3.app.services import Services

from .conftest import FakeEngine
from .test_api import SMALL


def resident() -> float:
    """MiB of this process, which is the app's alone: the clients have their own."""
    with open("/proc/self/status", encoding="utf-8") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def visit(address: str, minutes: float) -> int:
    """Come, compare, leave, again and again; a still now and then, which makes files."""
    ends, runs = time.monotonic() + 60 * minutes, 0
    while time.monotonic() < ends:
        client = gradio_client.Client(address, verbose=False)
        client.predict(*[*SMALL[:6], 1 if runs % 3 == 0 else 5, *SMALL[7:]], api_name="/compare")
        client.close()
        runs += 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--visit", metavar="ADDRESS", help="be one of the clients")
    args = parser.parse_args()
    if args.visit:
        return visit(args.visit, args.minutes)
    ends, seen = time.monotonic() + 60 * args.minutes, []
    with tempfile.TemporaryDirectory() as out, private_folder() as folder:
        page, address = start(Services(Path(out), open_engine=lambda name: FakeEngine(0.01)), host="127.0.0.1", port=0)
        argv = [sys.executable, "-m", "tests.app.soak", "--minutes", str(args.minutes), "--visit", address]
        visitors = [subprocess.Popen(argv) for _ in range(2)]
        while time.monotonic() < ends:
            time.sleep(min(60, max(1, 6 * args.minutes)))
            files = [path for path in folder.rglob("*") if path.is_file()]
            size, runs = sum(path.stat().st_size for path in files) / 2**20, len(list(Path(out).iterdir()))
            seen.append(resident())
            print(f"{runs} runs, {seen[-1]:.0f} MiB, {len(files)} files of {size:.1f} MiB", flush=True)
        failed = [visitor.wait(120) for visitor in visitors]
        page.close(verbose=False)
    settled = seen[len(seen) // 4]
    print(f"memory {settled:.0f} to {seen[-1]:.0f} MiB; temporary folder {'left behind' if folder.exists() else 'gone'}")
    return 1 if any(failed) or folder.exists() or seen[-1] > 1.1 * settled else 0


if __name__ == "__main__":
    sys.exit(main())
