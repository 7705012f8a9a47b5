"""``python -m comfy_sage3 sass``: the table, the faults, and one real run where there is a compiler."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from comfy_sage3.kernels import sass
from comfy_sage3.kernels.jit.cuda import find_binary, find_cuda
from comfy_sage3.kernels.jit.disassembly import Instruction, Loop, Resources
from comfy_sage3.kernels.jit.machine import Machine, ToolchainError
from comfy_sage3.kernels.sass import Kernel, SassError


def loop(*opcodes):
    body = tuple(Instruction(16 * i, "", opcode, "") for i, opcode in enumerate(opcodes))
    return Loop(body, 3, body)


def kernel(*loops, mangled="_Z4loopILi128ELb1EEvPi", spills=0, arch="90a", **resources):
    return Kernel("attention/x.cu", arch, mangled, "loop<128, true>", Resources(spill_loads=spills, **resources), loops)


WORK = ("IMMA.16832.S8.S8",) * 8 + ("MUFU.EX2", "FFMA", "FFMA", "BRA")


def test_a_row_per_loop_and_a_block_per_kernel():
    text = sass.render([kernel(loop(*WORK), loop(*WORK[1:]), registers=168), kernel(arch="120a")])
    lines = text.splitlines()
    assert lines[0] == "attention/x.cu: loop<128, true>"
    assert lines[1].split()[:2] == ["arch", "registers"]
    assert lines[2].split() == ["sm_90a", "168", "0", "0", "0", "12", "3", "12", "8", "4", "3.00"]
    assert lines[3].strip() == "8 IMMA.16832, 2 FFMA, 1 MUFU.EX2, 1 BRA"
    assert lines[4].split() == ["11", "3", "11", "7", "3.5", "3.14"]
    assert lines[6].split() == ["sm_120a", "0", "0", "0", "0", "-", "-", "-", "-", "-", "-"]


@pytest.mark.parametrize(
    ("mangled", "scores"),
    [("_Z4loopILi128EEvPi", 4), ("_Z4loopILi2ELi64EEvPi", 8), ("_Z4loopPi", 1), ("_Z4loopILi100EEvPi", 1)],
)
def test_scores_follow_from_the_head_dim_in_the_name_else_from_the_exponentials(mangled, scores):
    made = kernel(loop(*WORK), mangled=mangled)
    assert made.scores(made.loops[0]) == scores


def test_faults():
    assert kernel(loop(*WORK)).fault is None
    assert kernel(loop(*WORK), stack=64).fault is None  # a stack that the loops do not touch costs nothing
    assert kernel(loop(*WORK), spills=8).fault is None  # outside the loops: once per block, or a producer that waits
    assert kernel(spills=8).fault == "spills 8 bytes"  # without a loop of products there is no outside
    assert kernel(loop(*WORK, "LDL")).fault == "1 accesses to local memory in its main loops"


def test_what_a_source_admits_is_said_and_no_fault_but_more_is(monkeypatch, capsys, tmp_path):
    (tmp_path / "x.cu").write_text("")
    made = [kernel(loop(*WORK, "LDL")), kernel(loop(*WORK), spills=8)]
    monkeypatch.setattr(sass, "examine", lambda *args, **kwargs: [replace(k, admitted=1) for k in made])
    assert sass.run(arguments("--csrc", str(tmp_path))) == 0
    out = capsys.readouterr().out
    assert "ADMITTED loop<128, true> on sm_90a (attention/x.cu): 1 accesses to local memory in its main loops" in out
    made[0] = kernel(loop(*WORK, "LDL", "STL"))
    assert sass.run(arguments("--csrc", str(tmp_path))) == 1
    assert "2 accesses to local memory in its main loops, where its source admits 1" in capsys.readouterr().out


def test_a_source_admits_for_the_kernels_that_it_names():
    text = "// sass: 60 accesses to local memory in the main loops of int8_grad<128\n"
    assert sass.ADMITTED.findall(text) == [("60", "int8_grad<128")]
    assert sass.ADMITTED.findall(text.replace("// sass", "// so sass")) == []


def test_notes_of_ptxas_are_shown():
    made = kernel(loop(*WORK), notes=["wgmma instructions are serialized"])
    assert "    ptxas: wgmma instructions are serialized" in sass.render([made])


def arguments(*text):
    parser = argparse.ArgumentParser()
    sass.add_arguments(parser)
    return parser.parse_args(text)


def test_the_exit_status_is_1_for_spills_unless_they_are_allowed(monkeypatch, capsys, tmp_path):
    (tmp_path / "x.cu").write_text("")
    monkeypatch.setattr(sass, "examine", lambda *args, **kwargs: [kernel(loop(*WORK, "STL"), spills=8)])
    assert sass.run(arguments("--csrc", str(tmp_path))) == 1
    said = "FAILED loop<128, true> on sm_90a (attention/x.cu): 1 accesses to local memory in its main loops"
    assert said in capsys.readouterr().out
    assert sass.run(arguments("--csrc", str(tmp_path), "--allow-spills")) == 0


def test_spills_outside_the_main_loops_are_said(monkeypatch, capsys, tmp_path):
    (tmp_path / "x.cu").write_text("")
    monkeypatch.setattr(sass, "examine", lambda *args, **kwargs: [kernel(loop(*WORK)), kernel(loop(*WORK), spills=8)])
    assert sass.run(arguments("--csrc", str(tmp_path))) == 0
    assert "2 kernels compiled; none spills in its main loop; 1 do outside it." in capsys.readouterr().out


def test_files_and_architectures_become_pairs(monkeypatch, tmp_path, capsys):
    for name in ("attention/int8_sm90.cu", "quantize/k.cu"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    asked = []
    monkeypatch.setattr(sass, "examine", lambda plan, tree, **kwargs: asked.extend(plan) or [])
    sass.run(arguments("--csrc", str(tmp_path), "--arch", "90,120"))
    assert [(path.name, arch) for path, arch in asked] == [("int8_sm90.cu", "90a"), ("k.cu", "90a"), ("k.cu", "120a")]
    asked.clear()
    outside = tmp_path.parent / "try.cu"
    sass.run(arguments(str(outside), "--csrc", str(tmp_path / "quantize"), "--arch", "75"))
    assert asked == [(outside.resolve(), "75")]


def test_missing_sources_and_tools_are_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(sass, "tree_here", lambda: None)
    with pytest.raises(SassError, match="no kernel sources"):
        sass.run(arguments())
    bare = Machine(env={}, site_packages=(), cuda_roots=())
    with pytest.raises(SassError, match="nvcc was not found"):
        sass.examine([(tmp_path / "x.cu", "90a")], sass.Tree(tmp_path), machine=bare)


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        ("void sage3::loop<128, true>(int*, float)", "loop<128, true>"),
        ("void (anonymous namespace)::loop<(int)128, (bool)1>(int*)", "loop<128, true>"),
        ("scale_kernel(float*, int)", "scale_kernel"),
        ("void a::b<a::C<1>, (bool)0>(a::D*)", "b<a::C<1>, false>"),
    ],
)
def test_names_are_cut_to_what_tells_them_apart(demangled, short):
    assert sass._short(demangled) == short


def tools():
    try:
        find_binary("cuobjdump", Machine(), find_cuda(Machine(), None, ("90a", "120a")))
    except ToolchainError as problem:
        return str(problem)
    return None


@pytest.mark.skipif(tools() is not None, reason=f"needs nvcc and cuobjdump: {tools()}")
def test_a_real_kernel_on_two_architectures(tmp_path, capsys):
    (tmp_path / "mma.cu").write_text("""
        template <int kHeadDim> __global__ void loop(int* out, const unsigned* b, int n) {
          int d[4] = {};
          #pragma unroll 1
          for (int i = 0; i < n; ++i)
            #pragma unroll
            for (int j = 0; j < kHeadDim / 32; ++j)
              asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%4,%4,%4},{%5,%5},"
                           "{%0,%1,%2,%3};" : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(i), "r"(b[j]));
          for (int j = 0; j < 4; ++j) out[threadIdx.x * 4 + j] = d[j];
        }
        template __global__ void loop<128>(int*, const unsigned*, int);
    """)
    dump = tmp_path / "out"
    assert sass.run(arguments("--csrc", str(tmp_path), "--arch", "80,120", "--dump", str(dump))) == 0
    text = capsys.readouterr().out
    assert "2 kernels compiled; none spills." in text
    assert text.count("4 IMMA.16832") == 2
    assert "sm_80" in text
    assert "sm_120a" in text
    assert {path.suffix for path in Path(dump).iterdir()} == {".cubin", ".ptxas", ".sass"}


@pytest.mark.skipif(tools() is not None, reason=f"needs nvcc and cuobjdump: {tools()}")
def test_a_source_that_does_not_compile_is_shown_in_the_compilers_words(tmp_path):
    (tmp_path / "x.cu").write_text("nonsense;")
    with pytest.raises(SassError, match="error"):
        sass.run(arguments("--csrc", str(tmp_path), "--arch", "90"))
