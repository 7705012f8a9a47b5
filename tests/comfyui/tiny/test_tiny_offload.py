"""The node on Wan in a real ComfyUI: loaded in part (low-VRAM offload), and under the stock TorchCompileModel node."""

import shutil

import pytest
from tiny_expect import LARGEST_ERROR, fell_back, kept_exact, served, total

CALLS = 12  # 3 layers, self- and cross-attention, 2 steps
INT8 = LARGEST_ERROR["int8"]
every_load = pytest.mark.parametrize("how", ["offloaded", "offloaded_all", "offloaded_lora"])


@every_load
def test_the_model_was_loaded_in_part(offload, how):
    """Else the tests below would show nothing."""
    seen = offload(how)
    whole, part = seen["whole"], seen["part"]
    assert (whole["lowvram"], whole["modules"], whole["loaded"]) == (False, 0, 1)
    assert part["lowvram"]
    assert part["modules"] > 20
    assert part["casts"] >= part["modules"]  # at call time
    assert part["loaded"] < 0.5
    assert (part["loaded"] > 0) == (how == "offloaded")
    assert part["patches_at_call"] == (9 if how == "offloaded_lora" else 0)  # q, k, v of three layers


@every_load
def test_offloaded_the_calls_are_counted_as_without(offload, how):
    seen = offload(how)
    assert seen["report"]["lines"] == seen["whole_report"]["lines"]
    assert served(seen["report"], "int8-emulated") == total(seen["report"]) == len(seen["errors"]) == CALLS


@every_load
def test_offloaded_the_result_is_the_loaded_models_bit_for_bit(offload, how):
    seen = offload(how)
    assert (seen["plain"], seen["exact"], seen["int8"]) == (0, 0, 0)
    assert 0 < seen["int8_from_plain"] < INT8
    assert seen["errors"] == seen["whole_errors"]
    assert all(0 < error < INT8 for error in seen["errors"])


@every_load
def test_after_offloading_and_unpatching_the_model_is_as_it_was(offload, how):
    """Loaded whole again and sampled without the node; and its weights, once unloaded."""
    seen = offload(how)
    assert seen["again"] == 0
    assert seen["left_behind"] == 0
    assert seen["weights_same"]


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler (g++) on a CPU")


@needs_compiler
@pytest.mark.parametrize(("where", "wish"), [("after", "int8"), ("before", "fp4")])
def test_the_stock_compile_node(offload, where, wish):
    """After our node or before it, in one session with other patches of the same model: its own graphs, its own counts."""
    seen = offload("stock_compile")[where]
    assert seen["graphs"] > 0
    assert seen["outside"] == 0
    assert served(seen["report"], f"{wish}-emulated") == total(seen["report"]) == CALLS
    assert fell_back(seen["report"]) == 0
    assert 0 < seen["from_plain"] < LARGEST_ERROR[wish]
    # Inductor's rounding differs, and what lies between two levels then falls to the other side
    assert seen["from_not_compiled"] < seen["not_compiled"]


@needs_compiler
def test_the_stock_compile_node_in_a_window(offload):
    """A graph for each side of it. What a graph leaves to ComfyUI is not counted: that is compiled away with the hook."""
    seen = offload("stock_compile")["window"]
    assert seen["from_not_compiled"] < INT8 / 2
    assert served(seen["report"]) == served(seen["not_compiled_report"]) > 0
    assert kept_exact(seen["not_compiled_report"]) > 0
    assert fell_back(seen["report"]) == 0


@needs_compiler
def test_the_stock_compile_node_leaves_the_model_alone(offload):
    """Sampled after compiled and patched clones: without the node, compiled or not, bit-identical to before."""
    seen = offload("stock_compile")
    assert seen["plain"]["graphs"] > 0
    assert seen["plain"]["apart"] < 1e-5
    assert (seen["compiled_again"], seen["again"]) == (0, 0)
