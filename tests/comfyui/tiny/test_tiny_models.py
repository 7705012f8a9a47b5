"""Each kind of model in a real ComfyUI: what it asks of the hook, and what it gets."""

import pytest
from tiny_expect import LARGEST_ERROR, fell_back, follows, kept_exact, reasons, served, total
from tiny_models import MODELS

STEPS = 2
WITHOUT_LAYERS = ("sd3", "ltxv", "cogvideox")  # as of ComfyUI 0.33
every_model = pytest.mark.parametrize("name", sorted(MODELS))


def layer(call):
    return f"{call['block_type'] or ''} {call['block_index']}" if call["block_index"] is not None else ""


@every_model
def test_attention_is_called_as_often_as_the_model_has_layers(models, name):
    """Cond and uncond run as one batch."""
    seen = models(name)
    got = [(layer(c), c["q"], c["k"], c["mask"]) for c in seen["plain"]]
    assert got == STEPS * list(MODELS[name].calls)
    assert (seen["finite"], 0.1 < seen["spread"] < 100) == (True, True)


@every_model
@pytest.mark.parametrize("wish", ["exact", "int8", "fp4"])
def test_the_report_counts_every_call(models, name, wish):
    seen = models(name)[wish]
    assert total(seen["report"]) == len(seen["calls"]) == STEPS * len(MODELS[name].calls)


@every_model
@pytest.mark.parametrize("wish", ["int8", "fp4"])
def test_every_call_is_served_within_the_precisions_error(models, name, wish):
    seen = models(name)[wish]
    assert served(seen["report"], f"{wish}-emulated") == total(seen["report"]), reasons(seen["report"])
    assert all(0 < c["error"] < LARGEST_ERROR[wish] for c in seen["calls"])
    assert all(c["untouched"] and c["shape"] for c in seen["calls"])
    assert 0 < seen["apart"] < LARGEST_ERROR[wish]


@every_model
def test_exact_is_the_model_as_it_was_bit_for_bit(models, name):
    seen = models(name)
    assert seen["exact"]["apart"] == 0
    assert all(c["error"] == 0 for c in seen["exact"]["calls"])
    assert served(seen["exact"]["report"]) == 0


@every_model
def test_the_model_itself_is_left_alone(models, name):
    """Sampled again after three patched clones of it: bit-identical to never patched."""
    seen = models(name)
    assert seen["again"] == 0
    assert "did not go through" in seen["no_node"]


@pytest.mark.parametrize("name", sorted(set(MODELS) - set(WITHOUT_LAYERS)))
def test_a_layer_can_be_kept_exact(models, name):
    seen = models(name)["layer"]
    spared = [c for c in seen["calls"] if c["block_index"] == 0]
    others = [c for c in seen["calls"] if c["block_index"] not in (0, None)]
    assert spared
    assert others
    assert all(c["error"] == 0 for c in spared)
    assert all(c["error"] > 0 for c in others)
    assert served(seen["report"]) == len(others)


@pytest.mark.parametrize("name", WITHOUT_LAYERS)
def test_a_model_that_names_no_layers_is_recognised(models, name):
    """Which layer calls is not known, so all of them stay exact, and the report says why."""
    seen = models(name)["layer"]
    assert seen["apart"] == 0
    assert kept_exact(seen["report"]) == total(seen["report"])
    assert "does not say which layer" in reasons(seen["report"])


def test_hunyuan_video_says_the_layer_except_while_it_refines_the_text(models):
    seen = models("hunyuan_video")["layer"]
    unnamed = [c for c in seen["calls"] if c["block_index"] is None]
    assert len(unnamed) == STEPS * 2
    assert all(c["error"] == 0 for c in unnamed)
    assert "does not say which layer" in reasons(seen["report"])


@pytest.mark.parametrize("name", ["hunyuan_video", "ltxv"])
@pytest.mark.parametrize("wish", ["int8", "fp4"])
def test_masks_are_obeyed(models, name, wish):
    """A padded prompt: its padding would change the result by far more than the precision does."""
    masked = [c for c in models(name)[wish]["calls"] if c["mask"]]
    assert masked
    assert all(c["error"] < LARGEST_ERROR[wish] for c in masked)


def test_a_unet_names_its_layers_by_kind(models):
    seen = models("unet")
    kinds = {tuple(c["block"]) for c in seen["calls"]}
    assert {kind for kind, _ in kinds} == {"input", "middle", "output"}
    assert served(seen["report"]) == total(seen["report"]) == len(seen["calls"])
    assert seen["exact"] == 0
    assert 0 < seen["int8"] < LARGEST_ERROR["int8"]
    of_input_1 = sum(c["block"] == ["input", 1] for c in seen["calls"])
    assert kept_exact(seen["layered"]) == of_input_1 > 0
    assert fell_back(seen["layered"]) == 0


@pytest.mark.parametrize("where", ["before", "after"])
def test_freeu_beside_the_node(models, where):
    seen = models("unet")
    follows(seen["freeu"], seen["freeu"][where]["int8"])
    assert served(seen["freeu"][where]["report"]) == len(seen["calls"])
    assert seen["again"] == 0


@pytest.mark.parametrize(("how", "passes"), [("together", 1), ("apart", 2)])
def test_cond_and_uncond_in_one_batch_or_two(models, how, passes):
    """Prompts of different lengths cannot be a batch: then each step has twice the calls."""
    seen = models("batches")[how]
    assert len(seen["calls"]) == passes * STEPS * len(MODELS["flux"].calls)
    assert served(seen["report"]) == total(seen["report"]) == len(seen["calls"])
    assert 0 < seen["apart"] < LARGEST_ERROR["int8"]
