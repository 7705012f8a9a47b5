"""The built library as attention sees it: its operators, or why there are none. Building starts at the first question."""

from __future__ import annotations

from typing import Any

from ..errors import KernelError
from . import build
from .devices import Capability
from .sources import arch_of


def failure(capability: Capability) -> str | None:
    """Why no compiled kernel runs on a GPU of ``capability``, in one line; None when they do.

    Builds the library on first use in this process, which takes minutes where none is cached; the outcome is
    remembered. A constant in a compiled graph.
    """
    outcome = build.load()
    if isinstance(outcome, build.Failure):
        return " ".join(outcome.reason.split())
    arch = arch_of(capability)
    if arch not in outcome.archs:
        return f"the built library is for sm_{', sm_'.join(outcome.archs)}, this GPU needs sm_{arch}"
    return None


# What torch.compiler.assume_constant_result does, see devices.py: it is asked once, while the graph is traced.
failure._dynamo_marked_constant = True  # type: ignore[attr-defined]


def operators() -> Any:
    """The library's operators. Raises KernelError when there are none, such as in a graph compiled elsewhere."""
    outcome = build.load()
    if isinstance(outcome, build.Failure):
        raise KernelError(f"This call was compiled for CUDA kernels, but there are none: {outcome.reason}")
    return outcome.ops
