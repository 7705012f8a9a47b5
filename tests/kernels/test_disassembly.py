"""Reading ptxas and cuobjdump, on listings cut down from real ones."""

import pytest

from comfy_sage3.kernels.jit.disassembly import loops, main_loops, parse_functions, parse_resources

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4loopILi128EEvPi' for 'sm_90a'
ptxas info    : Function properties for _Z4loopILi128EEvPi
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 3 barriers, 16 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compiling entry function '_Z4loopILi64EEvPi' for 'sm_90a'
ptxas info    : Function properties for _Z4loopILi64EEvPi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 1 barriers
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x in function '_Z4loopILi64EEvPi'
"""  # noqa: E501


def test_resources_per_kernel():
    found = parse_resources(PTXAS)
    big, small = found["_Z4loopILi128EEvPi"], found["_Z4loopILi64EEvPi"]
    assert (big.registers, big.stack, big.spills, big.shared) == (168, 16, 20, 1024)
    assert (small.registers, small.stack, small.spills, small.notes) == (24, 0, 0, small.notes)
    assert "serialized" in small.notes[0]
    assert big.notes == []


def listing(*lines, name="kernel"):
    """Lines of SASS as cuobjdump prints them, 16 bytes each."""
    text = [f"\t\tFunction : {name}", '\t.headerflags\t@"EF_CUDA_SM90"']
    for i, line in enumerate(lines):
        text.append(f"        /*{16 * i:04x}*/                   {line} ;                          /* 0x000fe20000000800 */")
        text.append("                                                                       /* 0x000e2200000e0000 */")
    return "\n".join(text)


def code(*lines):
    return parse_functions(listing(*lines))["kernel"]


def test_functions_and_their_padding():
    text = listing("MOV R1, R2", "EXIT", "BRA 0x20", "NOP", "NOP") + "\n" + listing("EXIT", name="other")
    found = parse_functions(text)
    assert [x.opcode for x in found["kernel"]] == ["MOV", "EXIT"]
    assert [x.opcode for x in found["other"]] == ["EXIT"]


def test_guards_and_operands():
    (guarded, uniform, plain) = code("@!P0 BRA 0x10", "@UP1 BRA 0x20", "BRA.U UP0, 0x30")
    assert (guarded.guard, guarded.base, guarded.target, guarded.always) == ("@!P0", "BRA", 0x10, False)
    assert (uniform.guard, uniform.always) == ("@UP1", False)
    assert (plain.guard, plain.target, plain.always) == ("", 0x30, False)


def test_a_mask_of_lanes_is_no_address():
    plain, collective = code("WARPSYNC 0xffffffff", "WARPSYNC.COLLECTIVE R2, 0x0")
    assert (plain.target, collective.target) == (None, 0)


def test_the_way_back_from_a_slow_path_is_no_loop():
    # 00 the loop's head tries a barrier; failing, it waits at 50 (a loop without MMA) and comes back to 20.
    # Counting backward jumps, 20 to 60 would be a loop with the tensor-core instruction in it.
    instructions = code(
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0",
        "@!P0 BRA 0x50",
        "IMMA.16832.S8.S8 R20, R12.ROW, R2.COL, R20",
        "@P1 BRA 0x0",
        "EXIT",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R0",
        "@!P0 BRA 0x50",
        "BRA 0x20",
    )
    (loop,) = main_loops(instructions)
    assert [x.address for x in loop.body] == [0x00, 0x10, 0x20, 0x30]
    assert loop.aside == 3
    assert loop.mma == 1


def test_the_inner_loop_with_the_work_is_the_main_one():
    instructions = code(
        "LDG.E R2, [R4]",  # 00 the head of a persistent loop over tiles
        "HGMMA.64x128x16.F32 R24, gdesc[UR8], R24",  # 10 the inner loop
        "MUFU.EX2 R1, R2",
        "@P0 BRA 0x10",
        "STG.E [R4], R2",  # 40 a loop without tensor cores
        "@P2 BRA 0x40",
        "@P1 BRA 0x0",
        "EXIT",
    )
    assert [x.body[0].address for x in main_loops(instructions)] == [0x10]
    assert len(loops(instructions)) == 2
    (loop,) = main_loops(instructions)
    assert loop.by_opcode == {"HGMMA.64x128x16": 1, "MUFU.EX2": 1, "BRA": 1}


def test_the_path_takes_every_product_and_passes_what_is_rare():
    imma = "IMMA.16832.S8.S8 R1, R2.ROW, R3.COL, R1"
    instructions = code(
        imma,  # 00
        "@!P0 BRA 0x40",  # over a rare case
        "MOV R1, R2",
        "MOV R1, R2",
        "@P1 BRA 0x80",  # 40: two products here, or one at 80
        imma,
        imma,
        "BRA 0x90",
        imma,  # 80
        "@P2 BRA 0x90",  # 90: an inner loop that waits
        "@P3 BRA 0x0",
        "EXIT",
    )
    (loop,) = main_loops(instructions)
    assert [x.address for x in loop.path] == [0x00, 0x10, 0x40, 0x50, 0x60, 0x70, 0x90, 0xA0]
    assert loop.mma == 4
    assert loop.macs == 3 * 128


def test_every_loop_with_half_the_work_is_shown_short_ones_first():
    instructions = code(
        "QMMA.16832.F32 R1, R2, R3, R1", "MOV R1, R2", "@P0 BRA 0x0",
        "QMMA.16832.F32 R1, R2, R3, R1", "@P0 BRA 0x30",
        "EXIT",
    )  # fmt: skip
    assert [len(x.body) for x in main_loops(instructions)] == [2, 3]


def test_local_memory_in_a_loop_is_counted():
    imma = "IMMA.16832.S8.S8 R1, R2.ROW, R3.COL, R1"
    (loop,) = main_loops(code("LDL R1, [R2]", imma, "STL [R2], R1", "@P0 BRA 0x0", "EXIT"))
    assert loop.local_memory == 2


@pytest.mark.parametrize(
    ("opcode", "macs"),
    [
        ("IMMA.16832.S8.S8", 128.0),
        ("HMMA.16816.F32", 64.0),
        ("HMMA.1688.F32", 32.0),
        ("IMMA.8816.S8.S8", 32.0),
        ("OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X", 256.0),
        ("QMMA.16832.F32.E4M3.E4M3", 128.0),
        ("QMMA.SF.16832.F32.E4M3.E4M3.E8", 128.0),
        ("IGMMA.64x128x32.S8.S8", 2048.0),
        ("QGMMA.64x64x32.F32.E4M3.E4M3", 1024.0),
        ("FFMA", 0.0),
    ],
)
def test_multiply_adds_per_thread(opcode, macs):
    (loop,) = [x for x in loops(code(f"{opcode} R1, R2, R3, R1", "@P0 BRA 0x0", "EXIT"))]
    assert loop.macs == macs


def test_tensor_core_instructions_are_counted_with_their_shape():
    opcodes = ("OMMA.SF.16864.F32.E2M1", "QMMA.16832.F32", "IGMMA.64x8x32.S8.S8", "MUFU.EX2.FTZ", "FFMA.FTZ")
    (loop,) = main_loops(code(*(f"{x} R1, R2, R3, R1" for x in opcodes), "@P0 BRA 0x0", "EXIT"))
    assert list(loop.by_opcode) == ["OMMA.SF.16864", "QMMA.16832", "IGMMA.64x8x32", "MUFU.EX2", "FFMA", "BRA"]


def test_code_without_loops_and_no_code():
    assert main_loops(code("MOV R1, R2", "EXIT")) == ()
    assert main_loops(code("MOV R1, R2", "@P0 BRA 0x0", "EXIT")) == ()
    assert main_loops([]) == ()


def test_an_indirect_jump_ends_a_block_without_breaking_the_rest():
    (loop,) = main_loops(code("BRX R2 -0x10", "IMMA.16832.S8.S8 R1, R2.ROW, R3.COL, R1", "@P0 BRA 0x10", "EXIT"))
    assert len(loop.body) == 2
