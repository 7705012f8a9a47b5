"""The node on Wan in a real ComfyUI: among other nodes, and when things go wrong."""

import pytest
from given import SEES_LATE_OVERRIDES, SETS_OVERRIDES, WAN_NAMES_LAYERS, version
from tiny_expect import LARGEST_ERROR, fell_back, follows, kept_exact, reasons, served, total

CALLS = 12  # 3 layers, self- and cross-attention, 2 steps
INT8 = LARGEST_ERROR["int8"]


def test_cancelled_midway_nothing_is_left_behind(together):
    seen = together("interrupted")
    assert seen["cut"]["event"] == "execution_interrupted"
    assert CALLS < seen["cut_calls"] < seen["whole_calls"] == 2 * CALLS  # ComfyUI looks once a step at least
    assert seen["left"] is False
    assert seen["plain"] == 0
    assert seen["after"] == 0
    assert seen["report"]["lines"] == seen["first_report"]["lines"]  # the cancelled run's calls are not among them


def test_a_kernel_that_always_fails_costs_the_speed_not_the_video(together):
    seen = together("kernel_fails")
    assert seen["ok"]
    assert seen["apart_from_exact"] == 0
    assert fell_back(seen["report"]) == total(seen["report"]) == CALLS
    assert "illegal memory access" in reasons(seen["report"])
    assert seen["after"] == 0
    assert served(seen["after_report"]) == total(seen["after_report"]) == CALLS


def test_a_kernel_that_fails_once_is_counted_and_said(together):
    seen = together("kernel_fails_once")
    assert seen["ok"]
    assert 0 < seen["apart_from_exact"] < INT8
    assert (total(seen["report"]), fell_back(seen["report"]), served(seen["report"])) == (CALLS, 1, CALLS - 1)
    assert "illegal memory access" in reasons(seen["report"])
    assert seen["after"] == 0
    assert fell_back(seen["after_report"]) == 0


def test_a_kernel_that_fails_stops_the_run_where_that_is_wished(together):
    seen = together("kernel_fails_stop")
    assert not seen["ok"]
    assert seen["error"]["node_type"] == "KSampler"
    assert "illegal memory access" in seen["error"]["exception_message"]
    assert "fall back" in seen["error"]["exception_message"]
    assert seen["after"] == 0


def test_out_of_memory_in_the_kernel(together):
    """It comes in the first cross-attention: that shape is not tried again in this run, every other one is served."""
    seen = together("out_of_memory")
    assert seen["ok"]
    assert seen["raised"] == CALLS // 2 + 1  # calls of the kernel
    assert (total(seen["report"]), fell_back(seen["report"]), served(seen["report"])) == (CALLS, CALLS // 2, CALLS // 2)
    assert "memory did not suffice for int8-emulated" in reasons(seen["report"])
    assert 0 < seen["apart_from_exact"] < INT8
    assert seen["after"] == 0
    assert fell_back(seen["after_report"]) == 0


@pytest.mark.parametrize("how", ["nan", "noise"])
def test_a_wrong_result_is_replaced_and_its_layer_has_8_bits_from_then_on(together, how):
    """Every other layer keeps its 4 bits; the report names the layer."""
    seen = together(how)
    if version() < WAN_NAMES_LAYERS:
        pytest.skip("this ComfyUI's Wan does not say which layer calls: that is the next test's")
    assert seen["ok"]
    assert (served(seen["report"], "fp4-emulated"), served(seen["report"], "int8-emulated")) == (8, 3)
    assert fell_back(seen["report"]) == total(seen["report"]) - 8 == 4
    assert "layer double 1: fp4-emulated's result" in reasons(seen["report"])
    assert "layer double 1" in seen["report"]["text"]
    rows = {row["layer"]: row["fell_back"] for row in seen["report"]["runs"][0]["layers"]}
    assert rows == {"double 0": 0, "double 1": 4, "double 2": 0}
    errors = [c["error"] for c in seen["calls"]]
    assert errors[2] == 0
    of_layer_1 = [errors[i] for i in (3, 8, 9)]
    assert all(0 < error < INT8 for error in of_layer_1)
    assert 0 < seen["apart_from_exact"] < LARGEST_ERROR["fp4"]
    assert (seen["after"], fell_back(seen["after_report"])) == (0, 0)


@pytest.mark.parametrize("how", ["nan_unnamed", "noise_unnamed"])
def test_a_wrong_result_of_a_model_that_names_no_layers_is_found_in_every_layer(together, how):
    """The third of SD3's four: it is replaced, and as nobody knows which layer that was, all have 8 bits from then on."""
    seen = together(how)
    assert seen["ok"], seen["error"]
    assert (served(seen["report"], "fp4-emulated"), served(seen["report"], "int8-emulated")) == (2, 5)
    assert fell_back(seen["report"]) == total(seen["report"]) - 2 == 6
    assert "a layer without a number: fp4-emulated's result" in reasons(seen["report"])
    errors = [c["error"] for c in seen["calls"]]
    assert errors[2] == 0
    assert all(0 < error < INT8 for error in errors[3:])
    assert (seen["after"], fell_back(seen["after_report"])) == (0, 0)


def skip_if_too_late(how, seen):
    if how.startswith("late") and not seen["late_alone"] and version() < SEES_LATE_OVERRIDES:
        pytest.skip("in this ComfyUI what is put into the slot at a step is not seen in it, with or without our node")


@pytest.mark.parametrize("where", ["before", "after", "both", "late"])
def test_a_polite_override_beside_ours(together, where):
    """Ours serves what it would serve alone; what it does not (cross-attention, which is short) reaches the other."""
    seen = together("other_overrides")
    skip_if_too_late(where, seen)
    assert seen[where]["apart"] == seen["want"] > 0
    assert (served(seen[where]["report"]), kept_exact(seen[where]["report"])) == (6, 6)
    expected = {"before": 6} if where in ("before", "both") else {}
    assert seen[where]["counts"] == expected | ({} if where == "before" else {"after": CALLS})


@pytest.mark.parametrize("how", ["rude", "official", "late rude"])
def test_an_override_after_ours_that_takes_over_gets_what_ours_leaves(together, how):
    skip_if_too_late(how, together("other_overrides"))
    if how == "official" and version() < SETS_OVERRIDES:
        pytest.skip("this ComfyUI's models have no set_model_optimized_attention")
    seen = together("replaced")[how]
    assert seen["apart"] == 0
    assert (served(seen["report"]), kept_exact(seen["report"]), seen["rude"]) == (6, 6, 6)
    assert "was put back" in seen["report"]["text"]


@pytest.mark.parametrize("order", ["ls", "sl"], ids=["before the node", "after the node"])
def test_a_lora(together, order):
    seen = together("lora")
    assert seen["matters"] > 0.1
    assert seen[order]["exact"] == 0
    assert 0 < seen[order]["int8"] < INT8
    assert served(seen[order]["report"]) == CALLS
    assert seen["without_again"] == 0


def test_two_clones_and_the_model_itself_in_one_graph(together):
    seen = together("clones")
    assert (seen["int8"], seen["fp4"], seen["plain"]) == (0, 0, 0)
    int8, fp4, plain = (seen["reports"][key] for key in ("5", "5b", "5c"))
    assert (served(int8, "int8-emulated"), total(int8)) == (CALLS, CALLS)
    assert (served(fp4, "fp4-emulated"), total(fp4)) == (6, CALLS)
    assert "did not go through" in plain["text"]


@pytest.mark.parametrize("where", ["first", "after"])
def test_a_merge_of_two_models(together, where):
    """They differ in attention's own weights alone: one that used the first model's would give the first's result."""
    seen = together("merged")
    assert seen["deaf"] == pytest.approx(seen["matters"], rel=1e-3)
    follows(seen, seen[where]["int8"])
    assert seen[where]["exact"] == 0
    assert served(seen[where]["report"]) == total(seen[where]["report"]) == CALLS
    assert seen["without_again"] == 0


def test_a_merge_takes_the_first_models_patches_and_the_report_says_so(together):
    seen = together("merged")["second"]
    assert (seen["exact"], seen["int8"]) == (0, 0)
    assert "did not go through" in seen["report"]["text"]


@pytest.mark.parametrize("which", ["controlled_sd3", "controlled_unet"])
def test_a_control_net(together, which):
    seen = together(which)
    follows(seen, seen["int8"])
    assert (seen["exact"], seen["without_again"]) == (0, 0)
    of_model = [c for c in seen["calls"] if c["step"] is not None]
    assert served(seen["report"]) == total(seen["report"]) == len(of_model) > 0
    assert all(0 < c["error"] < INT8 for c in of_model)


def test_a_control_nets_own_network_stays_exact(together):
    """ComfyUI tells it nothing of the model's patches."""
    own = [c for c in together("controlled_unet")["calls"] if c["step"] is None]
    assert own
    assert all(c["error"] == 0 for c in own)


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_cache_that_leaves_out_passes(together, where):
    """Calls that were not made are not counted."""
    seen, ours = together("cached_steps"), together("cached_steps")[where]
    assert 0 < seen["plain_calls"] == ours["calls"] < 8 * CALLS // 2  # of eight steps
    assert total(ours["report"]) == served(ours["report"]) == ours["calls"]
    assert 0 < ours["int8"] < min(INT8, seen["matters"] / 5)


def test_torch_compile_of_the_whole_model(together):
    seen = together("compiled")
    assert 0 < seen["apart_from_plain"] < INT8
    assert seen["apart_from_int8"] < 1e-5
    assert seen["apart_in_window"] < 1e-5
    for report in (seen["report"], seen["second_report"]):
        assert served(report) == total(report) == CALLS


def test_the_window_follows_the_samplers_sigmas(together):
    seen = together("window")
    exact = [c["error"] == 0 for c in seen["calls"]]
    steps = [exact[i : i + 6] for i in range(0, len(exact), 6)]
    assert all(len(set(step)) == 1 for step in steps)
    assert [step[0] for step in steps] == sorted(step[0] for step in steps)  # low bits first, then exact
    assert 0 < kept_exact(seen["report"]) == sum(exact) < len(exact)
    assert "outside the window" in reasons(seen["report"])


def test_a_model_that_never_asks_is_recognised(together):
    report = together("no_hook")["report"]
    assert total(report) == 0
    assert "never called" in report["text"]
