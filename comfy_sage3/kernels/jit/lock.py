"""A lock between processes that the operating system lets go of when its holder dies, however it dies."""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

TIMEOUT = 900.0  # seconds; the longest build on two cores takes a third of that
PAUSE = 0.1
LOCK_BYTE = 1 << 20  # Windows locks bytes and then lets nobody read them: one far behind the text
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class LockTimeout(Exception):
    """Somebody else held the lock for too long; the message names the holder."""


def try_lock(file: IO[str]) -> bool:
    """Take the lock without waiting. Raises OSError where the file system has no locks."""
    if sys.platform == "win32":
        return try_lock_msvcrt(file, __import__("msvcrt"))
    return try_lock_fcntl(file, __import__("fcntl"))


def try_lock_fcntl(file: IO[str], fcntl: Any) -> bool:
    """The POSIX way: flock belongs to this opening of the file, so threads exclude each other too."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def try_lock_msvcrt(file: IO[str], msvcrt: Any) -> bool:
    """The Windows way. Closing the file unlocks it, as it does with flock."""
    os.lseek(file.fileno(), LOCK_BYTE, os.SEEK_SET)
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as problem:
        if problem.errno in (errno.EACCES, errno.EDEADLK, errno.EAGAIN):
            return False
        raise
    finally:
        os.lseek(file.fileno(), 0, os.SEEK_SET)
    return True


@contextmanager
def locked(
    path: Path,
    *,
    timeout: float = TIMEOUT,
    say: Callable[[str], None] = lambda text: None,
    take: Callable[[IO[str]], bool] = try_lock,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[None]:
    """Hold the lock file ``path``. Raises LockTimeout, or OSError when the file cannot be written.

    The file itself stays: a lock file that is removed lets two processes hold two files of one name.
    """
    with open(path, "a+", encoding="utf-8") as file:
        until, told = clock() + timeout, False
        while True:
            try:
                if take(file):
                    break
            except OSError as problem:
                if problem.errno not in UNSUPPORTED:
                    raise
                break  # no locks on this file system: publishing is atomic, only work may be done twice
            if clock() >= until:
                raise LockTimeout(
                    f"{holder(path)} has been building the same kernels for over {timeout:.0f} s: wait for it or "
                    f"end it (lock file {path})."
                )
            if not told:
                say(f"Waiting for {holder(path)}, which is building the same kernels.")
                told = True
            sleep(PAUSE)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} (since {time.strftime('%H:%M:%S')})")
        file.flush()
        yield


def holder(path: Path) -> str:
    """Who wrote their name into the lock file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
    except OSError:
        return "another process"
