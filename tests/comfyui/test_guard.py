"""The guard, and what the hook makes of it: a spoilt kernel is seen at its first call, and only its layer pays."""

import pytest
import standin
import torch
from torch.utils.flop_counter import FlopCounterMode

from comfy_sage3.comfyui import override as override_module
from comfy_sage3.comfyui.call import HookCall
from comfy_sage3.comfyui.guard import Guard, agreement
from comfy_sage3.comfyui.hook import Hook
from comfy_sage3.comfyui.layers import Layer, LayerList
from comfy_sage3.comfyui.override import make_override
from comfy_sage3.errors import KernelError
from comfy_sage3.precision import PrecisionPlan

B, H, LQ, LK, D = 2, 4, 40, 24, 16


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, H, n, D, generator=g) for n in (LQ, LK, LK)]


def attend(hook, layer, mask=None, seed=0):
    """One call as a model makes it -> (B, H, Lq, D)."""
    options = {"optimized_attention_override": make_override(hook)}
    options |= {} if layer is None else {"block_index": layer, "block_type": "double"}
    q, k, v = tensors(seed)
    return standin.attend(q, k, v, H, mask=mask, transformer_options=options, skip_reshape=True, skip_output_reshape=True)


def spoil(monkeypatch, how, kernels=("int8",), layers=None):
    """Let ``attention`` give wrong results for some precisions; ``calls`` counts them by precision."""
    real, calls = override_module.attention, []

    def attention(*args, **kwargs):
        out = real(*args, **kwargs)
        calls.append(str(kwargs["precision"].value))
        return how(out) if calls[-1] in kernels else out

    monkeypatch.setattr(override_module, "attention", attention)
    return calls


def exact(seed=0):
    return torch.nn.functional.scaled_dot_product_attention(*tensors(seed))


def lines(hook):
    return {(x["kernel"], x["fell_back"], x["reason"]): x["calls"] for x in hook.report.lines()}


SPOILT = {
    "nan": lambda out: out.clone().index_fill_(2, torch.tensor([7]), torch.nan),
    "noise": lambda out: torch.randn(out.shape, generator=torch.Generator().manual_seed(1)),
    "heads exchanged": lambda out: out.flip(1),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_wrong_result_is_replaced_and_its_layer_stays_exact(monkeypatch, how):
    calls = spoil(monkeypatch, SPOILT[how])
    hook = Hook(PrecisionPlan("int8"), emulate=True)
    for _ in range(3):
        torch.testing.assert_close(attend(hook, 3), exact())
    assert calls == ["int8"]  # tried once
    ((kernel, fell_back, reason),) = lines(hook)
    assert (kernel, fell_back) == ("exact", True)
    assert reason.startswith("layer double 3: int8-emulated's result ")
    assert reason.endswith("; exact for the rest of the run")


def test_four_bits_give_way_to_eight_and_other_layers_keep_them(monkeypatch):
    calls = spoil(monkeypatch, SPOILT["noise"], kernels=("fp4",))
    hook = Hook(PrecisionPlan("fp4"), emulate=True)
    attend(hook, 0)
    attend(hook, 0)
    assert calls == ["fp4", "int8"]
    attend(hook, 1)
    assert calls == ["fp4", "int8", "fp4"]
    assert [key[0] for key in lines(hook)].count("int8-emulated") == 1


def test_a_good_result_is_looked_at_once_a_layer_and_shape(monkeypatch):
    looked = []
    monkeypatch.setattr("comfy_sage3.comfyui.guard.agreement", lambda call, out: looked.append(1) or (True, 1.0))
    hook = Hook(PrecisionPlan("int8"), emulate=True)
    for layer in (0, 1, 0, 1, 0):
        attend(hook, layer)
    assert len(looked) == 2
    hook.begin("another run")
    attend(hook, 0)
    assert len(looked) == 3


def test_calls_without_a_layer_are_told_apart_by_their_place_in_the_pass(monkeypatch):
    looked = []
    monkeypatch.setattr("comfy_sage3.comfyui.guard.agreement", lambda call, out: looked.append(1) or (True, 1.0))
    hook = Hook(PrecisionPlan("int8"), emulate=True)
    for calls, looks in ((3, 3), (3, 3), (4, 4)):  # three passes
        hook.enter_step(None, torch.ones(1))
        for _ in range(calls):
            attend(hook, None)
        assert len(looked) == looks


def test_a_look_costs_next_to_nothing_of_the_calls_products():
    """Once a layer and shape; a sampling has many steps. The seconds on a GPU are in benchmarks/results/hook-*.json."""
    tokens, heads, head_dim = 3072, 12, 64
    q, k, v = (torch.randn(1, heads, tokens, head_dim) for _ in range(3))
    call = HookCall.read(q, k, v, heads, skip_reshape=True)
    guard, layer, spent = Guard(), Layer("", 0), []
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for _ in range(2):
        with FlopCounterMode(display=False) as looked:
            assert guard.check(layer, "int8-sm90", call, out) is None
        spent.append(looked.get_total_flops() / (4 * heads * tokens * tokens * head_dim))
    assert 0 < spent[0] < 1e-3
    assert spent[1] == 0


def test_stopping_raises_and_says_how_to_go_on(monkeypatch):
    spoil(monkeypatch, SPOILT["nan"])
    hook = Hook(PrecisionPlan("int8"), emulate=True, stop_on_trouble=True)
    with pytest.raises(KernelError, match=r'not finite.*Set the node\'s "on_trouble" to "fall back"'):
        attend(hook, 3)


def test_a_kernel_that_raises_stops_where_that_is_wished(monkeypatch):
    def attention(*args, **kwargs):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(override_module, "attention", attention)
    with pytest.raises(KernelError, match="out of luck"):
        attend(Hook(PrecisionPlan("int8"), emulate=True, stop_on_trouble=True), 0)
    kept = Hook(PrecisionPlan("int8"), emulate=True)
    torch.testing.assert_close(attend(kept, 0), exact())


def test_bad_inputs_are_not_the_kernels_fault():
    q, k, v = tensors()
    k[0, 0, 0, 0] = torch.inf
    call = HookCall.read(q, k, v, H, skip_reshape=True)
    guard = Guard()
    assert guard.check(Layer("", 0), "int8-sm90", call, torch.full_like(q, torch.nan)) is None
    assert guard.limit(Layer("", 0), "int8-sm90", call) is None


@pytest.mark.parametrize("mask", [None, torch.arange(LQ * LK).reshape(LQ, LK) % 3 > 0, torch.linspace(-3, 1, LK)[None]])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_agreement_of_exact_attention_with_itself(mask, layout):
    q, k, v = tensors()
    if layout == "HND":
        call = HookCall.read(q, k, v, H, mask, skip_reshape=True)
    else:
        call = HookCall.read(*(x.transpose(1, 2).flatten(2) for x in (q, k, v)), H, mask)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    finite, cosine = agreement(call, out if layout == "HND" else out.transpose(1, 2))
    assert finite
    assert cosine == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 1), (4, 2), (5, 5)])
@pytest.mark.parametrize(("queries", "keys"), [(1, 5), (16, 64), (33, 200), (40, 211)])
def test_agreement_looks_at_the_keys_and_values_of_its_heads(queries, keys, heads, kv_heads, dtype):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, heads, queries, 64, generator=g).to(dtype)
    k, v = (torch.randn(2, kv_heads, keys, 64, generator=g).to(dtype) for _ in range(2))
    out = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), enable_gqa=True)
    finite, cosine = agreement(HookCall(q, k, v, "HND", None, None, False), out.to(dtype))
    assert finite
    assert cosine == pytest.approx(1, abs=1e-6 if dtype == torch.float32 else 1e-4)
    spoilt = out.clone()
    spoilt[0, -1, -1] = -spoilt[0, -1, -1]  # the last row is one of those looked at
    assert agreement(HookCall(q, k, v, "HND", None, None, False), spoilt.to(dtype))[1] < cosine - 1e-3


@pytest.mark.parametrize(("number", "finite"), [(3e38, True), (torch.inf, False), (-torch.inf, False), (torch.nan, False)])
def test_one_bad_number_is_seen_and_a_sum_that_overflows_is_none(number, finite):
    q, k, v = tensors()
    out = torch.zeros_like(q)
    if finite:
        out.fill_(number)
    else:
        out[-1, -1, 1, 1] = number
    assert agreement(HookCall.read(q, k, v, H, skip_reshape=True), out)[0] == finite


def test_listed_layers_stay_exact_and_unknown_ones_too():
    hook = Hook(PrecisionPlan("int8"), emulate=True, exact_layers=LayerList.parse("0, 2-3"))
    for layer in range(5):
        attend(hook, layer)
    found = lines(hook)
    assert found[("exact", False, "layers that are to stay exact")] == 3
    assert sum(n for (kernel, _, _), n in found.items() if kernel == "int8-emulated") == 2
    attend(hook, None)
    assert lines(hook)[("exact", False, "the model does not say which layer calls, and some are to stay exact")] == 1
