"""What the pack is to others: the registry's metadata and zip, a wheel beside a clone, a ComfyUI it is installed into."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from comfy_sage3.workflow.server import find_python

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[2]
MUST = (
    "__init__.py", "LICENSE", "README.md", "pyproject.toml", "CHANGELOG.md", "comfy_sage3/comfyui/nodes.py",
    "comfy_sage3/demo/weights/sage3_demo_wan.safetensors", "comfy_sage3/demo/weights/sage3_demo_vae.safetensors",
    "csrc/binding.cpp", "csrc/include/sage3", "locales/en/nodeDefs.json", "locales/zh/nodeDefs.json", "web/icon.svg",
    "web/js", "web/docs/Sage3Attention.md", "workflows/text_to_video.json", "workflows/api/text_to_video.json",
    "workflows/text_to_video_ab.json", "workflows/api/text_to_video_ab.json", "workflows/NOTICE.md",
)  # fmt: skip
MUST_NOT = ("tests/", "benchmarks/", "docs/", ".ci/", "Makefile", "setup.py", "constraints.txt", ".git")


def run(*command, cwd=ROOT, stderr_too=False, **options):
    done = subprocess.run([str(x) for x in command], cwd=cwd, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"[-3000:]
    return done.stdout + done.stderr * stderr_too


def tracked():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git clone: there is no list of the files that would be shipped")
    return [x for x in run("git", "ls-files", "-z").split("\0") if x and (ROOT / x).exists()]


def comfyui_python():
    given = os.environ.get("COMFYUI_PATH")
    if not given:
        pytest.skip("COMFYUI_PATH is not set: no real ComfyUI to install the pack in")
    python = os.environ.get("COMFYUI_PYTHON")
    return Path(given).resolve(), find_python(Path(given), Path(python) if python else None)


def is_whole(names):
    for wanted in MUST:
        assert any(n == wanted or n.startswith(f"{wanted}/") for n in names), f"{wanted} is missing"
    for unwanted in MUST_NOT:
        assert not [n for n in names if n.startswith(unwanted)], f"{unwanted} is shipped"


def test_the_ignore_file_leaves_out_what_comfyui_does_not_need_and_nothing_else():
    """Its rules are git's, so git reads them."""
    names = tracked()
    ignore = ["git", "-c", f"core.excludesFile={ROOT / '.comfyignore'}", "check-ignore", "--no-index", "--stdin", "-z"]
    ignored = subprocess.run(ignore, input="\0".join(names), cwd=ROOT, capture_output=True, text=True, check=False)
    assert ignored.returncode == 0, ignored.stderr
    is_whole(sorted(set(names) - set(ignored.stdout.split("\0"))))


def test_the_metadata_is_complete():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, comfy = data["project"], data["tool"]["comfy"]
    assert comfy["PublisherId"] == "comfy-sage3"
    assert comfy["DisplayName"] == "Sage3 Attention"
    assert comfy["requires-comfyui"] == ">=0.3.64"
    assert "comfyui" not in project["name"].lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["version"] in (ROOT / "comfy_sage3/__init__.py").read_text(encoding="utf-8")
    assert "Environment :: GPU :: NVIDIA CUDA" in project["classifiers"]
    assert {re.split(r"[<>=!~]", d)[0] for d in project["dependencies"]} == {"torch"}  # which ComfyUI has
    assert "web" not in comfy, "the front end would be served twice: __init__.py has WEB_DIRECTORY"


def test_the_icon_is_small_and_square():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    text = (ROOT / data["tool"]["comfy"]["Icon"]).read_text(encoding="utf-8")
    size = re.search(r'<svg [^>]*width="(\d+)" height="(\d+)"', text)
    assert size is not None
    assert size[1] == size[2]
    assert int(size[1]) <= 400
    assert "<script" not in text
    assert "href" not in text


def test_the_registrys_own_tool_accepts_the_pack_and_packs_it(tmp_path):
    """COMFY_CLI names comfy-cli's program "comfy"; it works in a copy of the tracked files."""
    comfy = os.environ.get("COMFY_CLI")
    if not comfy:
        pytest.skip("COMFY_CLI is not set: no comfy-cli to validate and pack with")
    copy = tmp_path / "pack"
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    run("git", "init", "-q", cwd=copy)
    run("git", "add", "-A", "-f", cwd=copy)
    env = os.environ | {"HOME": str(tmp_path), "NO_COLOR": "1"}
    command = [comfy, "--skip-prompt", "--no-enable-telemetry", "node"]
    said = run(*command, "validate", cwd=copy, env=env, timeout=120, stderr_too=True)
    assert "All validation checks passed" in said
    assert "warning" not in said.lower()
    run(*command, "pack", cwd=copy, env=env, timeout=120)
    with zipfile.ZipFile(copy / "node.zip") as packed:
        is_whole(packed.namelist())


@pytest.fixture
def site(tmp_path):
    """A folder with comfy-sage3 as pip installs it."""
    _, python = comfyui_python()
    source = copy_of_tracked(tmp_path / "source")
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site", source, timeout=300)
    return tmp_path / "site"


def copy_of_tracked(folder):
    """Building writes into the folder it builds from."""
    for name in tracked():
        if not name.startswith(("tests/", "benchmarks/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def test_two_clones_and_a_pip_install_live_in_one_process(tmp_path, site):
    """torch's operators are one for a process: each load of the pack has a namespace of its own, so none is made twice."""
    comfyui, python = comfyui_python()
    script = Path(__file__).with_name("both.py")
    said = run(python, script, comfyui, ROOT, tmp_path / "comfy", site, cwd=comfyui, timeout=300)
    seen = json.loads(said.strip().splitlines()[-1])
    assert seen["pip_file"].startswith(str(site))
    assert (seen["loaded"], seen["node"], seen["same"]) == (True, True, True)
    assert (seen["different_modules"], len(seen["namespaces"])) == (3, 3)


def test_installing_changes_no_package_of_comfyui(tmp_path):
    """pip install into an environment that sees all of ComfyUI's packages: comfy-sage3 comes, nothing else moves."""
    if not os.environ.get("SAGE3_INSTALL_TEST"):
        pytest.skip("SAGE3_INSTALL_TEST=1 is not set: slow, asks PyPI, needs COMFYUI_PATH and COMFYUI_PYTHON")
    _, python = comfyui_python()
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    run(python, "-m", "venv", "--without-pip", tmp_path / "venv", timeout=300)  # pip and setuptools are ComfyUI's too
    (inside,) = (p for p in ((tmp_path / "venv/bin/python"), (tmp_path / "venv/Scripts/python.exe")) if p.exists())
    theirs, ours = run(python, "-c", where).strip(), run(inside, "-c", where).strip()
    Path(ours, "comfyui.pth").write_text(f"{theirs}\n", encoding="utf-8")  # read, never written: pip changes its own only

    def packages():
        listed = json.loads(run(inside, "-m", "pip", "list", "--format=json", "--disable-pip-version-check", timeout=120))
        return {p["name"].lower().replace("_", "-"): p["version"] for p in listed}

    def conflicts():
        command = [str(inside), "-m", "pip", "check", "--disable-pip-version-check"]
        return set(subprocess.run(command, capture_output=True, text=True, check=False, timeout=300).stdout.splitlines())

    before, had = packages(), conflicts()
    assert "comfy-kitchen" in before, "COMFYUI_PYTHON has not got ComfyUI's packages"
    source = copy_of_tracked(tmp_path / "source")
    report = tmp_path / "report.json"
    run(inside, "-m", "pip", "install", "-q", "--dry-run", "--report", report, source, timeout=600)
    assert [x["metadata"]["name"] for x in json.loads(report.read_text())["install"]] == ["comfy-sage3"]
    run(inside, "-m", "pip", "install", "-q", source, timeout=600)
    after = packages()
    assert {name: version for name, version in after.items() if name != "comfy-sage3"} == before
    assert "comfy-sage3" in after
    assert conflicts() - had <= {"No broken requirements found."}
