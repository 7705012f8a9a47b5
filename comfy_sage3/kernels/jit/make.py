"""One build: compile in a private folder under the lock, publish, leave a note when it failed."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from . import cache
from .cache import Entry, Manifest
from .cuda import find_binary
from .disassembly import parse_resources
from .lock import locked
from .machine import parallel_jobs
from .ninja import BuildError, Say, inherited, ninja_file, run_ninja
from .recipe import Recipe, library_name
from .setting import Setting
from .toolchain import Toolchain, find_toolchain

LAST_FAILURE = "last_failure.json"


def make(setting: Setting, archs: tuple[str, ...], say: Say, *, always: bool = False) -> tuple[Entry, str]:
    """Build for ``archs`` with the compilers of today, or take what was built so; ``always`` builds anew.

    Raises ToolchainError, BuildError, LockTimeout or OSError; the failure is also left for the doctor.
    """
    recipe = setting.recipe(archs)
    if setting.tree is None or not any(name == "binding.cpp" for name, _ in recipe.sources):
        raise BuildError("the kernels' sources are not installed beside this package")
    if not recipe.kernels():
        raise BuildError(f"there are no kernels for sm_{', sm_'.join(archs)}")
    toolchain = find_toolchain(setting.torch.cuda, archs, setting.machine)
    name = recipe.entry(toolchain)
    folder = _writable(setting, say)
    try:
        with locked(folder / f"{name}.lock", timeout=setting.lock_timeout, say=say):
            final = folder / name
            if not always and final.is_dir():  # somebody was quicker
                for entry in cache.built_entries(folder, name.partition("-")[0]):
                    if entry.folder == final and entry.damage() is None:
                        return entry, "cache"
            cache.sweep(folder, name)
            entry = _build(setting, recipe, toolchain, name, folder, say)
    except BuildError as problem:
        _remember_failure(setting, problem)
        raise
    except OSError as problem:
        failed = BuildError(f"{problem.strerror or problem} ({problem.filename or folder})")
        _remember_failure(setting, failed)
        raise failed from problem
    with suppress(OSError):
        (setting.cache / LAST_FAILURE).unlink(missing_ok=True)
    return entry, "built"


def last_failure(setting: Setting | None = None) -> dict[str, str] | None:
    """The reason, time and log file of the last build that failed, in whichever process; None when the last went well."""
    path = (setting or Setting()).cache / LAST_FAILURE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {key: str(found[key]) for key in ("reason", "when", "log")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build(setting: Setting, recipe: Recipe, toolchain: Toolchain, name: str, folder: Path, say: Say) -> Entry:
    """Compile in a private folder and publish it. The lock is held."""
    switches = setting.switches
    verbose = bool(switches.ptxas_verbose or switches.fail_on_spills)
    jobs = parallel_jobs(setting.machine.env)
    private = Path(tempfile.mkdtemp(prefix=f"{cache.PRIVATE}{name}-", dir=folder))
    start = time.perf_counter()
    try:
        recipe.write(private)
        text = ninja_file(recipe, toolchain, name, verbose=verbose)
        (private / "build.ninja").write_text(text, encoding="utf-8")
        steps = len(recipe.kernels()) + 2
        say(
            f"Building CUDA kernels for sm_{', sm_'.join(recipe.archs)} with {toolchain.identity}: {steps} steps, "
            f"{jobs} at a time. This happens once."
        )
        env = inherited(setting.machine.env)
        log = run_ninja(private, toolchain, jobs, say, env, commands=bool(switches.print_commands))
        if switches.ptxas_verbose:
            say(log)
        if switches.fail_on_spills:
            refuse_spills(log)
        keep = private / "entry"
        keep.mkdir()
        library = keep / library_name(name, recipe.windows)
        shutil.move(private / library.name, library)
        Manifest.of(recipe, toolchain, name, library).write(keep)
        (keep / "build.log").write_text(log, encoding="utf-8")
        if switches.dump_sass:
            _dump(library, setting, toolchain, switches.dump_sass, say)
        try:
            cache.publish(keep, folder / name)
        except OSError:  # Windows keeps a folder whose library somebody has loaded; theirs is as good
            standing = [e for e in cache.built_entries(folder, recipe.base) if e.folder == folder / name]
            if not standing or standing[0].damage():
                raise
    finally:
        shutil.rmtree(private, ignore_errors=True)
    say(f"Built in {time.perf_counter() - start:.0f} s: {folder / name}")
    return Entry(folder / name, Manifest.read(folder / name))


def refuse_spills(log: str) -> None:
    """Raise BuildError naming the kernels that spill, from the log of a verbose build."""
    found = {name: r.spills for name, r in parse_resources(log).items() if r.spills}
    if found:
        listed = ", ".join(f"{name} ({spills} bytes)" for name, spills in found.items())
        raise BuildError(f"SAGE3_FAIL_ON_SPILLS is set and these kernels spill: {listed}", log)


def _writable(setting: Setting, say: Say) -> Path:
    """The first folder that a build can go to. Raises BuildError saying why none can be used."""
    reasons: list[str] = []
    for folder in cache.candidates(setting.cache, setting.machine.windows, setting.spare):
        why_not = cache.unusable(folder)
        if why_not is None and folder != setting.cache and not cache.is_private(folder):
            why_not = f"{folder}: others can write there"
        if why_not is None:
            if reasons:
                say(f"The kernels are kept in {folder} for now ({reasons[0]}).")
            return folder
        reasons.append(why_not)
    raise BuildError(f"nothing can be written ({'; '.join(reasons)}): set SAGE3_CACHE_DIR to a folder with room")


def _dump(library: Path, setting: Setting, toolchain: Toolchain, where: str, say: Say) -> None:
    """Write the library's machine code as text: to the folder named by the switch, or beside the cache."""
    folder = setting.cache / "sass" if where in ("1", "true", "on", "yes") else Path(where).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    tool = find_binary("cuobjdump", setting.machine, toolchain.cuda)
    path = folder / f"{library.stem}.sass"
    path.write_text(setting.machine.run([str(tool), "-sass", str(library)]), encoding="utf-8")
    say(f"Machine code: {path}")


def _remember_failure(setting: Setting, problem: BuildError) -> None:
    """Leave the reason and the whole log in the cache, for the doctor in its own process."""
    try:
        log = setting.cache / "last_failure.log"
        log.write_text(problem.log or str(problem), encoding="utf-8")
        note = {"reason": str(problem), "when": time.strftime("%Y-%m-%d %H:%M:%S"), "log": str(log)}
        (setting.cache / LAST_FAILURE).write_text(json.dumps(note), encoding="utf-8")
    except OSError:
        return  # a cache that cannot be written may be the failure itself
