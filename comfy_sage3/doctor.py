"""``python -m comfy_sage3 doctor``: what this machine can run, and why, with a self-test. Needs no GPU.

Where there is one, its kernels are built like on any first use: only then is it known what runs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from . import __version__, reference, verify
from .attention import attention
from .dispatch import Call, choose
from .kernels import describe
from .kernels.devices import capability_of
from .metrics import attention_error
from .precision import Precision
from .report import Report

OPTIONAL = {  # distribution on PyPI: what it is for
    "diffusers": "the A/B comparison on the bundled model",
    "matplotlib": "plots in the comparison's report",
    "gradio": "the browser app",
    "ninja": "building CUDA kernels",
}
TYPICAL = (1, 24, 8192, 128)  # a video model's self-attention: (batch, heads, tokens, head_dim)
LEAST_COSINE = {"fp4": 0.97, "int8": 0.999, "int8-fast": 0.999, "exact": 0.999999}  # on normal random inputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--json", action="store_true", help="print the same as JSON")
    parser.add_argument("--verify", action="store_true", help="check and time the 4-bit kernel, for a report")
    parser.add_argument("--out", type=Path, default=Path("sage3-verify.json"), help="that file (default: sage3-verify.json)")


def run(args: argparse.Namespace) -> int:
    """Examine and print. Returns 0, or 1 when a kernel fails its self-test."""
    if args.verify:
        return verify_here(args)
    found = examine()
    print(json.dumps(found, indent=2) if args.json else render(found))
    return 0 if all(test["ok"] for test in found["self_test"]) else 1


def verify_here(args: argparse.Namespace) -> int:
    """The 4-bit kernel on the first GPU. Returns 0, or 1 when it is wrong."""
    found = verify.verify(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    print(json.dumps(found, indent=2) if args.json else "\n".join(verify.lines(found)))
    verify.save(found, args.out)
    if not args.json:
        print(f"wrote {args.out}: attach it to a report")
    return 0 if found["ok"] else 1


def examine() -> dict[str, Any]:
    """Everything the command prints, as plain data."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {
            "comfy_sage3": __version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "platform": platform.platform(),
        },
        "devices": [_device(d) for d in devices],
        "decisions": [_decision(d, p) for d in devices for p in Precision],
        "kernels": describe.describe(),
        "self_test": [self_test(d, p) for d in devices for p in ("fp4", "int8", "int8-fast", "exact")],
        "packages": [_package(name, use) for name, use in OPTIONAL.items()] + [_nvcc()],
    }


def self_test(device: torch.device, precision: str) -> dict[str, Any]:
    """The kernel that serves ``precision`` on ``device`` (emulated if need be) against exact attention."""
    seed = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 257, 64, generator=seed) for _ in range(3))
    want, _ = reference.exact_attention(q, k, v)
    report = Report()
    result: dict[str, Any] = {"device": str(device), "precision": precision, "kernel": None, "error": None}
    try:
        out = attention(q.to(device), k.to(device), v.to(device), precision=precision, emulate=True, report=report)
        result["kernel"] = report.lines()[0]["kernel"]
        error = attention_error(out, want)
    except Exception as problem:  # whatever a broken driver or build raises is what there is to show
        result |= {"ok": False, "error": f"{type(problem).__name__}: {problem}".splitlines()[0]}
        return result
    finite = all(math.isfinite(x) for x in error.values())
    ok = finite and error["cosine"] >= LEAST_COSINE[precision]
    result |= {"ok": ok, "cosine": error["cosine"], "relative_l1": error["relative_l1"]}
    if not ok:
        least = LEAST_COSINE[precision]
        result["error"] = f"cosine is below {least}" if finite else "the output is not finite"
    return result


def render(found: dict[str, Any]) -> str:
    """The same for a person."""
    versions = found["versions"]
    lines = [f"comfy_sage3 {versions['comfy_sage3']}, torch {versions['torch']}, Python {versions['python']}"]
    lines += [versions["platform"], ""]
    for device in found["devices"]:
        lines.append(f"{device['device']}: {device['description']}")
        for x in found["decisions"]:
            if x["device"] == device["device"]:
                fell_back = " (falls back)" if x["fell_back"] else ""
                lines.append(f"  {x['precision']:<10}-> {x['kernel']}{fell_back}: {x['reason']}")
    lines += ["", *describe.lines(found["kernels"])]
    lines += ["", "Self-test against exact attention (emulated where there is no kernel: quality, not speed)"]
    for test in found["self_test"]:
        kernel = test["kernel"] or test["precision"]
        if test["error"]:
            lines.append(f"  FAILED {kernel} on {test['device']}: {test['error']}")
        else:
            numbers = f"cosine {test['cosine']:.6f}, relative L1 {test['relative_l1']:.6f}"
            lines.append(f"  ok     {kernel} on {test['device']}: {numbers}")
    lines += ["", "Optional packages"]
    for package in found["packages"]:
        lines.append(f"  {package['name']:<14}{package['version'] or 'absent':<10} for {package['use']}")
    return "\n".join(lines)


def _device(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {
            "device": "cpu",
            "capability": None,
            "description": f"{platform.machine()} processor, {torch.get_num_threads()} threads",
        }
    properties = torch.cuda.get_device_properties(device)
    capability = capability_of(device)
    kind = f"sm_{capability[0]}{capability[1]}" if capability else "not an NVIDIA GPU"
    memory = properties.total_memory / 2**30
    return {
        "device": str(device),
        "capability": capability,
        "description": f"{properties.name}, {kind}, {memory:.0f} GiB",
    }


def _decision(device: torch.device, precision: Precision) -> dict[str, Any]:
    call = Call(TYPICAL, TYPICAL, torch.bfloat16, device.type, capability_of(device))
    decision = choose(call, precision)
    return {
        "device": str(device),
        "precision": precision.value,
        "kernel": decision.kernel,
        "reason": decision.reason,
        "fell_back": decision.fell_back,
    }


def _package(name: str, use: str) -> dict[str, Any]:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    return {"name": name, "version": version, "use": use}


def _nvcc() -> dict[str, Any]:
    found = "present" if shutil.which("nvcc") else None
    return {"name": "nvcc", "version": found, "use": "building CUDA kernels (CUDA 12.8 or newer)"}
