"""The lock: exclusion, patience with an end, the death of a holder, the Windows way."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from comfy_sage3.kernels.jit import lock
from comfy_sage3.kernels.jit.lock import LockTimeout, locked, try_lock_msvcrt

HOLD = """
import sys, importlib.util
spec = importlib.util.spec_from_file_location("lock", {module!r})
lock = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock)
from pathlib import Path
with lock.locked(Path({path!r})):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "entry.lock"


@pytest.fixture
def holder(path):
    """Another process that holds the lock until its stdin closes."""
    code = HOLD.format(module=lock.__file__, path=str(path))
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_timeout_names_the_holder_and_waiting_is_said_once(path, holder):
    said = []
    with (
        pytest.raises(LockTimeout, match=rf"process {holder.pid} on .*\(since .*lock file"),
        locked(path, timeout=0.35, say=said.append),
    ):
        pass
    assert len(said) == 1
    assert f"Waiting for process {holder.pid}" in said[0]


def test_a_killed_holder_lets_go(path, holder):
    holder.kill()
    with locked(path, timeout=10):
        assert f"process {os.getpid()} " in path.read_text()


def test_an_ended_holder_lets_go_while_somebody_waits(path, holder):
    with locked(path, timeout=10, say=lambda text: holder.stdin.close()):
        pass


def test_one_process_excludes_itself(path):
    with locked(path), pytest.raises(LockTimeout), locked(path, timeout=0):
        pass
    with locked(path, timeout=0):
        pass


def test_a_file_system_without_locks_does_without(path):
    def take(file):
        raise OSError(errno.ENOLCK, "No locks available")

    with locked(path, take=take):
        pass


def test_another_error_is_not_hidden(path):
    def take(file):
        raise OSError(errno.EIO, "I/O error")

    with pytest.raises(OSError, match="I/O error"), locked(path, take=take):
        pass
    with pytest.raises(FileNotFoundError), locked(path.parent / "absent" / "x.lock"):
        pass


class Msvcrt:
    """What msvcrt.locking does with a byte range, for one file."""

    LK_NBLCK = 2

    def __init__(self, held):
        self.held, self.at = held, None

    def locking(self, fd, mode, count):
        assert (mode, count) == (self.LK_NBLCK, 1)
        self.at = os.lseek(fd, 0, os.SEEK_CUR)
        if self.held:
            raise OSError(errno.EACCES, "Permission denied")


def test_windows_locks_a_byte_behind_the_text_so_that_the_holder_can_be_read(path):
    free = Msvcrt(held=False)
    with locked(path, take=lambda file: try_lock_msvcrt(file, free)):
        assert free.at == lock.LOCK_BYTE > len(path.read_bytes())
        assert path.read_text().startswith(f"process {os.getpid()} ")
    busy = Msvcrt(held=True)
    with (
        pytest.raises(LockTimeout, match="process "),
        locked(
            path,
            timeout=1,
            take=lambda file: try_lock_msvcrt(file, busy),
            clock=iter(range(9)).__next__,
            sleep=lambda s: None,
        ),
    ):
        pass


def test_nothing_posix_is_imported_at_module_level():
    for module in Path(lock.__file__).parent.glob("*.py"):
        for name in ("fcntl", "pwd", "resource", "msvcrt", "winreg"):
            assert f"\nimport {name}" not in module.read_text()
