"""Reading what the compiler made: ptxas's resource lines, and the loops in cuobjdump's listing.

A loop is a natural loop of the control-flow graph: a jump back to a block that every path to it passes. Looking
for backward jumps alone would take the way back from a barrier's slow path, which ptxas moves to the end of the
function, for a loop around everything in between.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

# Tensor-core instructions. Per thread: m*n*k / 32 multiply-adds, wgmma (the "G" forms) / 128.
MMA = re.compile(r"^(HMMA|IMMA|QMMA|OMMA|DMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)\.")
_SHAPES = {"16832": (16, 8, 32), "16816": (16, 8, 16), "1688": (16, 8, 8), "16864": (16, 8, 64), "8816": (8, 8, 16)}
_WGMMA_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)\b")
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;")
_LEAVES = {"EXIT", "RET", "BRX", "BRXU", "JMX", "KILL", "BPT"}


@dataclass(frozen=True)
class Instruction:
    """One line of SASS: byte address, guard predicate ("" for none), opcode with its dots, operands."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a jump goes, None for anything else."""
        if self.base not in ("BRA", "JMP") and not self.opcode.startswith("WARPSYNC.COLLECTIVE"):
            return None  # a plain WARPSYNC has a mask of lanes in that place
        match = re.search(r"(?:^|\s)0x([0-9a-f]+)$", self.operands)
        return int(match[1], 16) if match else None

    @property
    def always(self) -> bool:
        """Whether nothing decides about it: no guard and, in a jump, no predicate among the operands."""
        return not self.guard and (self.target is None or re.fullmatch(r"0x[0-9a-f]+", self.operands) is not None)


@dataclass(frozen=True)
class Loop:
    """The instructions of one loop.

    ``aside`` counts those that ptxas moved behind it (slow paths). ``path`` is what one turn executes at the least: of
    the ways around with the most products, the shortest one, past what is rarely needed.
    """

    body: tuple[Instruction, ...]
    aside: int
    path: tuple[Instruction, ...] = ()

    @property
    def by_opcode(self) -> Counter[str]:
        """How many of each on the path; tensor-core instructions with their shape, MUFU with its function."""
        return Counter(_kind(x) for x in self.path)

    @property
    def mma(self) -> int:
        """Tensor-core instructions in it."""
        return sum(1 for x in self.body if MMA.match(x.opcode))

    @property
    def macs(self) -> float:
        """Multiply-adds of the tensor cores on the path, per thread."""
        return sum(_macs(x.opcode) for x in self.path)

    @property
    def local_memory(self) -> int:
        """Loads and stores of local memory: spills, or arrays with an index that is not a constant."""
        return sum(1 for x in self.body if x.base in ("LDL", "STL"))


@dataclass
class Resources:
    """What ptxas says about one kernel."""

    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def spills(self) -> int:
        """Bytes stored and loaded again for want of registers."""
        return self.spill_stores + self.spill_loads


def parse_resources(log: str) -> dict[str, Resources]:
    """The output of ``ptxas -v`` -> kernel's mangled name: its resources.

    A warning that names a kernel (serialized wgmma, ...) stands in its notes, one that names none under "".
    """
    found: dict[str, Resources] = {}
    name = ""
    for line in log.splitlines():
        if match := re.search(r"(?:Compiling entry function '|Function properties for )(\w+)", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            mine = found.setdefault(name, Resources())
            mine.stack, mine.spill_stores, mine.spill_loads = (int(x) for x in match.groups())
        elif match := re.search(r"Used (\d+) registers", line):
            mine = found.setdefault(name, Resources())
            mine.registers = int(match[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                mine.shared = int(shared[1])
        elif "warning" in line or re.search(r"Potential Performance Loss|wgmma", line):
            about = re.search(r"function '?(\w+)'?", line)
            found.setdefault(about[1] if about else "", Resources()).notes.append(line.strip())
    return found


def parse_functions(listing: str) -> dict[str, list[Instruction]]:
    """The output of ``cuobjdump -sass`` -> function's mangled name: its instructions, without the padding."""
    found: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in listing.splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            code = found.setdefault(match[1], [])
        elif match := _LINE.match(line):
            code.append(Instruction(int(match[1], 16), match[2] or "", match[3], match[4]))
    return {name: _without_padding(code) for name, code in found.items()}


def loops(code: list[Instruction]) -> list[Loop]:
    """Every natural loop that holds no other loop with tensor-core instructions: most of those first, then short."""
    blocks, after = _blocks(code)
    above = _dominators(after)
    found: dict[int, set[int]] = {}
    for block, nexts in enumerate(after):
        for head in nexts:
            if head in above[block]:  # a jump back
                found.setdefault(head, set()).update(_natural(head, block, after))
    made = []
    for head, members in found.items():
        inner = [m for h, m in found.items() if h != head and m < members and _has_mma(blocks, m)]
        if not inner:
            made.append(_loop(blocks, head, members, after))
    return sorted(made, key=lambda loop: (-loop.mma, len(loop.body)))


def main_loops(code: list[Instruction]) -> tuple[Loop, ...]:
    """The innermost loops that do the work: the one with the most tensor-core instructions, and those with at
    least half as many (the same loop without a mask, another warp's); none where no loop has any."""
    found = [loop for loop in loops(code) if loop.mma]
    return tuple(loop for loop in found if 2 * loop.mma >= found[0].mma)


def _macs(opcode: str) -> float:
    if not MMA.match(opcode):
        return 0.0
    if match := _WGMMA_SHAPE.search(opcode):
        m, n, k = (int(x) for x in match.groups())
        return m * n * k / 128
    m, n, k = next((_SHAPES[part] for part in opcode.split(".") if part in _SHAPES), (0, 0, 0))
    return m * n * k / 32


def _kind(x: Instruction) -> str:
    """The opcode as the table shows it: OMMA.SF.16864, MUFU.EX2, FFMA."""
    if x.base == "MUFU":
        return ".".join(x.opcode.split(".")[:2])
    if not MMA.match(x.opcode):
        return x.base
    kept = itertools.takewhile(lambda part: not part[0].isdigit(), x.opcode.split("."))
    shape = next((part for part in x.opcode.split(".") if part[0].isdigit()), "")
    return ".".join([*kept, shape])


def _without_padding(code: list[Instruction]) -> list[Instruction]:
    """Functions end in a jump to itself and NOPs, which never run."""
    end = len(code)
    while end and (code[end - 1].opcode == "NOP" or code[end - 1].target == code[end - 1].address):
        end -= 1
    return code[:end]


def _blocks(code: list[Instruction]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Basic blocks in address order, and to which blocks each leads."""
    starts = {code[0].address} if code else set()
    for this, following in zip(code, code[1:], strict=False):
        if this.target is not None:
            starts |= {this.target, following.address}
        elif this.base in _LEAVES:
            starts.add(following.address)
    blocks: list[list[Instruction]] = []
    for x in code:
        if x.address in starts:
            blocks.append([])
        blocks[-1].append(x)
    number = {block[0].address: i for i, block in enumerate(blocks)}
    after: list[list[int]] = []
    for i, block in enumerate(blocks):
        last = block[-1]
        nexts = [number[last.target]] if last.target is not None and last.target in number else []
        stops = last.always and (last.target is not None or last.base in _LEAVES)
        if not stops and i + 1 < len(blocks):
            nexts.append(i + 1)
        after.append(nexts)
    return blocks, after


def _dominators(after: list[list[int]]) -> list[set[int]]:
    """For each block, the blocks that every path from the first one to it passes, itself included.

    Blocks that nothing leads to (targets of indirect jumps) count as reached from the start.
    """
    before: list[list[int]] = [[] for _ in after]
    for block, nexts in enumerate(after):
        for following in nexts:
            before[following].append(block)
    everything = set(range(len(after)))
    above = [{i} if i == 0 or not before[i] else everything for i in range(len(after))]
    changed = True
    while changed:
        changed = False
        for i in range(1, len(after)):
            if before[i]:
                new = set.intersection(*(above[b] for b in before[i])) | {i}
                if new != above[i]:
                    above[i], changed = new, True
    return above


def _natural(head: int, tail: int, after: list[list[int]]) -> set[int]:
    """The blocks from which ``tail`` is reached without passing ``head``."""
    before: list[list[int]] = [[] for _ in after]
    for block, nexts in enumerate(after):
        for following in nexts:
            before[following].append(block)
    members, waiting = {head, tail}, [tail]
    while waiting:
        block = waiting.pop()
        if block == head:
            continue
        for earlier in before[block]:
            if earlier not in members:
                members.add(earlier)
                waiting.append(earlier)
    return members


def _has_mma(blocks: list[list[Instruction]], members: Iterable[int]) -> bool:
    return any(MMA.match(x.opcode) for i in members for x in blocks[i])


def _loop(blocks: list[list[Instruction]], head: int, members: set[int], after: list[list[int]]) -> Loop:
    """The loop's instructions up to its last jump back; what lies behind that is a slow path."""
    latch = max(i for i in members if head in after[i])
    body = [x for i in sorted(members) if head <= i <= latch for x in blocks[i]]
    aside = sum(len(blocks[i]) for i in members if not head <= i <= latch)
    return Loop(tuple(body), aside, tuple(x for i in _path(blocks, head, members, after) for x in blocks[i]))


def _path(blocks: list[list[Instruction]], head: int, members: set[int], after: list[list[int]]) -> list[int]:
    """The way around that has the most products and, of those, the fewest instructions. Inner loops are not gone round."""
    best: dict[int, tuple[int, int, int | None]] = {}  # from a block to the jump back: products, -instructions, the next
    waiting = [head]
    entered: set[int] = set()
    while waiting:
        block = waiting[-1]
        nexts = [n for n in after[block] if n in members and n != head]
        entered.add(block)
        unknown = [n for n in nexts if n not in best and n not in entered]
        if unknown:
            waiting.append(unknown[0])
            continue
        waiting.pop()
        ways = [best[n] + (n,) for n in nexts if n in best]
        ends = [(0, 0, None, None)] if head in after[block] else []
        options = [(products, length, n) for products, length, _, n in [*ways, *ends]]
        if options:  # else: nothing but the way back into an inner loop
            products, length, following = max(options, key=lambda o: o[:2])
            mma = sum(1 for x in blocks[block] if MMA.match(x.opcode))
            best[block] = (products + mma, length - len(blocks[block]), following)
    found, at = [], head if head in best else None
    while at is not None:
        found.append(at)
        at = best[at][2]
    return found
