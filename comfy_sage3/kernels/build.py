"""The compiled kernels: found, built or explained. Callers want one function.

    outcome = build.load()          # Loaded or Failure; the same one for the life of the process
    if isinstance(outcome, build.Loaded):
        outcome.ops.some_operator(...)

In order: a library that came with the package, one in the cache, a build. Nothing here runs at import; the parts
are in ``jit/``, the table of sources in ``sources``.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .jit import cache
from .jit.cache import Entry, Manifest
from .jit.lock import LockTimeout
from .jit.machine import ToolchainError
from .jit.make import last_failure, make
from .jit.ninja import BuildError, Say
from .jit.recipe import Recipe
from .jit.setting import Setting
from .sources import arch_of

SHOWN = 30  # lines of a failed build's log that are shown; the whole of it is in a file


@dataclass(frozen=True)
class Loaded:
    """The kernels, ready. ``origin`` is "prebuilt", "cache" or "built"."""

    library: Path
    namespace: str
    archs: tuple[str, ...]
    origin: str
    seconds: float

    @property
    def ops(self) -> Any:
        """The operators that binding.cpp registers."""
        return getattr(torch.ops, self.namespace)


@dataclass(frozen=True)
class Failure:
    """Why there are no kernels, in one sentence; ``log`` is what the compilers said, if they ran."""

    reason: str
    log: str = ""


Listener = Callable[[str, str], None]
"""Called as ``listener(state, text)``: "building", then "built" or "failed", and a sentence for a person."""

_lock = threading.Lock()
_outcome: Loaded | Failure | None = None
_listeners: list[Listener] = []


def listen(listener: Listener) -> None:
    """Tell ``listener`` when kernels have to be built here, and how that ended; not when they are found built.

    It is called in the thread that builds, and what it raises is dropped: nobody's display may cost the kernels.
    """
    _listeners.append(listener)


def load(report: Say | None = None) -> Loaded | Failure:
    """The kernels for the GPUs of this process, built on first use; a failure is found once and remembered.

    ``report`` gets every line of progress and a failed build's last words (default: stderr). Never raises.
    """
    global _outcome
    if _outcome is None:
        with _lock:  # one thread builds, the others wait for what it finds
            if _outcome is None:
                _outcome = attempt(Setting(), report or to_stderr)
    return _outcome


def outcome() -> Loaded | Failure | None:
    """What ``load`` found in this process; None when nobody has asked yet."""
    return _outcome


def forget() -> None:
    """Let the next ``load`` try again, such as after something was installed."""
    global _outcome
    with _lock:
        _outcome = None


def tell(state: str, text: str) -> None:
    """Pass ``text`` on to those who ``listen``."""
    for listener in tuple(_listeners):
        with suppress(Exception):
            listener(state, text)


def to_stderr(text: str) -> None:
    """Progress as it is shown when nobody else wants it."""
    print(f"[comfy_sage3] {text}", file=sys.stderr, flush=True)


def attempt(setting: Setting, say: Say) -> Loaded | Failure:
    """One load: prebuilt, cached or built, and opened. Whatever goes wrong becomes a Failure that is said once."""
    start = time.perf_counter()
    try:
        archs = wanted_archs(setting)
        entry, origin = obtain(setting, archs, say)
        try:
            _open(entry, setting)
        except OSError as problem:  # whole, and for this torch by its manifest, yet it does not fit: build it here
            if origin == "built" or setting.switches.disable_build:
                raise
            say(f"{entry.library} does not load ({problem}): it is built again.")
            entry, origin = make_and_tell(setting, archs, say, always=True)
            _open(entry, setting)
        return Loaded(entry.library, entry.namespace, entry.manifest.archs, origin, time.perf_counter() - start)
    except BuildError as problem:
        failure = Failure(str(problem), problem.log)
    except (ToolchainError, LockTimeout) as problem:
        failure = Failure(str(problem))
    except OSError as problem:
        failure = Failure(f"the kernels cannot be built or loaded: {problem}")
    except Exception as problem:  # a broken driver or toolkit raises what it likes; attention must still run
        failure = Failure(f"the kernels cannot be built or loaded: {type(problem).__name__}: {problem}")
    if failure.log:
        at = max(failure.log.find("\nFAILED"), 0)  # the steps before it have been said as they finished
        say("\n".join(failure.log[at:].strip().splitlines()[:SHOWN]))
    say(f"No CUDA kernels: {failure.reason}")
    return failure


def wanted_archs(setting: Setting) -> tuple[str, ...]:
    """The architectures to have kernels for. Raises BuildError when there is nothing to have them for."""
    if setting.switches.force_reference:
        raise BuildError("SAGE3_FORCE_REFERENCE is set")
    if setting.torch.cuda is None:
        raise BuildError(f"this torch ({setting.torch.version}) is built without CUDA")
    if setting.archs is not None:
        return setting.archs
    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if not capabilities:
        raise BuildError("there is no NVIDIA GPU")
    found = tuple(dict.fromkeys(arch for c in capabilities if (arch := arch_of(c)) is not None))
    if not found:
        raise BuildError(f"there are no kernels for sm_{capabilities[0][0]}{capabilities[0][1]}")
    return found


def obtain(setting: Setting, archs: tuple[str, ...], say: Say) -> tuple[Entry, str]:
    """A whole library for ``archs``, and where it came from. Raises what ``attempt`` catches."""
    switches = setting.switches
    recipe = setting.recipe(archs)
    if not switches.wants_log:
        entry = find_prebuilt(setting, recipe, say)
        if entry is not None:
            return entry, "prebuilt"
        entry = find_built(setting, recipe, say)
        if entry is not None:
            return entry, "cache"
    if switches.disable_build:
        raise BuildError("there is no built library, and SAGE3_DISABLE_BUILD is set")
    return make_and_tell(setting, archs, say, always=switches.wants_log)


def make_and_tell(setting: Setting, archs: tuple[str, ...], say: Say, *, always: bool) -> tuple[Entry, str]:
    """``make``, told to those who listen. Raises what ``make`` raises."""
    tell("building", "The attention kernels for this GPU are being built. This takes a few minutes and happens once.")
    start = time.perf_counter()
    try:
        made = make(setting, archs, say, always=always)
    except Exception as problem:
        tell("failed", f"The attention kernels could not be built, so other attention is used: {problem}")
        raise
    tell("built", f"The attention kernels for this GPU are ready, after {time.perf_counter() - start:.0f} s.")
    return made


def find_built(setting: Setting, recipe: Recipe, say: Say = lambda text: None) -> Entry | None:
    """The newest whole library in the caches that serves ``recipe``, whatever compiler made it."""
    for folder in setting.folders():
        for entry in cache.built_entries(folder, recipe.base):
            if cache.serves(entry, recipe.archs):
                damage = entry.damage()
                if damage is None:
                    cache.touch(entry)
                    return entry
                say(f"{damage}: it is built again.")
    return None


def _open(entry: Entry, setting: Setting) -> None:
    """Load the library into torch, unless another copy of this package has loaded the same one."""
    loaded = {Path(path).name for path in torch.ops.loaded_libraries}
    if entry.library.name not in loaded:
        setting.open_library(entry.library)


def find_prebuilt(setting: Setting, recipe: Recipe, say: Say = lambda text: None) -> Entry | None:
    """The library that came with the package, if it fits."""
    if not setting.prebuilt.is_dir():
        return None
    for folder in sorted(setting.prebuilt.iterdir()):
        try:
            entry = Entry(folder, Manifest.read(folder))
        except ValueError:
            continue
        why_not = cache.misfit(entry, recipe, setting.tree is not None) or entry.damage()
        if why_not is None:
            return entry
        say(f"The kernels that came with the package are not used: {why_not}.")
    return None


__all__ = ["Failure", "Loaded", "forget", "last_failure", "listen", "load", "outcome"]
