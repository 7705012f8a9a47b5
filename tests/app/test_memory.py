"""What a process freed goes back to the system; what the soak calls flat."""

import subprocess
import sys
import threading

import pytest

from comfy_sage3.app.memory import give_back

pytest.importorskip("gradio_client", reason="gradio_client is not installed")  # the soak's clients are its own
from .soak import BAR, resident, rise


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc keeps what was freed, and /proc tells of it")
def test_what_threads_freed_between_what_they_keep_is_given_back():
    kept = []

    def work():
        blocks = [bytearray(60_000) for _ in range(3000)]  # too small for a mapping of their own
        kept.extend(blocks[::100])
        kept.append(bytearray(100))  # at the end of the heap, so that it cannot shrink

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    before = resident()
    give_back()
    assert resident() < before - 100
    assert len(kept) == 62


SHARED = """
import ctypes, threading
from comfy_sage3.app.memory import one_heap

one_heap()
got = []
malloc = ctypes.CDLL("libc.so.6").malloc
malloc.restype = ctypes.c_void_p
barrier = threading.Barrier(6)

def work():
    barrier.wait()
    got.append(malloc(5000))
    barrier.wait()

threads = [threading.Thread(target=work) for _ in range(6)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
(heap,) = [line.split()[0].split("-") for line in open("/proc/self/maps") if line.rstrip().endswith("[heap]")]
low, high = (int(end, 16) for end in heap)
print(sum(low <= at < high for at in got), "of", len(got))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has heaps for threads, and /proc tells of them")
def test_threads_share_one_heap():
    """In a process of its own: a heap that a thread has already stays."""
    ran = subprocess.run([sys.executable, "-c", SHARED], capture_output=True, text=True, timeout=120)
    assert ran.stdout.strip() == "6 of 6", ran.stderr


def test_a_line_through_the_later_half_tells_growth_from_noise():
    wobbling = [(float(i), 500.0 + (i % 7) + (300.0 if i > 20 else 0.0)) for i in range(100)]  # a step in the first half
    level, more = rise(wobbling)
    assert level == pytest.approx(803, abs=1)
    assert more < BAR * level
    leaking = [(float(i), 500.0 + (i % 7) + 0.5 * i) for i in range(100)]
    level, more = rise(leaking)
    assert more == pytest.approx(24.5, abs=1)
    assert more > BAR * level
