"""The Makefile where Python cannot make a virtual environment: one sentence, nothing half-made."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def make(tmp_path):
    """Run ``make test`` in a folder of its own with a Python that is the given shell script."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)

    def run(script):
        python = tmp_path / "python"
        python.write_text("#!/bin/sh\n" + script)
        python.chmod(0o755)
        env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        argv = ["make", "test", f"PYTHON={python}"]
        return subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)

    return run


# Debian without python3-venv: there is no ensurepip, and venv leaves a folder and a paragraph.
WITHOUT_ENSUREPIP = """
case "$1 $2" in
"-c "*ensurepip*) echo "ModuleNotFoundError: No module named 'ensurepip'" >&2; exit 1 ;;
"-m venv") mkdir -p "$3/bin"; echo "The virtual environment was not created successfully because"; exit 1 ;;
esac
"""
DISK_FULL = 'if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin"; echo "No space left on device" >&2; exit 1; fi\n'


def test_without_python3_venv_one_sentence_says_what_to_install(make, tmp_path):
    done = make(WITHOUT_ENSUREPIP)
    said = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("make: ***")]
    assert done.returncode != 0
    assert said == [f"error: {tmp_path}/python cannot make a virtual environment; install python3-venv and run make again."]
    assert not (tmp_path / ".venv").exists()


def test_a_venv_that_fails_half_way_is_removed(make, tmp_path):
    done = make(DISK_FULL)
    assert done.returncode != 0
    assert "No space left on device" in done.stderr
    assert "python3-venv" not in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_a_working_environment_is_kept_when_it_cannot_be_renewed(make, tmp_path):
    pip = tmp_path / ".venv" / "bin" / "pip"
    pip.parent.mkdir(parents=True)
    pip.touch()
    assert make(DISK_FULL).returncode != 0
    assert pip.exists()
