"""Memory that was freed, given back to the system."""

from __future__ import annotations

import contextlib
import ctypes


def give_back() -> None:
    """Let the C library return what it holds and nobody uses; nothing where it is not glibc.

    Every thread has a heap of its own there, in which a run's frames, pictures and tensors leave holes. They are used
    again only by chance, so that a process grows for hours although it holds nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
