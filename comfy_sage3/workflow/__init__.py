"""Run a ComfyUI workflow headless: ``python -m comfy_sage3 run``. Standard library only."""

from .client import ComfyClient, OutputFile
from .command import add_arguments, run
from .document import load_workflow
from .server import serve

__all__ = ["ComfyClient", "OutputFile", "add_arguments", "load_workflow", "run", "serve"]
