"""The 4-bit kernel's machine code for sm_120 and sm_121: the instruction it is written for, no spills, few issue slots."""

import pytest

from comfy_sage3.kernels import sass
from comfy_sage3.kernels.jit.cuda import find_binary, find_cuda
from comfy_sage3.kernels.jit.machine import Machine, ToolchainError
from comfy_sage3.kernels.sources import find_tree

OMMA = "OMMA.SF.16864"
PER_SCORE = {64: 7.5, 128: 8.5}  # issue slots; the official kernel has 11 and 13.3


@pytest.fixture(scope="module")
def kernels():
    machine, tree = Machine(), find_tree()
    try:
        find_binary("cuobjdump", machine, find_cuda(machine, None, ["120a", "121a"]))
    except ToolchainError as problem:
        pytest.skip(str(problem))
    source = tree.root.resolve() / "attention" / "fp4_sm120.cu"
    return sass.examine([(source, "120a"), (source, "121a")], sass.Tree(tree.root.resolve(), tree.rows))


def test_every_variant_is_there(kernels):
    assert sorted((k.arch, k.name) for k in kernels) == [
        (arch, f"fp4_attention<{d}, {mask}>")
        for arch in ("120a", "121a")
        for d in (128, 256, 64)
        for mask in ("false", "true")
    ]


def test_nothing_spills(kernels):
    """Not a byte. Head dim 256, at the limit of registers: none with nvcc 13.0, a few a job with 13.5, never in a loop."""
    assert [(k.arch, k.name, k.resources.spills) for k in kernels if k.resources.spills and "<256," not in k.name] == []
    assert [(k.arch, k.name, k.fault) for k in kernels if k.fault] == []


def test_the_products_are_block_scaled_ones(kernels):
    for k in kernels:
        (loop,) = k.loops
        products = {64: 34, 128: 66, 256: 98}[int(k.name.split("<")[1].split(",")[0])]
        assert loop.by_opcode[OMMA] == products, k.name


def test_issue_slots_of_a_score(kernels):
    found = {(k.arch, k.name): len(k.loops[0].path) / k.scores(k.loops[0]) for k in kernels}
    too_many = {
        name: slots for name, slots in found.items()
        for d, most in PER_SCORE.items() if f"<{d}," in name[1] and slots > most
    }  # fmt: skip
    assert too_many == {}
