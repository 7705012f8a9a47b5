"""``python -m comfy_sage3 doctor --verify``: is the 4-bit kernel right on this GPU, and is it fast?

For owners of a Blackwell GPU, which this project's authors do not have: one product of the real instruction against its
emulation, the kernel against its specification in PyTorch, its time beside PyTorch's attention and the 8-bit kernel, and a
JSON file to attach to a report. Elsewhere each step that cannot run says what it needs.
"""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import __version__, reference
from .errors import InputError
from .kernels import build, compiled
from .kernels.devices import capability_of
from .kernels.sources import arch_of
from .metrics import attention_error

SCHEMA = 1
SHAPES = (  # batch, heads, queries, keys, head_dim, causal
    (1, 2, 97, 97, 64, False), (1, 2, 1000, 1000, 64, True), (1, 2, 129, 333, 128, False), (1, 2, 4096, 4096, 128, False),
    (1, 2, 1000, 1000, 128, True), (1, 2, 200, 300, 256, False),
)  # fmt: skip
TIMED = ((1, 24, 8192, 8192, 64, False), (1, 24, 8192, 8192, 128, False), (1, 24, 32768, 32768, 128, False))
LEAST_COSINE = 0.999999
MOST_ULP = 8.0
ROUNDS = 5


def verify(device: torch.device) -> dict[str, Any]:
    """Every step on ``device``: what came out, or why not. ``ok`` is false where something that ran was wrong."""
    capability = capability_of(device)
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "when": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": {
            "comfy_sage3": __version__, "torch": torch.__version__, "cuda": torch.version.cuda,
            "python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}",
        },
        "device": torch.cuda.get_device_name(device) if capability else str(device),
        "capability": capability,
        "emulated": capability is not None and capability < (12, 0),
        "steps": {},
    }  # fmt: skip
    missing = _missing(capability)
    steps: dict[str, Callable[[torch.device], dict[str, Any]]] = {
        "instruction against emulation": check_instruction,
        "kernel against specification": check_kernel,
        "time": time_kernels,
    }
    for name, step in steps.items():
        if missing:
            found["steps"][name] = {"skipped": missing}
        elif found["emulated"] and name != "kernel against specification":
            found["steps"][name] = {"skipped": "the instructions are emulated on this GPU: there is nothing to learn"}
        else:
            found["steps"][name] = step(device)
    found["ok"] = all(step.get("ok", True) for step in found["steps"].values())
    return found


def _missing(capability: tuple[int, int] | None) -> str | None:
    """Why the 4-bit kernel cannot run, None where it can."""
    if capability is None:
        return "needs an NVIDIA GPU of sm_120 or sm_121 (GeForce RTX 50, RTX PRO Blackwell, DGX Spark)"
    outcome = build.load()
    if isinstance(outcome, build.Failure):
        return f"needs the compiled kernels: {outcome.reason}"
    if not hasattr(outcome.ops, "fp4_attention") or arch_of(capability) not in outcome.archs:
        name = f"sm_{capability[0]}{capability[1]}"
        return f"needs a GPU of sm_120 or sm_121; this one is {name} (on sm_90, SAGE3_EMULATE_FP4=1 builds an emulation)"
    return None


def check_instruction(device: torch.device) -> dict[str, Any]:
    """Random operands through mma.sync and its emulation, all selectors; every fp16 number through the conversion.

    What NVIDIA does not say is in what order and width the four blocks and the accumulator are added up: the largest
    difference is reported in units of the last place of what their magnitudes add up to, and may be a few.
    """
    generator = torch.Generator().manual_seed(0)

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)

    scales = torch.randint(0, 127, (2, 32, 4), generator=generator, dtype=torch.uint8).view(torch.int32).squeeze(-1)
    c = torch.randn(32, 4, generator=generator) * 1000
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    a, b = words(32, 4), words(32, 2)
    unsigned = 0x77777777  # every code without its sign

    def probe(*operands: Tensor) -> tuple[Tensor, Tensor]:
        return compiled.operators().fp4_probe(*(t.to(device).contiguous() for t in (*operands, scales[0], scales[1], x)))  # type: ignore[no-any-return]

    products, codes = probe(a, b, c)
    magnitudes, _ = probe(a & unsigned, b & unsigned, c.abs())
    real, emulated = products.double().unbind(2)
    units = ((real - emulated).abs() / (magnitudes[:, :, 1].double() * 2.0**-23)).max().item()
    wrong = int((codes[:, 0] != codes[:, 1]).sum())
    return {
        "ok": wrong == 0 and units < MOST_ULP,
        "largest_difference_in_ulp": units,
        "words_converted_otherwise": wrong,
    }


def check_kernel(device: torch.device) -> dict[str, Any]:
    """The kernel against ``reference.fp4_attention``, bf16."""
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        q, k, v = _inputs(shape, device)
        causal = shape[-1]
        out, _ = compiled.operators().fp4_attention(q, k, v, None, causal, shape[4] ** -0.5, False)
        want, _ = reference.fp4_attention(q, k, v, is_causal=causal, options=reference.OUR_FP4)
        exact, _ = reference.exact_attention(q, k, v, is_causal=causal)
        rows.append(
            {
                "shape": list(shape),
                "cosine_to_specification": attention_error(out, want)["cosine"],
                "error_against_exact": attention_error(out, exact),
            }
        )
    return {"ok": all(row["cosine_to_specification"] >= LEAST_COSINE for row in rows), "rows": rows}


def time_kernels(device: torch.device) -> dict[str, Any]:
    """Medians in ms of interleaved runs, quantisation included."""
    ops = compiled.operators()
    rows = []
    for shape in TIMED:
        q, k, v = _inputs(shape, device)
        scale = shape[4] ** -0.5
        runs: dict[str, Callable[[], Any]] = {
            "pytorch": partial(F.scaled_dot_product_attention, q, k, v),
            "int8": partial(ops.int8_attention, q, k, v, None, False, scale, False, "mma"),
            "fp4": partial(ops.fp4_attention, q, k, v, None, False, scale, False),
        }
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for i in range(ROUNDS + 1):
            for name, call in runs.items():
                taken = _milliseconds(call)
                if i > 0:  # the first warms up
                    samples[name].append(taken)
        ms = {name: statistics.median(values) for name, values in samples.items()}
        flops = 4.0 * shape[0] * shape[1] * shape[2] * shape[3] * shape[4]
        rows.append({"shape": list(shape), "ms": ms, "tflops": {name: flops / value * 1e-9 for name, value in ms.items()}})
    return {"rows": rows}


def _milliseconds(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _inputs(shape: tuple[int, int, int, int, int, bool], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    b, h, lq, lk, d, _ = shape
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(b, h, n, d, generator=generator, device=device).bfloat16() for n in (lq, lk, lk))
    return q, k, v


def save(found: dict[str, Any], path: Path) -> None:
    """Write the JSON. Raises InputError when the folder cannot be written."""
    try:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except OSError as problem:
        raise InputError(f"Cannot write {path}: {problem.strerror}. Name another file.") from None


def lines(found: dict[str, Any]) -> list[str]:
    """The same for a person."""
    said = [f"4-bit kernel on {found['device']}" + (" (emulated instructions)" if found["emulated"] else "")]
    for name, step in found["steps"].items():
        if "skipped" in step:
            said.append(f"  skipped  {name}: {step['skipped']}")
            continue
        said.append(f"  {'ok' if step.get('ok', True) else 'WRONG':<8} {name}")
        if "largest_difference_in_ulp" in step:
            said.append(
                f"           largest difference {step['largest_difference_in_ulp']:.2f} units in the last place, "
                f"{step['words_converted_otherwise']} words converted otherwise"
            )
        for row in step.get("rows", []):
            b, h, lq, lk, d, causal = row["shape"]
            text = f"           B={b} H={h} {lq} x {lk} hd{d}{' causal' if causal else ''}: "
            if "ms" in row:
                text += ", ".join(f"{n} {ms:.3f} ms ({row['tflops'][n]:.0f} TFLOPS)" for n, ms in row["ms"].items())
            else:
                error = row["error_against_exact"]
                text += f"cosine to the specification {row['cosine_to_specification']:.8f}, "
                text += f"relative L1 to exact {error['relative_l1']:.4f}"
            said.append(text)
    return said
