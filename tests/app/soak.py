"""``python -m tests.app.soak --minutes 30``: two clients compare without a pause; memory is to stay flat and no file behind.

Once a minute the clients wait for each other, and what the app then holds is printed, with the most that it held while it
worked, its threads and its files. Ends with 1, and says why, where the line fitted through the memory of the second half
rises by more than ``BAR`` of it over that half, where a client failed, or where anything is left in the temporary folder
after the app is closed. The first half is for caches that fill: ten minutes are the least.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import gradio_client
import numpy as np

from comfy_sage3.app.launch import private_folder, start
from comfy_sage3.app.memory import give_back
from comfy_sage3.app.services import Services

from .conftest import FakeEngine
from .test_api import SMALL

BAR = 0.02
EACH = 1.0  # seconds between two looks at the memory while the app works
REST = 60.0  # seconds between two at rest
PAUSE = "pause"  # a file in the clients' folder: they wait while it is there, and say so by another


def resident() -> float:
    """MiB of this process, which is the app's alone: the clients have their own."""
    with open("/proc/self/status", encoding="utf-8") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def rise(seen: list[tuple[float, float]]) -> tuple[float, float]:
    """Of (seconds, MiB): the mean of the later half, and by how much the line fitted through it rises from end to end."""
    times, sizes = np.array(seen[len(seen) // 2 :]).T
    slope = float(np.polyfit(times - times.mean(), sizes, 1)[0])
    return float(sizes.mean()), slope * float(times[-1] - times[0])


def visit(address: str, minutes: float) -> int:
    """Come, compare, leave, again and again; a still now and then, which makes files."""
    ends, runs = time.monotonic() + 60 * minutes, 0
    pause = Path(tempfile.gettempdir()) / PAUSE
    waits = pause.with_name(f"waits-{os.getpid()}")
    while time.monotonic() < ends:
        if pause.exists():
            waits.touch()
            time.sleep(0.1)
            continue
        client = gradio_client.Client(address, verbose=False)
        client.predict(*[*SMALL[:6], 1 if runs % 3 == 0 else 5, *SMALL[7:]], api_name="/compare")
        client.close()
        runs += 1
    return 0


def at_rest(theirs: Path, clients: int) -> float:
    """MiB while no client asks for anything."""
    for late in theirs.glob("waits-*"):  # of the last time
        late.unlink()
    (theirs / PAUSE).touch()
    until = time.monotonic() + 120
    while len(list(theirs.glob("waits-*"))) < clients and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(1)  # what follows a run, in gradio's threads
    gc.collect()  # what is no longer reachable is not held, though Python may not have looked yet
    give_back()
    found = resident()
    (theirs / PAUSE).unlink()
    return found


def soak(minutes: float, out: Path) -> tuple[list[tuple[float, float]], bool]:
    """Run the app and its clients: (seconds, MiB) at rest, and whether every client ended well."""
    began, seen = time.monotonic(), []
    with private_folder() as folder, tempfile.TemporaryDirectory() as theirs:
        page, address = start(Services(out, open_engine=lambda name: FakeEngine(0.01)), host="127.0.0.1", port=0)
        argv = [sys.executable, "-m", "tests.app.soak", "--minutes", str(minutes), "--visit", address]
        visitors = [subprocess.Popen(argv, env={**os.environ, "TMPDIR": theirs}) for _ in range(2)]
        rests, most = began + REST, 0.0
        while (now := time.monotonic()) < began + 60 * minutes:
            most = max(most, resident())
            if now >= rests:
                rests += REST
                seen.append((now - began, at_rest(Path(theirs), len(visitors))))
                files = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
                runs = len(list(out.iterdir())) if out.exists() else 0
                print(
                    f"{now - began:4.0f} s: {runs} runs, {seen[-1][1]:.0f} MiB, at most {most:.0f} MiB, "
                    f"{threading.active_count()} threads, {len(files)} files of {sum(files) / 2**20:.1f} MiB",
                    flush=True,
                )
                most = 0.0
            time.sleep(EACH)
        well = not any([visitor.wait(120) for visitor in visitors])
        page.close(verbose=False)
    return seen, well


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--visit", metavar="ADDRESS", help="be one of the clients")
    args = parser.parse_args()
    if args.visit:
        return visit(args.visit, args.minutes)
    with tempfile.TemporaryDirectory() as mine, tempfile.TemporaryDirectory() as out:
        tempfile.tempdir = mine  # so that whatever is left is the app's
        seen, well = soak(args.minutes, Path(out))
        left = sorted(str(path.relative_to(mine)) for path in Path(mine).rglob("*"))
    level, more = rise(seen)
    flat = more <= BAR * level
    print(f"{'flat' if flat else 'GROWING'}: {more:+.1f} MiB over the second half, by a fit, of {level:.0f} MiB")
    print(f"left in the temporary folder: {', '.join(left) or 'nothing'}")
    if not well:
        print("a client FAILED")
    return 0 if flat and well and not left else 1


if __name__ == "__main__":
    sys.exit(main())
