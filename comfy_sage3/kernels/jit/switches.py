"""Environment variables that steer the build. docs/kernels.md lists them; a test holds the two together."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

OFF = ("", "0", "false", "off", "no")


@dataclass(frozen=True)
class Switches:
    """One field per SAGE3_<FIELD>; unset, empty, 0, false, off and no are off."""

    cache_dir: str = ""
    disable_build: str = ""
    dump_sass: str = ""
    emulate_fp4: str = ""
    fail_on_spills: str = ""
    force_reference: str = ""
    lineinfo: str = ""
    print_commands: str = ""
    ptxas_verbose: str = ""

    @classmethod
    def read(cls, env: Mapping[str, str]) -> Switches:
        """The switches as ``env`` sets them."""
        found = {f.name: env.get(variable(f.name), "").strip() for f in fields(cls)}
        return cls(**{name: "" if value.lower() in OFF else value for name, value in found.items()})

    @property
    def wants_log(self) -> bool:
        """Whether something is asked that only a real build can answer: what is cached is then built anew."""
        return bool(self.print_commands or self.ptxas_verbose or self.fail_on_spills)


def variable(name: str) -> str:
    """The environment variable of a field."""
    return f"SAGE3_{name.upper()}"


def cache_root(env: Mapping[str, str], platform: str = sys.platform) -> Path:
    """Where built kernels are kept: SAGE3_CACHE_DIR, else the user's cache folder of this system."""
    chosen = Switches.read(env).cache_dir
    if chosen:
        return Path(chosen).expanduser()
    home = Path(env.get("USERPROFILE" if platform == "win32" else "HOME") or Path.home())
    if platform == "win32":
        return Path(env.get("LOCALAPPDATA") or home / "AppData" / "Local") / "comfy_sage3" / "Cache"
    if platform == "darwin":
        return home / "Library" / "Caches" / "comfy_sage3"
    base = env.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else home / ".cache") / "comfy_sage3"  # relative ones are void
