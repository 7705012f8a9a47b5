"""Writing build.ninja and running it. Everything lies in one private folder and is named relative to it, so
that spaces, other alphabets and long paths on the user's side never reach a compiler where it can be avoided."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..sources import gencode
from .flags import LINK_GCC, SYSTEM_GCC, host_flags, nvcc_flags
from .recipe import Recipe, has_macro, library_name, namespace_of
from .toolchain import Toolchain

Say = Callable[[str], None]


class BuildError(Exception):
    """A build that failed; ``log`` is everything that ninja and the compilers said."""

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.log = log


def ninja_file(recipe: Recipe, toolchain: Toolchain, entry: str, *, verbose: bool = False) -> str:
    """The text of build.ninja. ``verbose`` makes ptxas report registers and spills."""
    windows, cuda, host = toolchain.windows, toolchain.cuda, toolchain.host
    obj = ".obj" if windows else ".o"
    ccbin = host.path.parent if windows else host.path
    compiled = recipe.kernels()
    nvcc: list[object] = [cuda.nvcc, "-ccbin", ccbin, *nvcc_flags(windows, lineinfo=recipe.lineinfo), "-Icsrc/include"]
    nvcc += ["-Xptxas=-v"] if verbose else []
    edges: list[tuple[str, str, Sequence[object]]] = []
    for name, archs in compiled:
        threads = ["--threads", min(len(archs), 4)] if len(archs) > 1 else []
        out, source = _flat(name) + obj, f"csrc/{name}"
        edges.append((out, source, [*nvcc, *threads, *gencode(archs), "-c", source, "-o", out]))

    macros = [f"SAGE3_NAMESPACE={namespace_of(entry)}", *(f"{has_macro(name)}=1" for name, _ in compiled)]
    flags = [*host_flags(windows, recipe.torch.standard, recipe.torch.cxx11_abi)]
    system = [*recipe.torch.include_dirs, *cuda.include_dirs()]
    binding, source = "binding" + obj, "csrc/binding.cpp"
    if windows:
        includes: list[object] = ["/Icsrc/include", *(f"/external:I{path}" for path in system), "/external:W0"]
        command = [host.path, *flags, *(f"/D{m}" for m in macros), *includes, "/c", source, f"/Fo{binding}"]
    else:
        includes = ["-Icsrc/include", *(x for path in system for x in ("-isystem", path))]
        command = [host.path, *flags, *(f"-D{m}" for m in macros), *includes, "-c", source, "-o", binding]
    edges.append((binding, source, command))

    objects = [out for out, _, _ in edges]
    library = library_name(entry, windows)
    cuda_libs = cuda.library_dir() or cuda.home
    if windows:
        libs = [*(f"{name}.lib" for name in recipe.torch.libraries), "cudart_static.lib"]
        paths = [f"/LIBPATH:{recipe.torch.library_dir}", f"/LIBPATH:{cuda_libs}"]
        command = [host.path, "/nologo", "/LD", *objects, f"/Fe{library}", "/link", *paths, *libs]
    else:
        libs = [*(f"-l{name}" for name in recipe.torch.libraries), "-lcudart_static", *SYSTEM_GCC]
        command = [host.path, *LINK_GCC, *objects, f"-L{recipe.torch.library_dir}", f"-L{cuda_libs}", *libs, "-o", library]
    edges.append((library, " ".join(objects), command))

    lines = ["ninja_required_version = 1.5", "rule run", "  command = $line", "  description = $what", ""]
    for out, needs, words in edges:
        what = "linking" if out == library else needs.removeprefix("csrc/")
        lines += [f"build {out}: run {needs}", f"  line = {_shell(words, windows)}", f"  what = {what}", ""]
    return "\n".join(lines)


def run_ninja(
    folder: Path, toolchain: Toolchain, jobs: int, say: Say, env: Mapping[str, str], *, commands: bool = False
) -> str:
    """Build ``folder``; every finished step is said. Returns the whole log; raises BuildError with it."""
    command = [str(toolchain.ninja), "-j", str(jobs), *(["-v"] if commands else [])]
    whole = {**env, **toolchain.host.env, "NINJA_STATUS": "[%f/%t] "}
    log: list[str] = []
    try:
        process = subprocess.Popen(
            command, cwd=folder, env=whole, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except OSError as problem:
        raise BuildError(f"{toolchain.ninja} does not start: {problem}") from None
    try:
        assert process.stdout is not None
        for raw in process.stdout:
            line = raw.decode(errors="replace").rstrip()
            log.append(line)
            if commands or re.match(r"\[\d+/\d+\] ", line):
                say(line)
        status = process.wait()
    finally:
        if process.poll() is None:  # an exception is passing through, such as the user's Ctrl-C
            process.kill()
            process.wait()
    text = "\n".join(log)
    if status:
        raise BuildError(first_error(text), text)
    return text


TELLING = (  # what says why a build failed, most telling first
    r"No space left on device",
    r"\bKilled\b|[Oo]ut of memory|cannot allocate memory",
    r"(^|[\s:(])(error|fatal)( error)?( [A-Z]+\d+)?\s*:",
    r"undefined reference|unresolved external",
    r"^ninja: ",
    r"^FAILED",
)


def first_error(log: str) -> str:
    """The line of the log that a person wants to read first."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for pattern in TELLING:
        for line in lines:
            if re.search(pattern, line):
                return line
    return lines[-1] if lines else "the compiler said nothing"


def _flat(name: str) -> str:
    return name.removesuffix(".cu").replace("/", "-")


def _shell(words: Sequence[object], windows: bool) -> str:
    """A command line as a ninja value. ninja hands it to sh, or on Windows straight to CreateProcess."""
    texts = [str(word) for word in words]
    line = subprocess.list2cmdline(texts) if windows else shlex.join(texts)
    return line.replace("$", "$$").replace("\n", " ")


def inherited(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for compilers: ours, less what would change what they make."""
    drop = {"NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "CL", "_CL_"}  # flags that no hash would know of
    return {name: value for name, value in (os.environ if env is None else env).items() if name not in drop}
