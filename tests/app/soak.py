"""``python -m tests.app.soak --minutes 30``: two clients compare without a pause; memory is to stay flat and no file behind.

Prints resident memory and the app's files each minute. Ends with 1 where memory grew by more than a tenth after the first
quarter, or where the temporary folder outlived the app.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

import gradio_client

from comfy_sage3.app.launch import private_folder, start
from comfy_sage3.app.services import Services

from .conftest import FakeEngine
from .test_api import SMALL


def resident() -> float:
    """MiB of this process, which is the app's and the clients'."""
    with open("/proc/self/status", encoding="utf-8") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    minutes = parser.parse_args().minutes
    ends, seen, runs = time.monotonic() + 60 * minutes, [], [0, 0]
    with tempfile.TemporaryDirectory() as out, private_folder() as folder:
        page, address = start(Services(Path(out), open_engine=lambda name: FakeEngine(0.01)), host="127.0.0.1", port=0)

        def visit(i: int) -> None:
            while time.monotonic() < ends:
                client = gradio_client.Client(address, verbose=False)
                frames = 1 if runs[i] % 3 == 0 else 5  # a still now and then: those make files
                client.predict(*[*SMALL[:6], frames, *SMALL[7:]], api_name="/compare")
                client.close()
                runs[i] += 1

        visitors = [threading.Thread(target=visit, args=(i,), daemon=True) for i in range(2)]
        for visitor in visitors:
            visitor.start()
        while time.monotonic() < ends:
            time.sleep(min(60, max(1, 6 * minutes)))
            files = [path for path in folder.rglob("*") if path.is_file()]
            size = sum(path.stat().st_size for path in files) / 2**20
            seen.append(resident())
            print(f"{sum(runs)} runs, {seen[-1]:.0f} MiB, {len(files)} files of {size:.1f} MiB", flush=True)
        for visitor in visitors:
            visitor.join(60)
        page.close(verbose=False)
    settled = seen[len(seen) // 4]
    print(f"memory {settled:.0f} to {seen[-1]:.0f} MiB; temporary folder {'left behind' if folder.exists() else 'gone'}")
    return 1 if folder.exists() or seen[-1] > 1.1 * settled else 0


if __name__ == "__main__":
    sys.exit(main())
