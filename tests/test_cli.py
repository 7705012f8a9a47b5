"""The command table: help, exit statuses, and one sentence instead of a traceback."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from comfy_sage3 import cli
from comfy_sage3.errors import EngineError, InputError

ROOT = Path(__file__).parents[1]


def command(monkeypatch, run):
    def add_arguments(parser):
        parser.add_argument("--n", type=int, default=0)

    module = SimpleNamespace(add_arguments=add_arguments, run=run)
    monkeypatch.setitem(sys.modules, "some_command", module)
    monkeypatch.setattr(cli, "COMMANDS", {"some": ("some_command", "does something")})


def test_a_command_gets_its_arguments_and_gives_the_exit_status(monkeypatch):
    command(monkeypatch, lambda args: args.n)
    assert cli.main(["some"]) == 0
    assert cli.main(["some", "--n", "3"]) == 3


@pytest.mark.parametrize("error", [InputError, EngineError])
def test_an_error_made_for_people_is_one_line_and_status_2(monkeypatch, capsys, error):
    def run(_args):
        raise error("The server at port 8188 does not answer: start it first.")

    command(monkeypatch, run)
    assert cli.main(["some"]) == 2
    assert capsys.readouterr().err == "error: The server at port 8188 does not answer: start it first.\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    def run(_args):
        raise KeyError("a bug")

    command(monkeypatch, run)
    with pytest.raises(KeyError):
        cli.main(["some"])


def test_an_interrupt_is_status_130(monkeypatch, capsys):
    def run(_args):
        raise KeyboardInterrupt

    command(monkeypatch, run)
    assert cli.main(["some"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_help_imports_no_command(monkeypatch, capsys):
    monkeypatch.setattr(cli, "COMMANDS", {"absent": ("no_such_module", "what is not there")})
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    assert "what is not there" in capsys.readouterr().out


@pytest.mark.parametrize(("argv", "says"), [([], "COMMAND"), (["nonsense"], "doctor")])
def test_no_command_and_an_unknown_one_are_usage_errors(capsys, argv, says):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_python_m_runs_the_table():
    argv = [sys.executable, "-m", "comfy_sage3", "--help"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert all(name in done.stdout for name in cli.COMMANDS)
