"""The state of the kernels for the doctor: what is there, what would be built, what stands in the way. Builds nothing."""

from __future__ import annotations

from typing import Any

from .build import Failure, Loaded, find_built, find_prebuilt, outcome, wanted_archs
from .jit.machine import ToolchainError
from .jit.make import last_failure
from .jit.ninja import BuildError
from .jit.setting import Setting
from .jit.toolchain import find_toolchain


def describe(setting: Setting | None = None) -> dict[str, Any]:
    """Plain data: GPUs, library and where it is from, compilers, what is missing, the last build that failed."""
    setting = setting or Setting()
    found: dict[str, Any] = {"archs": [], "library": None, "origin": None, "compilers": None, "problem": None}
    found |= {"cache": str(setting.cache), "last_failure": last_failure(setting)}
    try:
        toolchain = find_toolchain(setting.torch.cuda, setting.archs or (), setting.machine)
        found["compilers"] = f"{toolchain.identity} ({toolchain.cuda.where}: {toolchain.cuda.nvcc})"
    except ToolchainError as problem:
        found["problem"] = str(problem)
        found["compilers"] = f"incomplete: {problem}"
    done = outcome()
    if isinstance(done, Loaded):
        return found | {"archs": list(done.archs), "library": str(done.library), "origin": done.origin, "problem": None}
    try:
        archs = wanted_archs(setting)
    except BuildError as problem:
        return found | {"problem": str(problem)}
    found["archs"] = list(archs)
    recipe = setting.recipe(archs)
    entry, origin = find_prebuilt(setting, recipe), "prebuilt"
    if entry is None:
        entry, origin = find_built(setting, recipe), "cache"
    if entry is not None:
        found |= {"library": str(entry.library), "origin": origin, "problem": None}
    elif setting.tree is None:
        found["problem"] = "the kernels' sources are not installed beside this package"
    elif setting.switches.disable_build:
        found["problem"] = "there is no built library, and SAGE3_DISABLE_BUILD is set"
    if isinstance(done, Failure):  # this process has tried: that says more than what might be
        found["problem"] = done.reason
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """The same for a person."""
    if found["library"]:
        state = f"{found['library']} ({found['origin']})"
    elif found["problem"]:
        state = f"none: {found['problem']}"
    else:
        state = "none yet: built on first use, or by python -m comfy_sage3 build"
    made_for = f" for sm_{', sm_'.join(found['archs'])}" if found["archs"] else ""
    text = [f"CUDA kernels{made_for}", f"  library       {state}", f"  compilers     {found['compilers']}"]
    text.append(f"  cache         {found['cache']}")
    if found["last_failure"]:
        last = found["last_failure"]
        text.append(f"  last failure  {last['when']}: {last['reason']} (log: {last['log']})")
    return text
