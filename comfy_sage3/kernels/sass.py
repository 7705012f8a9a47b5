"""``python -m comfy_sage3 sass``: what the compiler makes of every kernel, on a machine without a GPU.

Compiles each .cu for each of its architectures, refuses spills in main loops, and prints the main loops (the innermost
ones with the most tensor-core instructions) by opcode. Needs the [build] extra and nothing else.

A score is one element of Q times K. How many a thread makes per turn of the loop follows from the multiply-adds
of its tensor-core instructions: 2 * head_dim for each (QK and PV), the head_dim being the kernel's first
template argument that can be one; without such an argument the exponentials are counted.

A source may admit what it cannot help, and says so when it is compiled: a line "// sass: 33 accesses to local memory in
the main loops of int8_grad<128". More than that fails.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import textwrap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import Sage3Error
from .jit.cuda import Cuda, find_binary, find_cuda
from .jit.disassembly import Loop, Resources, main_loops, parse_functions, parse_resources
from .jit.flags import nvcc_flags
from .jit.machine import Machine, ToolchainError, parallel_jobs
from .jit.setting import tree_here
from .sources import ALL, Tree, gencode, parse_archs

HEAD_DIMS = (32, 64, 96, 128, 192, 256)
ADMITTED = re.compile(r"^// sass: (\d+) accesses to local memory in the main loops of (\S+)$", re.MULTILINE)
HEADER = ("arch", "registers", "shared", "stack", "spills", "loop", "aside", "path", "mma", "scores", "per score")


class SassError(Sage3Error):
    """A kernel that does not compile, or a tool that is missing."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of one source on one architecture, as compiled."""

    source: str
    arch: str
    mangled: str
    name: str
    resources: Resources
    loops: tuple[Loop, ...]
    admitted: int = 0  # accesses to local memory in the main loops, by the source's own word

    def scores(self, loop: Loop) -> float | None:
        """Score elements per thread and turn of a loop, by its path."""
        if "fp4_attention" in self.mangled:
            return 64.0  # by products there are more, for the rows' sums, or fewer: head dim 256 takes half of P V at a time
        head_dim = next((int(x) for x in re.findall(r"Li(\d+)E", self.mangled) if int(x) in HEAD_DIMS), None)
        return (loop.macs / (2 * head_dim) if head_dim else loop.by_opcode["MUFU.EX2"]) or None

    @property
    def fault(self) -> str | None:
        """Why ``sass`` does not accept it: registers in memory where it counts, in a main loop, or anywhere without one."""
        if not self.loops:
            return f"spills {self.resources.spills} bytes" if self.resources.spills else None
        if self.local <= self.admitted:
            return None
        admitted = f", where its source admits {self.admitted}" if self.admitted else ""
        return f"{self.local} accesses to local memory in its main loops{admitted}"

    @property
    def local(self) -> int:
        """Accesses to local memory in the main loops."""
        return sum(loop.local_memory for loop in self.loops)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("files", nargs="*", type=Path, help="the .cu files (default: all in csrc)")
    parser.add_argument("--arch", default=None, help='such as "90a,120a" (default: every one a file is for)')
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--csrc", type=Path, default=None, help="another folder of sources")
    parser.add_argument("--brief", action="store_true", help="the table without the opcodes of the loops")
    parser.add_argument("--dump", type=Path, default=None, help="write each cubin and its listing to this folder")
    parser.add_argument("--allow-spills", action="store_true", help="show spills without failing")
    parser.add_argument("--flag", action="append", default=[], help="one more flag for nvcc, such as --flag=-DX=1")


def run(args: argparse.Namespace) -> int:
    """Compile, disassemble, print. Returns 0, or 1 when a kernel spills."""
    tree = Tree(args.csrc) if args.csrc else tree_here()
    if tree is None:
        raise SassError("There are no kernel sources beside or inside this package.")
    archs = parse_archs(args.arch) if args.arch else ALL
    files = [path.resolve() for path in args.files] or [k.resolve() for k in tree.kernels()]
    root = Tree(tree.root.resolve(), tree.rows)
    plan = [(f, a) for f in files for a in archs if a in (root.archs_of(f) if f.is_relative_to(root.root) else ALL)]
    kernels = examine(plan, root, extra=args.flag, dump=args.dump)
    shown = [k for k in kernels if args.kernel in k.name or args.kernel in k.mangled]
    print(render(shown, opcodes=not args.brief))
    faults = [k for k in kernels if k.fault]
    for k in faults:
        print(f"FAILED {k.name} on sm_{k.arch} ({k.source}): {k.fault}")
    admitted = [k for k in kernels if k.local and not k.fault]
    for k in admitted:
        print(f"ADMITTED {k.name} on sm_{k.arch} ({k.source}): {k.local} accesses to local memory in its main loops")
    if not faults:
        outside = sum(k.resources.spills > 0 for k in kernels) - len(admitted)
        none = f"none but the {len(admitted)} above" if admitted else "none"
        where = " in its main loop" if outside or admitted else ""
        print(f"{len(kernels)} kernels compiled; {none} spills{where}" + (f"; {outside} do outside it." if outside else "."))
    return 1 if faults and not args.allow_spills else 0


def examine(
    plan: Sequence[tuple[Path, str]], tree: Tree, *, extra: Sequence[str] = (), dump: Path | None = None,
    machine: Machine | None = None,
) -> list[Kernel]:  # fmt: skip
    """Every kernel of ``plan``'s (source, architecture) pairs, compiled and read. Raises SassError."""
    machine = machine or Machine()
    try:
        cuda = find_cuda(machine, None, sorted({arch for _, arch in plan}))
        cuobjdump = find_binary("cuobjdump", machine, cuda)
    except ToolchainError as problem:
        raise SassError(str(problem)) from None
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(parallel_jobs(machine.env)) as pool:
        folder = dump or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        jobs = [pool.submit(_one, f, a, tree, cuda, cuobjdump, machine, folder, extra) for f, a in plan]
        kernels = [kernel for job in jobs for kernel in job.result()]
    return _named(kernels, machine)


def render(kernels: Sequence[Kernel], *, opcodes: bool = True) -> str:
    """A table for a person: one block per kernel, one row per architecture."""
    lines: list[str] = []
    for source, name in dict.fromkeys((k.source, k.name) for k in kernels):
        lines += [f"{source}: {name}", _row(HEADER)]
        for k in (k for k in kernels if (k.source, k.name) == (source, name)):
            r = k.resources
            row: list[object] = [f"sm_{k.arch}", r.registers, r.shared, r.stack, r.spills]
            if not k.loops:
                lines.append(_row([*row, *"------"]))
            for loop in k.loops:
                scores = k.scores(loop)
                per = [f"{scores:g}", f"{len(loop.path) / scores:.2f}"] if scores else ["-", "-"]
                lines.append(_row([*row, len(loop.body), loop.aside, len(loop.path), loop.mma, *per]))
                if opcodes:
                    counts = ", ".join(f"{n} {opcode}" for opcode, n in loop.by_opcode.most_common())
                    lines += textwrap.wrap(counts, 112, initial_indent="    ", subsequent_indent="    ")
                row = [""] * 5  # the next loop of the same kernel
            lines += [f"    ptxas: {note}" for note in r.notes]
        lines.append("")
    return "\n".join(lines)


def _one(
    source: Path, arch: str, tree: Tree, cuda: Cuda, cuobjdump: Path, machine: Machine, folder: Path,
    extra: Sequence[str],
) -> list[Kernel]:  # fmt: skip
    label = source.relative_to(tree.root).as_posix() if source.is_relative_to(tree.root) else source.name
    cubin = folder / f"{label.replace('/', '-').removesuffix('.cu')}.sm_{arch}.cubin"
    flags = [*nvcc_flags(machine.windows), f"-I{tree.include}", "-Xptxas=-v"]
    log = _checked([cuda.nvcc, "-cubin", *flags, *extra, *gencode((arch,)), source, "-o", cubin])
    listing = _checked([cuobjdump, "-sass", cubin])
    cubin.with_suffix(".ptxas").write_text(log)
    cubin.with_suffix(".sass").write_text(listing)
    resources, code = parse_resources(log), parse_functions(listing)
    for note in resources.get("", Resources()).notes:  # said of the file: shown with each of its kernels
        for mine in resources.values():
            mine.notes = [*mine.notes, note] if note not in mine.notes else mine.notes
    said = [(int(count), f"{name.replace('<', 'ILi')}E") for count, name in ADMITTED.findall(source.read_text("utf-8"))]
    return [
        Kernel(label, arch, name, name, mine, main_loops(code[name]), sum(n for n, mangled in said if mangled in name))
        for name, mine in resources.items()
        if name in code
    ]


def _checked(command: Sequence[str | Path]) -> str:
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise SassError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr if "-cubin" in command else done.stdout


def _named(kernels: list[Kernel], machine: Machine) -> list[Kernel]:
    """The kernels with names a person can read, where there is a c++filt."""
    tool = machine.which("c++filt") or machine.which("cu++filt")
    if tool is None or not kernels:
        return kernels
    said = machine.run([str(tool), *(k.mangled for k in kernels)]).splitlines()
    if len(said) != len(kernels):
        return kernels
    return [replace(k, name=_short(name)) for k, name in zip(kernels, said, strict=True)]


def _short(name: str) -> str:
    """ "void a::b<128, true>(int*)" -> "b<128, true>"."""
    name = name.replace("(int)", "").replace("(bool)1", "true").replace("(bool)0", "false")
    name = name.replace("(anonymous namespace)::", "")
    depth, end = 0, len(name)
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            end = i
            break
    name = name[:end].removeprefix("void ")
    head, bracket, rest = name.partition("<")
    return head.rpartition("::")[2] + bracket + rest


def _row(cells: Sequence[object]) -> str:
    return "  " + "".join(f"{cell!s:<9}" if i == 0 else f"{cell!s:>10}" for i, cell in enumerate(cells))
