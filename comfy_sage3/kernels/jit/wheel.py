"""A wheel of this package with built kernels inside, for people without compilers.

pip makes the plain wheel from the checkout; the library goes into it, and with it the platform's tag and a local
version that says which torch and CUDA it is for.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

from ..sources import PACKAGE
from .cache import MANIFEST, Entry
from .machine import dotted, numbers
from .ninja import BuildError

PARTS = ("comfy_sage3", "csrc", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
INSIDE = "comfy_sage3/kernels/prebuilt"


def make_wheel(entry: Entry, folder: Path, version: str, checkout: Path = PACKAGE.parent) -> Path:
    """Write the wheel to ``folder``; returns its path. Raises BuildError outside a checkout."""
    if not (checkout / "pyproject.toml").is_file():
        raise BuildError("a wheel is made from a git checkout of comfy_sage3, and this is an installed copy")
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "checkout")  # setuptools leaves its build folder behind, and reuses what lies there
        copy.mkdir()
        for part in PARTS:
            if (checkout / part).is_dir():
                shutil.copytree(checkout / part, copy / part, ignore=shutil.ignore_patterns("__pycache__", "prebuilt"))
            elif (checkout / part).is_file():
                shutil.copy(checkout / part, copy / part)
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", scratch, str(copy)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        plain = next(Path(scratch).glob("*.whl"), None)
        if done.returncode or plain is None:
            raise BuildError("pip could not make the plain wheel", done.stdout + done.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        return with_library(plain, entry, folder, version)


def with_library(plain: Path, entry: Entry, folder: Path, version: str) -> Path:
    """A copy of the wheel ``plain`` in ``folder`` with the library, renamed and with a RECORD of its own."""
    m = entry.manifest
    local = f"{version}+torch{dotted(numbers(m.torch)[:2])}.cu{''.join(map(str, numbers(m.cuda or '')[:2]))}"
    tag = f"py3-none-{platform_tag()}"
    path = folder / f"comfy_sage3-{local}-{tag}.whl"
    old, new = f"comfy_sage3-{version}.dist-info/", f"comfy_sage3-{local}.dist-info/"
    rows: list[str] = []
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:

        def add(name: str, data: bytes) -> None:
            target.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            rows.append(f"{name},sha256={digest},{len(data)}")

        for name in source.namelist():
            data = source.read(name)
            if name.endswith("/") or name == f"{old}RECORD":
                continue
            if name == f"{old}WHEEL":
                lines = [x for x in data.decode().splitlines() if x and not x.startswith(("Tag:", "Root-Is-Purelib:"))]
                data = "\n".join([*lines, "Root-Is-Purelib: false", f"Tag: {tag}", ""]).encode()
            elif name == f"{old}METADATA":
                data = data.replace(f"\nVersion: {version}\n".encode(), f"\nVersion: {local}\n".encode(), 1)
            add(name.replace(old, new, 1), data)
        for file in (entry.library, entry.folder / MANIFEST):
            add(f"{INSIDE}/{m.entry}/{file.name}", file.read_bytes())
        target.writestr(f"{new}RECORD", "\n".join([*rows, f"{new}RECORD,,", ""]))
    return path


def platform_tag() -> str:
    """This platform as wheels name it, not promising more than was built: linux_x86_64, win_amd64."""
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
