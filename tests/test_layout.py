"""Who may import whom: arrows between the rooms point one way, and each foreign package has its few places."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "comfy_sage3"

# Top to bottom. A room may import what stands on a lower floor; neighbours on one floor do not know each other.
FLOORS = (
    ("gradio_app", "pack"),  # the repository's gradio_app.py and its __init__.py, ComfyUI's entry
    ("cli",),
    ("app",),
    ("numerics", "training_study"),  # commands; what the other commands run lives in their own rooms
    ("study",),
    ("compare", "comfyui"),  # comfyui offers the bundled weights, their prompts and the doctor, so they are below it
    ("demo", "plan", "doctor"),
    ("face",),  # comfy_sage3/__init__.py: the names a user imports
    ("training",),
    ("attention",),
    ("dispatch",),
    ("kernels",),
    ("reference",),
    ("precision", "report", "metrics", "workflow"),
    ("errors", "files"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
OF_ROOM = {  # modules that belong to a room of another name
    "__main__": "cli",
    "checks": "attention",
    "error_tables": "numerics",
    "training_numerics": "numerics",
    "verify": "doctor",
}

# Of the floors below, these rooms may know only so much.
ONLY = {"reference": {"errors"}, "pack": {"comfyui"}}
# And these rooms are known to nobody else: outside ComfyUI they cannot be imported.
KNOWN_TO = {"comfyui": {"pack"}}

# Foreign packages, and the files (or folders) that may import them.
COMFYUI = ("comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "nodes", "server")
FOREIGN = {
    "torch": ("",),
    "numpy": (
        "metrics.py",
        "compare/",
        "demo/",
        "app/",
        "study/",
        "training_study/plots.py",
        "comfyui/frames.py",
        "comfyui/plan_node.py",
    ),  # fmt: skip
    "PIL": ("compare/", "demo/", "app/", "study/", "comfyui/frames.py", "plan/heatmap.py"),
    "aiohttp": ("comfyui/routes.py",),
    "safetensors": ("demo/", "training_study/data.py"),
    "matplotlib": ("compare/plots.py", "study/plots.py"),
    "diffusers": ("compare/diffusers_engine.py", "demo/load.py"),
    "gradio": ("app/",),
    "starlette": ("app/launch.py",),  # what gradio's server is made of
    "ray": ("study/ray_runner.py",),
    "triton": ("kernels/triton_forward.py", "kernels/triton_backward.py"),  # torch brings it, on Linux only
    "playwright": ("app/screenshots.py",),  # a command for who writes the README
} | {name: ("comfyui/",) for name in COMFYUI}


def files():
    """Every module's dotted name and path; the two entries at the root are plain "gradio_app" and "pack"."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    entries = {"gradio_app": ROOT / "gradio_app.py", "pack": ROOT / "__init__.py"}
    return found | {name: path for name, path in entries.items() if path.is_file()}


FILES = files()


def room(module):
    """The room a module belongs to."""
    if not module.startswith(PACKAGE):
        return module
    parts = module.split(".")
    return "face" if len(parts) == 1 else OF_ROOM.get(parts[1], parts[1])


def imports(source, module, is_package, modules):
    """Every (line, name imported) of ``source``, in functions too: a module of ours in full, a foreign one by its head.

    A text that is exactly the name of a module of ours counts: such a table is imported by name (cli.COMMANDS).
    """
    inside = [] if module in ("pack", "gradio_app") else module.split(".")[: None if is_package else -1]
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # The version is the one name of the face that every floor may read, inside a function: by then
                # the face has been imported, as it is before any of its parts.
                if (base, alias.name) == (PACKAGE, "__version__") and node.col_offset:
                    continue
                names.append(f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in modules:
            names = [node.value] if "." in node.value else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names = [x.value for x in node.args[:1] if isinstance(x, ast.Constant)]
        for name in names:
            yield node.lineno, name if name.split(".")[0] == PACKAGE else name.split(".")[0]


def all_imports():
    """Every (module, line, name imported) of the repository's own code."""
    for module, path in FILES.items():
        for line, name in imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py", FILES):
            yield module, line, name


def allowed(upper, lower):
    """Whether a module of room ``upper`` may import one of room ``lower``."""
    if upper == lower:
        return True
    return FLOOR[upper] < FLOOR[lower] and lower in ONLY.get(upper, FLOOR) and upper in KNOWN_TO.get(lower, FLOOR)


def tell(faults, rule):
    assert not faults, "\n".join([rule, *(f"  {fault}" for fault in faults)])


def test_every_module_has_a_room():
    faults = [str(path.relative_to(ROOT)) for module, path in FILES.items() if room(module) not in FLOOR]
    tell(faults, "These modules stand in no room; give theirs a floor in tests/test_layout.py:")


def test_arrows_point_down():
    faults = [
        f"{FILES[module].relative_to(ROOT)}:{line}: {room(module)} imports {name} ({room(name)})"
        for module, line, name in all_imports()
        if name.startswith(PACKAGE) and not allowed(room(module), room(name))
    ]
    tell(faults, "A room may import only rooms on a lower floor (FLOORS in tests/test_layout.py):")


def test_no_module_circle():
    """Inside a room too, and counting imports inside functions."""
    graph = {module: set() for module in FILES}
    for module, _, name in all_imports():
        if name in FILES and name != module:
            graph[module].add(name)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("These modules import each other in a circle: " + " <- ".join(error.args[1]), pytrace=False)


def test_foreign_packages_keep_to_their_places():
    faults = []
    for module, line, name in all_imports():
        if name.startswith(PACKAGE) or name in sys.stdlib_module_names:
            continue
        where = FILES[module].relative_to(ROOT).as_posix().removeprefix(f"{PACKAGE}/")
        places = FOREIGN.get(name, ())
        if not any(where == place or (not place or place.endswith("/")) and where.startswith(place) for place in places):
            faults.append(f"{where}:{line} imports {name}; allowed: {', '.join(places) or 'nowhere'}")
    tell(faults, "Foreign packages have their places (FOREIGN in tests/test_layout.py):")


@pytest.mark.parametrize(
    ("module", "source", "seen"),
    [
        ("comfy_sage3.a.b", "from .. import errors", ["comfy_sage3.errors"]),
        ("comfy_sage3.a.b", "from . import c as d", ["comfy_sage3.a.c"]),
        ("comfy_sage3.a.b", "from .c import thing", ["comfy_sage3.a.c"]),
        ("comfy_sage3.a", "def f():\n    from .c import thing", ["comfy_sage3.a.c"]),
        ("comfy_sage3.a.b", "import diffusers.models as m", ["diffusers"]),
        ("comfy_sage3.a.b", "importlib.import_module('diffusers.models')", ["diffusers"]),
        ("comfy_sage3.a.b", "def f():\n    from .. import __version__", []),
        ("comfy_sage3.a.b", "from .. import __version__", ["comfy_sage3"]),
        ("comfy_sage3.cli", "T = {'run': ('comfy_sage3.a.c', 'text')}", ["comfy_sage3.a.c"]),
        ("pack", "from .comfy_sage3.errors import Sage3Error", ["comfy_sage3.errors"]),
    ],
)
def test_every_form_of_import_is_seen(module, source, seen):
    modules = ("comfy_sage3", "comfy_sage3.errors", "comfy_sage3.a", "comfy_sage3.a.b", "comfy_sage3.a.c")
    assert [name for _, name in imports(source, module, module in ("comfy_sage3.a", "pack"), modules)] == seen


def test_the_plan_of_the_house():
    assert allowed("comfyui", "attention")
    assert allowed("compare", "demo")
    assert allowed("kernels", "reference")
    for upper in ("cli", "app", "compare", "demo", "attention", "kernels"):
        assert not allowed(upper, "comfyui"), upper
    for upper, lower in [("reference", "kernels"), ("reference", "metrics"), ("attention", "face"), ("demo", "compare")]:
        assert not allowed(upper, lower), (upper, lower)
