"""A workflow file: read it, tell the API format from the editor's own, change an input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import InputError

Workflow = dict[str, dict[str, Any]]
"""ComfyUI's API format: node id -> {"class_type": name, "inputs": {name: value or [node id, output]}}."""


def load_workflow(path: Path) -> Workflow:
    """Read an API-format workflow; InputError for a file that is missing, not JSON, or in another format."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"There is no workflow file {path}: check the path.") from None
    except OSError as error:
        raise InputError(
            f"The workflow {path} cannot be read ({error.strerror}): check the path and its permissions."
        ) from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise InputError(f"The workflow {path} is not valid JSON ({error}): export it again from ComfyUI.") from None
    if isinstance(data, dict) and isinstance(data.get("nodes"), list):
        raise InputError(
            f"{path} is in the editor's format, which a server cannot run: export it with 'Export (API)'{_sibling(path)}."
        )
    if isinstance(data, dict) and set(data) >= {"prompt"} and isinstance(data["prompt"], dict):
        data = data["prompt"]  # the body of a request to /prompt
    if not isinstance(data, dict) or not data:
        raise InputError(f"{path} is not a workflow: export one from ComfyUI with 'Export (API)'.")
    for key, node in data.items():
        if not (isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)):
            raise InputError(f"{path} is not a workflow in API format (node {key!r}): export it with 'Export (API)'.")
    return data


def set_input(workflow: Workflow, assignment: str) -> None:
    """Apply ``NODE.INPUT=VALUE`` in place, VALUE being JSON or else text; InputError where it fits not."""
    target, equals, text = assignment.partition("=")
    key, dot, name = target.partition(".")
    if not (equals and dot):
        raise InputError(f"Cannot read {assignment!r}: give NODE.INPUT=VALUE, such as 6.steps=4.")
    if key not in workflow:
        raise InputError(f"The workflow has no node {key!r}: it has {', '.join(workflow)}.")
    inputs = workflow[key]["inputs"]
    if name not in inputs:
        raise InputError(f"Node {key} ({workflow[key]['class_type']}) has no input {name!r}: it has {', '.join(inputs)}.")
    try:
        inputs[name] = json.loads(text)
    except ValueError:
        inputs[name] = text


def _sibling(path: Path) -> str:
    """Where the same workflow lies in API format: NAME.json beside NAME.ui.json, api/NAME.json below NAME.json."""
    for api in (path.with_name(path.name.removesuffix(".ui.json") + ".json"), path.parent / "api" / path.name):
        if api != path and api.exists():
            return f", or give {api}"
    return ""
