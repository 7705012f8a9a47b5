"""The environment variables, and where the cache is on each system."""

from dataclasses import fields
from pathlib import Path

import pytest

from comfy_sage3.kernels.jit.switches import Switches, cache_root, variable

DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"


@pytest.mark.parametrize("off", ["", "0", "false", "OFF", " no "])
def test_words_for_off(off):
    assert Switches.read({"SAGE3_DISABLE_BUILD": off}) == Switches()


def test_anything_else_is_on_or_a_value():
    found = Switches.read({"SAGE3_DISABLE_BUILD": "1", "SAGE3_DUMP_SASS": "/tmp/x"})
    assert found == Switches(disable_build="1", dump_sass="/tmp/x")
    assert not found.wants_log
    for name in ("print_commands", "ptxas_verbose", "fail_on_spills"):
        assert Switches(**{name: "1"}).wants_log


def test_every_switch_is_documented():
    text = DOCS.read_text()
    for field in fields(Switches):
        assert f"`{variable(field.name)}`" in text


@pytest.mark.parametrize(
    ("platform", "env", "folder"),
    [
        ("linux", {"HOME": "/home/a"}, "/home/a/.cache/comfy_sage3"),
        ("linux", {"HOME": "/home/a", "XDG_CACHE_HOME": "/big/cache"}, "/big/cache/comfy_sage3"),
        ("linux", {"HOME": "/home/a", "XDG_CACHE_HOME": "relative"}, "/home/a/.cache/comfy_sage3"),
        ("darwin", {"HOME": "/Users/a"}, "/Users/a/Library/Caches/comfy_sage3"),
        ("win32", {"LOCALAPPDATA": "/Users/a b/AppData/Local"}, "/Users/a b/AppData/Local/comfy_sage3/Cache"),
        ("win32", {"USERPROFILE": "/Users/ä"}, "/Users/ä/AppData/Local/comfy_sage3/Cache"),
        ("linux", {"HOME": "/home/a", "SAGE3_CACHE_DIR": "/elsewhere"}, "/elsewhere"),
    ],
)
def test_the_cache_is_in_the_users_cache_folder(platform, env, folder):
    assert cache_root(env, platform) == Path(folder)
