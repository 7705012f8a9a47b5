"""The decision for every GPU generation, on a machine that has none of them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_sage3.dispatch import Call, decide, obstacle
from comfy_sage3.errors import InputError
from comfy_sage3.kernels import devices
from comfy_sage3.kernels.devices import EXACT, HARDWARE, KERNELS, Kernel, capability_of
from comfy_sage3.precision import Precision

SHAPE = (1, 24, 8192, 128)
CPU = Call(SHAPE, SHAPE, torch.bfloat16, "cpu")
CAPABILITIES = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)]

# The table as it will look with compiled kernels: rows join, nothing else changes.
FUTURE = (
    Kernel("fp4-sm120", "fp4", capabilities=((12, 0), (12, 1)), dtypes=(torch.float16, torch.bfloat16)),
    Kernel("int8-sm80", "int8", capabilities=((8, 0), (8, 6), (8, 9)), trainable=False, max_head_dim=128),
    Kernel("int8-sm90", "int8", capabilities=((9, 0),), trainable=True, max_head_dim=128),
    Kernel("int8-sm120", "int8", capabilities=((12, 0), (12, 1)), trainable=True),
    *KERNELS,
)


def gpu(capability, **changes):
    return replace(CPU, device_type="cuda", capability=capability, **changes)


@pytest.mark.parametrize(
    ("capability", "auto", "fp4", "int8"),
    [
        ((7, 5), "exact", "exact", "exact"),
        ((8, 0), "int8-sm80", "int8-sm80", "int8-sm80"),
        ((8, 6), "int8-sm80", "int8-sm80", "int8-sm80"),
        ((8, 9), "int8-sm80", "int8-sm80", "int8-sm80"),
        ((9, 0), "int8-sm90", "int8-sm90", "int8-sm90"),
        ((10, 0), "exact", "exact", "exact"),
        ((12, 0), "fp4-sm120", "fp4-sm120", "int8-sm120"),
        ((12, 1), "fp4-sm120", "fp4-sm120", "int8-sm120"),
    ],
)
def test_each_generation_gets_its_kernel(capability, auto, fp4, int8):
    call = gpu(capability)
    chosen = {p: decide(call, p, kernels=FUTURE).kernel for p in ("auto", "fp4", "int8", "exact")}
    assert chosen == {"auto": auto, "fp4": fp4, "int8": int8, "exact": "exact"}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("precision", ["auto", "fp4", "int8", "exact"])
def test_this_version_has_no_gpu_kernel_and_says_so(capability, precision):
    decision = decide(gpu(capability), precision)
    assert decision.kernel == "exact"
    assert decision.fell_back == (precision in ("fp4", "int8"))
    name = f"sm_{capability[0]}{capability[1]}"
    if precision != "exact":
        assert name in decision.reason
    if precision == "int8":
        has = HARDWARE["int8"].has(capability)
        assert has == (capability >= (8, 0))
        assert ("this version has none" in decision.reason) == has


@pytest.mark.parametrize(
    ("call", "precision", "emulate", "kernel", "reason"),
    [
        (
            CPU,
            "fp4",
            False,
            "exact",
            "fp4 needs a Blackwell GPU (sm_120 or sm_121); this is a CPU; "
            "int8 needs an NVIDIA GPU from Ampere on (sm_80 or newer)",
        ),
        (gpu((8, 9)), "fp4", False, "exact",
         "fp4 needs a Blackwell GPU (sm_120 or sm_121); this GPU is sm_89; "
         "int8 needs a kernel for sm_89; this version has none"),
        (gpu((12, 0)), "fp4", False, "exact", "fp4 and int8 need a kernel for sm_120; this version has none"),
        (gpu(None), "int8", False, "exact",
         "int8 needs an NVIDIA GPU from Ampere on (sm_80 or newer); this GPU is not an NVIDIA one"),
        (replace(CPU, device_type="mps"), "int8", False, "exact",
         "int8 needs an NVIDIA GPU from Ampere on (sm_80 or newer); this is a device of type 'mps'"),
        (CPU, "fp4", True, "fp4-emulated",
         "asked for, emulated in plain PyTorch: the quality is real, the speed is not"),
        (replace(CPU, needs_grad=True), "fp4", True, "int8-emulated",
         "fp4 needs inputs that do not require grad (inference only); these do; int8 instead, "
         "emulated in plain PyTorch: the quality is real, the speed is not"),
        (replace(CPU, q_shape=(1, 1, 9, 320), k_shape=(1, 1, 9, 320)), "fp4", True, "exact",
         "fp4 and int8 need a head_dim of at most 256; this call has 320"),
        (replace(CPU, dtype=torch.float64), "int8", True, "exact",
         "int8 needs one of fp16, bf16, fp32; the inputs are fp64"),
        (replace(CPU, v_head_dim=64), "int8", True, "exact",
         "int8 needs v of the same head_dim as q and k; they are 64 and 128"),
        (replace(CPU, k_shape=(1, 24, 0, 128)), "int8", True, "exact",
         "int8 needs at least one query and one key; this call is empty"),
        (CPU, "exact", True, "exact", "asked for"),
    ],
)  # fmt: skip
def test_the_reason_says_what_was_needed_and_what_there_was(call, precision, emulate, kernel, reason):
    decision = decide(call, precision, emulate=emulate)
    assert (decision.kernel, decision.reason) == (kernel, reason)


def test_auto_choosing_exact_is_no_fallback_but_has_a_reason():
    decision = decide(CPU, "auto")
    assert not decision.fell_back
    assert decision.reason.startswith("auto found no low-bit kernel: fp4 needs a Blackwell GPU")


def test_auto_on_a_gpu_with_a_kernel_says_where_it_runs():
    decision = decide(gpu((9, 0)), "auto", kernels=FUTURE)
    assert decision.reason == "the fastest here, runs on sm_90"
    assert not decision.fell_back


def test_training_on_blackwell_falls_from_fp4_to_int8():
    decision = decide(gpu((12, 0), needs_grad=True), "fp4", kernels=FUTURE)
    assert (decision.kernel, decision.fell_back) == ("int8-sm120", True)
    assert "inference only" in decision.reason


def test_the_obstacle_names_the_gpus_a_kernel_was_built_for():
    why = obstacle(FUTURE[0], gpu((9, 0)))
    assert why is not None
    assert (why.needs, why.have) == ("a GPU of sm_120 or sm_121", "this GPU is sm_90")


def test_unknown_precision_is_refused_with_the_choices():
    with pytest.raises(InputError, match=r"Unknown precision 'fp8'.*auto, fp4, int8, exact"):
        decide(CPU, "fp8")


dims = st.sampled_from([0, 1, 16, 128])
calls = st.builds(
    lambda b, h, lq, lk, d, **rest: Call((b, h, lq, d), (b, h, lk, d), **rest),
    dims,
    dims,
    dims,
    dims,
    st.sampled_from([1, 64, 128, 129, 256, 257, 512]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    device_type=st.sampled_from(["cpu", "cuda", "mps", "xpu", "meta"]),
    capability=st.sampled_from([None, *CAPABILITIES]),
    has_mask=st.booleans(),
    is_causal=st.booleans(),
    needs_grad=st.booleans(),
    v_head_dim=st.sampled_from([None, 64, 128]),
)


@settings(max_examples=300, deadline=None)
@given(calls, st.sampled_from(list(Precision)), st.booleans(), st.sampled_from([KERNELS, FUTURE]))
def test_no_decision_breaks_a_constraint_or_keeps_silent(call, precision, emulate, kernels):
    decision = decide(call, precision, emulate=emulate, kernels=kernels)
    chosen = next(k for k in kernels if k.name == decision.kernel)
    assert obstacle(chosen, call) is None
    assert decision.reason
    assert "\n" not in decision.reason
    assert not (chosen.emulated and (not emulate or precision is Precision.AUTO))
    assert decision.fell_back == (precision is not Precision.AUTO and chosen.precision != precision.value)
    if chosen.precision == "fp4":
        assert not call.needs_grad
    if precision is Precision.EXACT:
        assert chosen == EXACT


def test_deciding_asks_no_device(monkeypatch):
    def forbidden(*_args):
        raise AssertionError("decide must not ask the machine")

    for name in ("is_available", "get_device_capability", "current_device", "device_count"):
        monkeypatch.setattr(torch.cuda, name, forbidden)
    assert decide(gpu((12, 0)), "fp4", kernels=FUTURE).kernel == "fp4-sm120"


def test_capability_is_none_off_nvidia(monkeypatch):
    assert capability_of(torch.device("cpu")) is None
    monkeypatch.setattr(torch.version, "cuda", None)
    assert capability_of(torch.device("cuda", 0)) is None  # a ROCm build calls its device cuda too


def test_capability_is_asked_of_the_right_gpu_and_constant_in_a_compiled_graph(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (12, index))
    assert capability_of(torch.device("cuda", 1)) == (12, 1)

    def scaled(x):
        return x * devices._capability(1)[1] + devices._capability(0)[0]

    compiled = torch.compile(scaled, backend="eager", fullgraph=True)
    assert compiled(torch.ones(1)).item() == 13
