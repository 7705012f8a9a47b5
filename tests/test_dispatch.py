"""The decision for every GPU generation, on a machine that has none of them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_sage3.attention import TRAINED
from comfy_sage3.dispatch import Call, choose, decide, obstacle
from comfy_sage3.errors import InputError
from comfy_sage3.kernels import build, compiled, devices, triton_training
from comfy_sage3.kernels.devices import EXACT, FP4_BUILT_FOR_HOPPER, KERNELS, Kernel, capability_of
from comfy_sage3.kernels.sources import EMULATED, SOURCES, TARGETS
from comfy_sage3.precision import Precision

SHAPE = (1, 24, 8192, 128)
CPU = Call(SHAPE, SHAPE, torch.bfloat16, "cpu")
CAPABILITIES = [(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]
COMPILED = {k.name: k for k in KERNELS if k.compiled}
NO_NVCC = "nvcc 13 is not installed"

# The table as it will look with more compiled kernels: rows join, nothing else changes.
FUTURE = (
    Kernel("fp4-sm120", "fp4", capabilities=((12, 0), (12, 1)), dtypes=(torch.float16, torch.bfloat16)),
    Kernel("int8-sm80", "int8", capabilities=((8, 0), (8, 6), (8, 9)), trainable=False, max_head_dim=128),
    Kernel("int8-sm90", "int8", capabilities=((9, 0),), trainable=True, max_head_dim=128),
    Kernel("int8-sm120", "int8", capabilities=((12, 0), (12, 1)), trainable=True),
    *(k for k in KERNELS if k.compiled is None),
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
def test_every_gpu_from_turing_on_has_an_int8_kernel(capability):
    name = f"sm_{capability[0]}{capability[1]}"
    kernel = "int8-sm90" if capability == (9, 0) else "int8-mma"
    decision = decide(gpu(capability), "int8")
    assert (decision.kernel, decision.reason, decision.fell_back) == (kernel, f"asked for, runs on {name}", False)
    decision = decide(gpu(capability), "fp4")
    if capability[0] == 12:
        kernel = "fp4-sm120"
        assert (decision.kernel, decision.reason, decision.fell_back) == (kernel, f"asked for, runs on {name}", False)
    else:
        assert (decision.kernel, decision.fell_back) == (kernel, True)
        assert decision.reason.startswith("fp4 needs a Blackwell GPU ")
        assert decision.reason.endswith(f"; int8 instead, runs on {name}")
    decision = decide(gpu(capability), "auto")
    if capability == (10, 3):
        assert (decision.kernel, decision.reason) == ("exact", "auto: exact is faster on sm_103")
    else:
        assert (decision.kernel, decision.reason) == (kernel, f"the fastest here, runs on {name}")
    assert not decision.fell_back


def test_the_compiled_kernels_are_those_that_a_build_makes():
    assert set(COMPILED["int8-mma"].capabilities) == set(TARGETS)
    (only,) = (row.archs for row in SOURCES if row.path == "attention/*_sm90.cu")
    assert {TARGETS[c] for c in COMPILED["int8-sm90"].capabilities} == set(only)
    assert all(k.capabilities and not k.emulated for k in COMPILED.values())
    assert KERNELS.index(COMPILED["int8-sm90"]) < KERNELS.index(COMPILED["int8-mma"])


@pytest.mark.parametrize("capability", [(7, 0), (7, 2), (6, 1)])
def test_older_gpus_lack_the_instructions(capability):
    decision = decide(gpu(capability), "int8")
    assert decision.kernel == "exact"
    assert decision.reason == (
        f"int8 needs an NVIDIA GPU from Turing on (sm_75 or newer); this GPU is sm_{capability[0]}{capability[1]}"
    )


@pytest.mark.parametrize("capability", [(11, 0), (13, 0)])
@pytest.mark.parametrize("precision", ["auto", "int8"])
def test_a_gpu_this_version_does_not_know_is_named(capability, precision):
    decision = decide(gpu(capability), precision)
    assert decision.kernel == "exact"
    assert f"a kernel for sm_{capability[0]}{capability[1]}; this version has none" in decision.reason


@pytest.mark.parametrize(
    ("changes", "kernel", "reason"),
    [
        ({}, "int8-sm90", "the fastest here, runs on sm_90"),
        ({"k_shape": (1, 24, 4096, 128)}, "int8-sm90", "the fastest here, runs on sm_90"),
        ({"q_shape": (1, 24, 1, 128)}, "int8-sm90", "the fastest here, runs on sm_90"),
        ({"k_shape": (1, 24, 4095, 128)}, "exact", "auto: exact is faster below 4096 keys"),
        ({"k_shape": (1, 24, 77, 128)}, "exact", "auto: exact is faster below 4096 keys"),
        ({"k_shape": (1, 24, 77, 128), "build_failure": NO_NVCC}, "exact",
         "auto found no low-bit kernel: fp4 needs a Blackwell GPU (sm_120 or sm_121); this GPU is sm_90; "
         f"int8 needs compiled kernels; {NO_NVCC}"),
    ],
)  # fmt: skip
def test_auto_leaves_short_calls_exact_and_a_wish_is_a_wish(changes, kernel, reason):
    call = gpu((9, 0), **changes)
    decision = decide(call, "auto")
    assert (decision.kernel, decision.reason, decision.fell_back) == (kernel, reason, False)
    if call.build_failure is None:
        assert decide(call, "int8").kernel == "int8-sm90"


@pytest.mark.parametrize(("keys", "kernel"), [(2048, "fp4-sm120"), (2047, "int8-mma"), (1024, "int8-mma"), (1023, "exact")])
def test_auto_takes_four_bits_where_they_pay_and_eight_before(keys, kernel):
    decision = decide(gpu((12, 0), k_shape=(1, 24, keys, 128)), "auto")
    assert (decision.kernel, decision.fell_back) == (kernel, False)
    assert decision.reason == (
        "auto: exact is faster below 1024 keys" if kernel == "exact" else "the fastest here, runs on sm_120"
    )


def test_auto_wants_fewer_keys_where_exact_attention_is_slower():
    call = gpu((8, 9), k_shape=(1, 24, 1024, 128))
    assert decide(call, "auto").kernel == "int8-mma"
    assert decide(replace(call, k_shape=(1, 24, 1023, 128)), "auto").reason == "auto: exact is faster below 1024 keys"


@pytest.mark.parametrize(
    ("capability", "kernel", "reason", "fell_back"),
    [
        ((9, 0), "int8-fast-sm90", "asked for, runs on sm_90", False),
        ((8, 9), "int8-mma",
         "int8-fast needs a Hopper GPU (sm_90; no other is held up by exponentials); this GPU is sm_89; "
         "int8 instead, runs on sm_89", True),
        (None, "exact", "int8-fast needs a Hopper GPU (sm_90; no other is held up by exponentials); this is a CPU; "
         "int8 needs an NVIDIA GPU from Turing on (sm_75 or newer)", True),
    ],
)  # fmt: skip
def test_int8_fast_is_for_hopper_and_int8_elsewhere(capability, kernel, reason, fell_back):
    decision = decide(gpu(capability) if capability else CPU, "int8-fast")
    assert (decision.kernel, decision.reason, decision.fell_back) == (kernel, reason, fell_back)
    assert decide(CPU, "int8-fast", emulate=True).kernel == "int8-fast-emulated"


def test_auto_never_emulates_what_is_not_built():
    assert decide(gpu((8, 9), build_failure=NO_NVCC), "auto", emulate=True).kernel == "exact"


@pytest.mark.parametrize(
    ("capability", "precision", "emulate", "kernel", "reason"),
    [
        ((9, 0), "int8", False, "exact", f"int8 needs compiled kernels; {NO_NVCC}"),
        ((9, 0), "fp4", False, "exact",
         "fp4 needs a Blackwell GPU (sm_120 or sm_121); this GPU is sm_90; "
         f"int8 needs compiled kernels; {NO_NVCC}"),
        ((12, 0), "fp4", False, "exact",
         f"fp4 and int8 need compiled kernels; {NO_NVCC}"),
        ((9, 0), "int8", True, "int8-emulated",
         "asked for, emulated in plain PyTorch: the quality is real, the speed is not; "
         f"there are no compiled kernels: {NO_NVCC}"),
        ((9, 0), "exact", True, "exact", "asked for"),
    ],
)  # fmt: skip
def test_a_library_that_could_not_be_built_is_said_in_the_reason(capability, precision, emulate, kernel, reason):
    decision = decide(gpu(capability, build_failure=NO_NVCC), precision, emulate=emulate)
    assert (decision.kernel, decision.reason) == (kernel, reason)


WITH_TRITON = [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (12, 0), (12, 1)]
NO_TRITON = "Triton is not installed"


@pytest.mark.parametrize("capability", [c for c in CAPABILITIES if c not in WITH_TRITON])
@pytest.mark.parametrize("precision", ["fp4", "int8", "int8-fast"])
def test_where_no_kernel_gives_gradients_training_is_exact_or_emulated(capability, precision):
    call = gpu(capability, needs_grad=True)
    decision = decide(call, precision)
    assert (decision.kernel, decision.fell_back) == ("exact", True)
    assert "int8 need" in decision.reason
    assert "inputs that do not require grad (inference only); these do" in decision.reason
    assert decide(call, precision, emulate=True).kernel == "int8-emulated"


@pytest.mark.parametrize(
    ("precision", "changes", "kernel", "reason"),
    [
        ("int8", {}, "int8-sm90", "asked for, runs on sm_90"),
        ("int8", {"has_mask": True, "is_causal": True}, "int8-sm90", "asked for, runs on sm_90"),
        ("int8-fast", {}, "int8-sm90",
         "int8-fast needs inputs that do not require grad (inference only); these do; int8 instead, runs on sm_90"),
        ("fp4", {}, "int8-sm90",
         "fp4 needs a Blackwell GPU (sm_120 or sm_121); this GPU is sm_90; int8 instead, runs on sm_90"),
        ("auto", {}, "exact", "auto: gradients are exact, 8-bit ones are for who asks for int8"),
        ("int8", {"q_shape": (1, 2, 9, 160), "k_shape": (1, 2, 9, 160)}, "int8-triton",
         "asked for, runs on sm_90 in Triton"),
        ("int8", {"q_shape": (1, 2, 9, 160), "k_shape": (1, 2, 9, 160), "triton_failure": NO_TRITON}, "exact",
         f"int8 needs Triton for its gradient; {NO_TRITON}"),
        ("int8", {"triton_failure": NO_TRITON}, "int8-sm90", "asked for, runs on sm_90"),
        ("int8", {"q_shape": (1, 2, 9, 300), "k_shape": (1, 2, 9, 300)}, "exact",
         "int8 needs a head_dim of at most 256; this call has 300"),
        ("int8", {"mask_needs_grad": True, "has_mask": True}, "exact",
         "int8 needs a mask that does not require grad; this one does"),
        ("int8", {"mask_needs_grad": True, "has_mask": True, "needs_grad": False}, "exact",
         "int8 needs a mask that does not require grad; this one does"),
        ("int8", {"build_failure": NO_NVCC}, "int8-triton",
         f"asked for, runs on sm_90 in Triton; there are no compiled kernels: {NO_NVCC}"),
        ("int8", {"build_failure": NO_NVCC, "triton_failure": NO_TRITON}, "exact",
         f"int8 needs compiled kernels; {NO_NVCC}"),
    ],
)  # fmt: skip
def test_hopper_trains_in_8_bits_where_it_can_and_says_why_not(precision, changes, kernel, reason):
    decision = decide(gpu((9, 0), **{"needs_grad": True, **changes}), precision)
    assert (decision.kernel, decision.reason) == (kernel, reason)


@pytest.mark.parametrize("capability", WITH_TRITON)
@pytest.mark.parametrize("d", [64, 128, 160, 256])
def test_triton_trains_what_the_hopper_kernel_does_not_and_infers_nothing(capability, d):
    shape = (1, 2, 2048, d)
    training = gpu(capability, needs_grad=True, q_shape=shape, k_shape=shape)
    first = "int8-sm90" if capability == (9, 0) and d <= 128 else None
    assert decide(training, "int8").kernel == (first or "int8-triton")
    without = decide(replace(training, triton_failure=NO_TRITON), "int8")
    assert without.kernel == (first or "exact")
    assert first or (without.fell_back and without.reason == f"int8 needs Triton for its gradient; {NO_TRITON}")
    emulated = decide(replace(training, triton_failure=NO_TRITON), "int8", emulate=True)
    assert emulated.kernel == (first or "int8-emulated")
    assert decide(training, "auto").kernel == "exact"
    inference = replace(training, needs_grad=False)
    assert decide(inference, "int8").kernel == ("int8-sm90" if capability == (9, 0) else "int8-mma")
    assert decide(replace(inference, build_failure=NO_NVCC), "int8").kernel == "exact"


@pytest.mark.parametrize("precision", ["fp4", "int8-fast"])
def test_other_low_precisions_train_in_triton_as_int8(precision):
    decision = decide(gpu((8, 9), needs_grad=True), precision)
    assert (decision.kernel, decision.fell_back) == ("int8-triton", True)
    assert decision.reason.endswith("int8 instead, runs on sm_89 in Triton")


def test_a_head_dim_above_256_trains_exactly_on_every_gpu():
    shape = (1, 2, 9, 257)
    for capability in WITH_TRITON:
        decision = decide(gpu(capability, needs_grad=True, q_shape=shape, k_shape=shape), "int8")
        assert (decision.kernel, decision.reason) == ("exact", "int8 needs a head_dim of at most 256; this call has 257")


def test_every_kernel_that_trains_has_its_op():
    trained = {k.name for k in KERNELS if k.trainable and k.capabilities}
    assert trained == set(TRAINED)


# ---- SAGE3_EMULATE_FP4: the Blackwell kernel on Hopper

EMULATING = (FP4_BUILT_FOR_HOPPER, *KERNELS)
BUILT = "the Blackwell kernel with its two instructions emulated: the quality is real, the speed is not"
NO_BLACKWELL = "fp4 needs a Blackwell GPU (sm_120 or sm_121)"


@pytest.mark.parametrize(
    ("call", "precision", "emulate", "kernel", "reason"),
    [
        (gpu((9, 0)), "fp4", True, "fp4-sm120-emulated", f"asked for, {BUILT}"),
        (gpu((9, 0)), "fp4", False, "int8-sm90", f"{NO_BLACKWELL}; this GPU is sm_90; int8 instead, runs on sm_90"),
        (gpu((9, 0)), "auto", True, "int8-sm90", "the fastest here, runs on sm_90"),
        (gpu((9, 0)), "int8", True, "int8-sm90", "asked for, runs on sm_90"),
        (gpu((9, 0), build_failure=NO_NVCC), "fp4", True, "fp4-emulated",
         "asked for, emulated in plain PyTorch: the quality is real, the speed is not; "
         f"there are no compiled kernels: {NO_NVCC}"),
        (gpu((9, 0), needs_grad=True), "fp4", True, "int8-sm90",
         "fp4 needs inputs that do not require grad (inference only); these do; int8 instead, runs on sm_90"),
        (gpu((8, 9)), "fp4", True, "fp4-emulated",
         "asked for, emulated in plain PyTorch: the quality is real, the speed is not"),
        (CPU, "fp4", True, "fp4-emulated", "asked for, emulated in plain PyTorch: the quality is real, the speed is not"),
        (gpu((12, 0)), "fp4", True, "fp4-sm120", "asked for, runs on sm_120"),
    ],
)  # fmt: skip
def test_the_kernel_built_with_emulated_instructions_runs_where_emulation_is_wished(
    call, precision, emulate, kernel, reason
):
    decision = decide(call, precision, emulate=emulate, kernels=EMULATING)
    assert (decision.kernel, decision.reason) == (kernel, reason)


def test_the_emulated_kernel_is_for_the_gpus_it_is_built_for():
    archs = {arch for row in EMULATED if row.path == "attention/*_sm120.cu" for arch in row.archs}
    assert {TARGETS[c] for c in FP4_BUILT_FOR_HOPPER.capabilities} == archs - {"120a", "121a"}


@pytest.mark.parametrize(("value", "kernel"), [("1", "fp4-sm120-emulated"), ("0", "fp4-emulated"), (None, "fp4-emulated")])
def test_choosing_knows_the_emulated_kernel_where_the_switch_is_set(machine, monkeypatch, value, kernel):
    machine.outcome = library("90a")
    if value is None:
        monkeypatch.delenv("SAGE3_EMULATE_FP4", raising=False)
    else:
        monkeypatch.setenv("SAGE3_EMULATE_FP4", value)
    assert choose(gpu((9, 0)), "fp4", emulate=True).kernel == kernel
    machine.outcome = build.Failure(NO_NVCC)
    assert choose(gpu((9, 0)), "fp4", emulate=True).kernel == "fp4-emulated"


# ---- the machine is asked late, and once


@pytest.fixture
def machine(monkeypatch):
    """What build.load gives: set ``machine.outcome``; ``machine.asked`` counts. ``machine.triton``: why there is none."""

    class Machine:
        outcome = build.Failure(NO_NVCC)
        triton: str | None = None
        asked = 0

        def load(self):
            self.asked += 1
            return self.outcome

    made = Machine()
    monkeypatch.setattr(build, "load", made.load)
    monkeypatch.setattr(triton_training, "absent", lambda: made.triton)
    return made


def library(*archs):
    return build.Loaded(library=None, namespace="", archs=archs, origin="cache", seconds=0.0)


@pytest.mark.parametrize(
    ("call", "precision", "emulate"),
    [
        (CPU, "auto", False),
        (CPU, "int8", False),
        (CPU, "fp4", True),
        (replace(CPU, device_type="mps"), "int8", False),
        (gpu(None), "int8", False),
        (gpu((7, 0)), "int8", False),
        (gpu((11, 0)), "int8", False),
        (gpu((9, 0)), "exact", False),
        (gpu((8, 9), needs_grad=True), "int8", True),
        (gpu((9, 0), needs_grad=True), "auto", False),
        (gpu((9, 0), needs_grad=True, mask_needs_grad=True), "int8", True),
        (gpu((9, 0), dtype=torch.float64), "int8", False),
        (gpu((9, 0), v_head_dim=64), "int8", False),
        (gpu((9, 0), k_shape=(1, 24, 77, 128)), "auto", False),
        (gpu((10, 3)), "auto", False),
        (gpu((12, 0), dtype=torch.float64), "fp4", True),
    ],
)
def test_a_call_that_no_compiled_kernel_would_serve_builds_nothing(machine, call, precision, emulate):
    assert choose(call, precision, emulate=emulate) == decide(call, precision, emulate=emulate)
    assert machine.asked == 0


@pytest.mark.parametrize("precision", ["auto", "fp4", "int8"])
def test_choosing_tells_what_the_build_said(machine, precision):
    machine.outcome = build.Failure("nvcc 13\nis   not installed")
    decision = choose(gpu((8, 9)), precision)
    assert decision.kernel == "exact"
    assert decision.reason.endswith(f"int8 needs compiled kernels; {NO_NVCC}")
    assert decision.fell_back == (precision != "auto")
    assert machine.asked == 1


@pytest.mark.parametrize(
    ("capability", "d", "built", "triton", "kernel", "asked"),
    [
        ((8, 6), 64, False, None, "int8-triton", 0),
        ((8, 6), 64, False, NO_TRITON, "exact", 0),
        ((9, 0), 160, True, None, "int8-triton", 0),
        ((9, 0), 160, True, NO_TRITON, "exact", 0),
        ((9, 0), 128, True, NO_TRITON, "int8-sm90", 1),
        ((9, 0), 128, False, None, "int8-triton", 1),
        ((9, 0), 128, False, NO_TRITON, "exact", 1),
    ],
)
def test_choosing_a_trainer_asks_for_what_it_needs(machine, capability, d, built, triton, kernel, asked):
    machine.outcome = library("90a") if built else build.Failure(NO_NVCC)
    machine.triton = triton
    shape = (1, 2, 2048, d)
    assert choose(gpu(capability, needs_grad=True, q_shape=shape, k_shape=shape), "int8").kernel == kernel
    assert machine.asked == asked


@pytest.mark.parametrize(("capability", "arch"), TARGETS.items())
def test_choosing_runs_what_was_built(machine, capability, arch):
    machine.outcome = library("75", arch)
    assert choose(gpu(capability), "int8") == decide(gpu(capability), "int8")


def test_a_library_for_other_gpus_is_a_failure(machine):
    machine.outcome = library("80", "89")
    decision = choose(gpu((9, 0)), "int8")
    assert decision.kernel == "exact"
    assert decision.reason == ("int8 needs compiled kernels; the built library is for sm_80, sm_89, this GPU needs sm_90a")


def test_the_state_of_the_library_is_a_constant_in_a_compiled_graph(machine):
    def told(x):
        why = compiled.failure((9, 0))
        return x + 1 if why is None else x + len(why)

    for outcome, want in [(library("90a"), 1), (build.Failure(NO_NVCC), len(NO_NVCC))]:
        torch._dynamo.reset()
        machine.outcome = outcome
        graph = torch.compile(told, backend="eager", fullgraph=True, dynamic=True)
        assert graph(torch.zeros(3)).tolist() == [want] * 3
        asked = machine.asked
        assert graph(torch.zeros(3)).tolist() == [want] * 3
        assert machine.asked == asked


@pytest.mark.parametrize(
    ("call", "precision", "emulate", "kernel", "reason"),
    [
        (
            CPU,
            "fp4",
            False,
            "exact",
            "fp4 needs a Blackwell GPU (sm_120 or sm_121); this is a CPU; "
            "int8 needs an NVIDIA GPU from Turing on (sm_75 or newer)",
        ),
        (gpu((8, 9)), "fp4", False, "int8-mma",
         "fp4 needs a Blackwell GPU (sm_120 or sm_121); this GPU is sm_89; int8 instead, runs on sm_89"),
        (gpu((12, 0)), "fp4", False, "fp4-sm120", "asked for, runs on sm_120"),
        (gpu((10, 0)), "fp4", False, "int8-mma",
         "fp4 needs a Blackwell GPU (sm_120 or sm_121); this GPU is sm_100; int8 instead, runs on sm_100"),
        (gpu(None), "int8", False, "exact",
         "int8 needs an NVIDIA GPU from Turing on (sm_75 or newer); this GPU is not an NVIDIA one"),
        (replace(CPU, device_type="mps"), "int8", False, "exact",
         "int8 needs an NVIDIA GPU from Turing on (sm_75 or newer); this is a device of type 'mps'"),
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
    with pytest.raises(InputError, match=r"Unknown precision 'fp8'.*auto, fp4, int8, int8-fast, exact"):
        decide(CPU, "fp8")


dims = st.sampled_from([0, 1, 16, 128, 2048])
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
    mask_needs_grad=st.booleans(),
    v_head_dim=st.sampled_from([None, 64, 128]),
    build_failure=st.sampled_from([None, NO_NVCC]),
    triton_failure=st.sampled_from([None, NO_TRITON]),
)


@settings(max_examples=300, deadline=None)
@given(calls, st.sampled_from(list(Precision)), st.booleans(), st.sampled_from([KERNELS, FUTURE, EMULATING]))
def test_no_decision_breaks_a_constraint_or_keeps_silent(call, precision, emulate, kernels):
    decision = decide(call, precision, emulate=emulate, kernels=kernels)
    chosen = next(k for k in kernels if k.name == decision.kernel)
    assert obstacle(chosen, call) is None
    assert decision.reason
    assert "\n" not in decision.reason
    assert not (chosen.emulated and (not emulate or precision is Precision.AUTO))
    assert decision.fell_back == (precision is not Precision.AUTO and chosen.precision != precision.value)
    if call.needs_grad:
        assert chosen.trainable
        assert call.q_shape[3] <= (128 if chosen.compiled else 256 if chosen.triton else 2**31)
        assert chosen == EXACT or precision is not Precision.AUTO
    if call.mask_needs_grad:
        assert chosen == EXACT
    if chosen.triton:
        assert call.needs_grad
        assert call.triton_failure is None
    if chosen.compiled:
        assert call.build_failure is None
        assert precision is not Precision.AUTO or call.k_shape[2] >= 1024
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
