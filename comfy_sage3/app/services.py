"""What every tab is given: where runs go, how an engine is opened, and the turn at the GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..compare.engine import Engine
from ..compare.given import Given
from ..errors import InputError

if TYPE_CHECKING:
    from ..study.history import History

EMBEDDED = "embedded"
GPU = "gpu"
"""The concurrency_id of every event that runs a model: with concurrency_limit=1 they take turns."""
HIDDEN_ERROR = "Something went wrong: the person who runs this app finds the reason in its log."


@dataclass(frozen=True)
class Limits:
    """What one visitor may ask of the server, beyond the bounds that Request and Side keep themselves."""

    repeats: int = 5  # timed runs of each side
    queue: int = 8  # runs that wait for their turn
    upload_bytes: int = 8 << 20


def open_engine(name: str) -> Engine:
    """``embedded``: the bundled model in this process; else the ComfyUI server at that address. The caller closes it.

    Raises InputError for a text that is neither, EngineError where the engine cannot be had.
    """
    if name == EMBEDDED:
        from ..compare.diffusers_engine import DiffusersEngine

        return DiffusersEngine()
    if not name.startswith(("http://", "https://")):
        raise InputError(f"{name[:80]!r} is not an engine: give embedded, or an address like http://127.0.0.1:8188.")
    from ..compare.comfyui_engine import ComfyUIEngine

    return ComfyUIEngine(name)


def open_workflow(name: str, given: Given) -> Engine:
    """A workflow on the ComfyUI server at an address. Raises as ``open_engine``."""
    from ..compare.comfyui_engine import ComfyUIEngine

    return ComfyUIEngine(name, given)


@dataclass
class Services:
    """One app's services.

    Attributes:
        out: the folder of all runs, each a folder of its own as ``compare.output.write`` makes it.
        engine: what the app was started with, ``embedded`` or a ComfyUI server's address.
        mask_errors: whether visitors are told only the errors that are meant for them (a public address).
        open_engine, open_workflow: make an engine by name or address; tests put a stand-in here.
        gpu: held by whoever runs a model; events share ``concurrency_id=GPU`` as well, so few ever wait for it.
    """

    out: Path
    engine: str = EMBEDDED
    mask_errors: bool = False
    limits: Limits = field(default_factory=Limits)
    open_engine: Callable[[str], Engine] = open_engine
    open_workflow: Callable[[str, Given], Engine] = open_workflow
    gpu: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def history(self) -> History:
        """Every run under ``out``."""
        from ..study.history import History

        return History(self.out)
