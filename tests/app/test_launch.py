"""Starting: what flags may be together, what is said where gradio is missing, who is answered, what is left behind."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from comfy_sage3.app import launch
from comfy_sage3.app.safety import is_allowed
from comfy_sage3.errors import InputError


def test_without_flags_only_this_machine_is_served():
    args = launch.arguments([])
    assert (args.host, args.local, args.login, args.engine) == ("127.0.0.1", True, None, "embedded")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])
def test_another_address_needs_a_password_or_a_flag(host):
    with pytest.raises(InputError, match="--auth"):
        launch.arguments(["--host", host])
    assert launch.arguments(["--host", host, "--auth", "me:se:cret"]).login == ("me", "se:cret")
    assert launch.arguments(["--host", host, "--without-password"]).login is None


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--auth", "me"], "USER:PASSWORD"),
        (["--auth", ":x"], "USER:PASSWORD"),
        (["--port", "70000"], "port"),
        (["--engine", "magic"], "engine"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, says, capsys):
    assert launch.main(flags) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("found", "says"), [(None, "not installed"), ("5.40.0", "5.40.0"), ("6.30.2", "6.30.2"), ("7.0", "7.0")]
)
def test_missing_or_wrong_gradio_is_one_sentence_with_the_command(monkeypatch, capsys, found, says):
    def version(name):
        if found is None:
            raise launch.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(launch, "version", version)
    assert launch.main([]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "pip install 'gradio>=6.31,<7'" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("found", ["6.31.0", "6.40.1"])
def test_the_gradio_it_is_made_for_is_taken(monkeypatch, found):
    monkeypatch.setattr(launch, "version", lambda name: found)
    launch.check_gradio()


def test_the_temporary_folder_is_private_and_goes_with_the_app():
    with launch.private_folder() as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
        (folder / "left").write_text("x")
    assert not folder.exists()


@pytest.mark.skipif(os.name != "posix", reason="elsewhere nobody can be asked whether a process lives")
def test_the_folders_of_killed_apps_are_removed_and_no_others(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    orphan, mine, other = (tmp_path / f"sage3-app-{name}" for name in (f"{gone.pid}-x", f"{os.getpid()}-x", "notes"))
    for folder in (orphan, mine, other):
        folder.mkdir()
    launch.remove_orphans(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted((mine, other))


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_app_leaves_nothing(gradio, tmp_path, kind):
    env = os.environ | {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    argv = [sys.executable, "gradio_app.py", "--port", "0", "--out", str(tmp_path / "out")]
    root = Path(__file__).parents[2]
    app = subprocess.Popen(argv, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = app.stdout.readline()
        assert "http://127.0.0.1:" in said, said + app.stdout.read()
        assert list(tmp_path.glob("sage3-app-*"))
        app.send_signal(kind)
        app.communicate(timeout=60)
    finally:
        app.kill()
    assert not list(tmp_path.glob("sage3-app-*"))


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:7860", "127.0.0.1", "127.0.0.1:80", "[::1]:7860", "192.168.0.7:1", "mine:1"]
)
def test_addresses_and_known_names_are_answered(host):
    assert is_allowed(host, ["mine"])


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.evil.example", "", "mine2"]
)
def test_foreign_names_are_not(host):
    assert not is_allowed(host, ["mine"])
