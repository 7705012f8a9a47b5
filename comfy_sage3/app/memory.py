"""Memory that was freed, given back to the system. Everything here does nothing where the C library is not glibc."""

from __future__ import annotations

import contextlib
import ctypes

ARENA_MAX = -8  # M_ARENA_MAX of malloc.h


def one_heap() -> None:
    """Let all threads share one heap, from now on.

    glibc gives threads heaps of their own, each of which keeps what was freed at its end, as much as 64 MiB: a process that
    takes a thread for every run grows for hours although it holds nothing. Call it before threads begin.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(ARENA_MAX, 1)


def give_back() -> None:
    """Return what is free in the heap, also between what is in use: a run's frames, pictures and tensors leave holes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
