"""What is done with the tiny models; each check returns plain values for pytest to judge."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_comfy import Comfy, Watch
from tiny_models import MODELS, random_weights
from tiny_nodes import COUNTS, KEPT, KEPT_MODELS, SLOT

STEPS, LEAST = 2, 16
SELF_ONLY = 32  # as min_tokens: cross-attention to a prompt of 20 tokens stays exact
Prompt = dict[str, Any]
Check = Callable[["Lab"], dict[str, Any]]


def sage(model: list[Any], **settings: Any) -> Prompt:
    """A Sage3 Attention node behind ``model`` with settings for tiny models."""
    usual = {"precision": "int8", "start_percent": 0.0, "end_percent": 1.0, "min_tokens": LEAST, "emulate": True}
    return {"class_type": "Sage3Attention", "inputs": {"model": model} | usual | settings}


def graph(name: str, **settings: Any) -> Prompt:
    """Load, patch (node "2", where there are ``settings``), sample, report ("5"), keep as "out"."""
    made = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": f"tiny_{name}.safetensors", "weight_dtype": "default"}},
        "3": {"class_type": "TinyPrompt", "inputs": {"name": name, "seed": 1, "tokens": 20}},
        "4": {"class_type": "TinyPrompt", "inputs": {"name": name, "seed": 2, "tokens": 20}},
        "6": {"class_type": "TinyLatent", "inputs": {"name": name}},
    }
    if settings:
        made["2"] = sage(["1", 0], **settings)
    return finished(made, ["2" if settings else "1", 0], cfg=MODELS[name].cfg)


def finished(made: Prompt, model: list[Any], number: str = "", **sampler: Any) -> Prompt:
    """``made`` with a sampler for ``model``, a report ("5") and a keeper ("out"), their ids followed by ``number``."""
    usual = {"seed": 7, "steps": STEPS, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    inputs = {"model": model, "positive": ["3", 0], "negative": ["4", 0], "latent_image": ["6", 0]} | usual | sampler
    return made | {
        f"7{number}": {"class_type": "KSampler", "inputs": inputs},
        f"5{number}": {"class_type": "Sage3Report", "inputs": {"model": model, "latent": [f"7{number}", 0]}},
        f"8{number}": {
            "class_type": "TinyKeep",
            "inputs": {"latent": [f"5{number}", 1], "model": model, "name": f"out{number}"},
        },
    }


class Lab:
    """A ComfyUI and a watch on its attention."""

    def __init__(self, comfy: Comfy, watch: Watch) -> None:
        self.comfy = comfy
        self.watch = watch
        self._seed = 0

    def run(
        self, prompt: Prompt, anew: bool = True, compare: bool = False, before: Any = None, instead: Any = None
    ) -> dict[str, Any]:
        """Run; {"ok", "error", "reports" (by node), "calls", "outs"}. ``anew``: sample even if nothing changed.

        ``instead``: "outs" of another run, which the model gets for its attention: what that is deaf to what changed.
        """
        KEPT.clear()
        self.watch.start(compare, before, instead)
        if anew:
            self._seed += 1
            for node in prompt.values():
                if node["class_type"] == "TinyLatent":
                    node["inputs"]["name"] += " " * self._seed  # another value, the same latent
        done = self.comfy.run(prompt)
        reports = {key: outcome(ui) for key, ui in done["outputs"].items() if prompt[key]["class_type"] == "Sage3Report"}
        self.watch.before = None
        return done | {"reports": reports, "calls": self.watch.calls, "outs": self.watch.outs, "kept": dict(KEPT)}

    def good(self, prompt: Prompt, **options: Any) -> dict[str, Any]:
        """``run``, which must succeed."""
        done = self.run(prompt, **options)
        if not done["ok"]:
            raise RuntimeError(f"the prompt failed: {done['error']}")
        return done


def outcome(ui: dict[str, Any]) -> dict[str, Any]:
    """What Sage3 Report says: its text, and its lines as [wished, kernel, reason, fell back, calls]."""
    lines = [line for run in ui.get("sage3_run", ()) for line in run["lines"]] if "sage3_run" in ui else ui["sage3"]
    rows = [[x["wished"], x["kernel"], x["reason"], bool(x["fell_back"]), x["calls"]] for x in lines]
    return {"text": ui["text"][0], "lines": rows, "runs": ui.get("sage3_run")}


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative distance; 0 is bit-identical."""
    return 0.0 if torch.equal(a, b) else max(float((a - b).norm() / b.norm()), 1e-30)


def followed(without: dict[str, Any], plain: dict[str, Any], deaf: dict[str, Any]) -> dict[str, Any]:
    """How far from ``plain`` the same is ``without`` what changes it, and where only attention is ``deaf`` to it."""
    return {
        "matters": apart(without["kept"]["out"], plain["kept"]["out"]),
        "deaf": apart(deaf["kept"]["out"], plain["kept"]["out"]),
    }


# ---- every model


def one_model(name: str) -> Check:
    """Plain, exact, int8 and fp4, one layer exact, plain again: outputs, counts, every call's error."""

    def check(lab: Lab) -> dict[str, Any]:
        lab.comfy.fresh()
        plain = lab.good(graph(name))
        seen: dict[str, Any] = {"plain": plain["calls"], "no_node": plain["reports"]["5"]["text"]}
        seen["finite"] = bool(plain["kept"]["out"].isfinite().all())
        seen["spread"] = float(plain["kept"]["out"].std())
        wishes = {
            "exact": {"precision": "exact"},
            "int8": {"precision": "int8"},
            "fp4": {"precision": "fp4"},
            "layer": {"precision": "int8", "exact_layers": "0"},
        }
        for label, wish in wishes.items():
            run = lab.good(graph(name, **wish), compare=True)
            seen[label] = {
                "apart": apart(run["kept"]["out"], plain["kept"]["out"]),
                "calls": run["calls"],
                "report": run["reports"]["5"],
            }
        again = lab.good(graph(name))
        seen["again"] = apart(again["kept"]["out"], plain["kept"]["out"])
        return seen

    return check


def unet_graph(freeu: str = "", **settings: Any) -> Prompt:
    """As ``graph``, for a UNet; with FreeU "before" our node or "after" it."""
    prompt: Prompt = {
        "1": {"class_type": "TinyUNet", "inputs": {}},
        "3": {"class_type": "TinyPrompt", "inputs": {"name": "sd3", "seed": 1, "tokens": 20}},
        "4": {"class_type": "TinyPrompt", "inputs": {"name": "sd3", "seed": 2, "tokens": 20}},
        "6": {"class_type": "TinyLatent", "inputs": {"name": "unet"}},
    }
    model = ["1", 0]
    for where in ("before", "", "after"):
        if where == freeu and freeu:
            inputs = {"model": model, "b1": 1.3, "b2": 1.4, "s1": 0.9, "s2": 0.2}
            prompt["9"] = {"class_type": "FreeU_V2", "inputs": inputs}
            model = ["9", 0]
        elif not where and settings:
            prompt["2"] = sage(model, **settings)
            model = ["2", 0]
    return finished(prompt, model)


def unet(lab: Lab) -> dict[str, Any]:
    """A UNet, whose layers have kinds, alone and with FreeU before and after our node."""
    plain = lab.good(unet_graph())
    out = plain["kept"]["out"]
    int8 = lab.good(unet_graph(precision="int8"), compare=True)
    layered = lab.good(unet_graph(precision="int8", exact_layers="input 1"))
    exact = lab.good(unet_graph(precision="exact"))["kept"]["out"]
    freeu_plain = lab.good(unet_graph("after"))
    freeu_deaf = lab.good(unet_graph("after"), instead=plain["outs"])
    freeu: dict[str, Any] = followed(plain, freeu_plain, freeu_deaf)
    for where in ("before", "after"):
        run = lab.good(unet_graph(where, precision="int8"))
        freeu[where] = {"int8": apart(run["kept"]["out"], freeu_plain["kept"]["out"]), "report": run["reports"]["5"]}
    return {
        "calls": int8["calls"],
        "exact": apart(exact, out),
        "int8": apart(int8["kept"]["out"], out),
        "report": int8["reports"]["5"],
        "layered": layered["reports"]["5"],
        "freeu": freeu,
        "again": apart(lab.good(unet_graph())["kept"]["out"], out),
    }


# ---- once, on Wan


def interrupted(lab: Lab) -> dict[str, Any]:
    """Cancel is pressed in the third of four steps; then the same graph runs through."""
    import comfy.model_management as management

    made = finished(graph("wan", precision="int8"), ["2", 0], steps=4)
    want = lab.good(made)
    plain = lab.good(graph("wan"))["kept"]["out"]
    half = len(want["calls"]) // 2

    def cancel(call: int) -> None:
        if call == half + 1:
            management.interrupt_current_processing()

    cut = lab.run(made, before=cancel)
    management.interrupt_current_processing(False)
    base = lab.good(graph("wan"))
    left = SLOT in KEPT_MODELS["out"].model_options["transformer_options"]
    after = lab.good(made)
    return {
        "cut": cut["error"],
        "cut_calls": len(cut["calls"]),
        "whole_calls": len(want["calls"]),
        "left": left,
        "plain": apart(base["kept"]["out"], plain),
        "after": apart(after["kept"]["out"], want["kept"]["out"]),
        "report": after["reports"]["5"],
        "first_report": want["reports"]["5"],
    }


def failing(error: Callable[[], Exception], at: int | None = None, **settings: Any) -> Check:
    """The int8 kernel raises at call ``at`` of it, or always; then it is well again."""

    def check(lab: Lab) -> dict[str, Any]:
        reference = lab.comfy.module("reference")
        real, count = reference.int8_attention, 0
        plain = lab.good(graph("wan"))["kept"]["out"]
        want = lab.good(graph("wan", precision="int8"))["kept"]["out"]

        def broken(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if at is None or count == at:
                raise error()
            return real(*args, **kwargs)

        reference.int8_attention = broken
        try:
            run = lab.run(graph("wan", precision="int8", **settings))
        finally:
            reference.int8_attention = real
        after = lab.good(graph("wan", precision="int8"))
        return {
            "ok": run["ok"],
            "error": run["error"],
            "raised": count,
            "report": run["reports"].get("5"),
            "apart_from_exact": apart(run["kept"]["out"], plain) if run["ok"] else None,
            "after": apart(after["kept"]["out"], want),
            "after_report": after["reports"]["5"],
        }

    return check


def other_overrides(lab: Lab) -> dict[str, Any]:
    """Somebody else's override before ours, after ours, and on both sides."""
    want = lab.good(graph("wan", precision="int8"))["kept"]["out"]
    seen = {}
    for label in ("before", "after", "both", "late"):
        COUNTS.clear()
        made = graph("wan")
        model = ["1", 0]
        if label in ("before", "both"):
            made["20"] = {"class_type": "TinyOverride", "inputs": {"model": model, "name": "before", "how": "polite"}}
            model = ["20", 0]
        made["2"] = sage(model, precision="int8", min_tokens=SELF_ONLY)
        model = ["2", 0]
        if label != "before":
            how = "late" if label == "late" else "polite"
            made["21"] = {"class_type": "TinyOverride", "inputs": {"model": model, "name": "after", "how": how}}
            model = ["21", 0]
        run = lab.good(finished(made, model))
        seen[label] = {"counts": dict(COUNTS), "report": run["reports"]["5"], "calls": len(run["calls"])}
        seen[label]["apart"] = apart(run["kept"]["out"], want)
    one = lab.good(graph("wan", precision="int8", min_tokens=SELF_ONLY))["kept"]["out"]
    seen["want"] = apart(one, want)
    COUNTS.clear()
    made = graph("wan")
    made["21"] = {"class_type": "TinyOverride", "inputs": {"model": ["1", 0], "name": "late", "how": "late"}}
    lab.good(finished(made, ["21", 0]))
    seen["late_alone"] = COUNTS["late"]
    return seen


def replaced(lab: Lab) -> dict[str, Any]:
    """An override after ours that computes attention itself, as most do; cross-attention is left to it."""
    settings = {"precision": "int8", "min_tokens": SELF_ONLY}
    int8 = lab.good(graph("wan", **settings))["kept"]["out"]
    seen = {}
    for how in ("rude", "official", "late rude"):
        if how == "official" and not hasattr(KEPT_MODELS["out"], "set_model_optimized_attention"):  # before 0.32
            continue
        COUNTS.clear()
        made = graph("wan", **settings)
        made["21"] = {"class_type": "TinyOverride", "inputs": {"model": ["2", 0], "name": "rude", "how": how}}
        run = lab.good(finished(made, ["21", 0]))
        seen[how] = {"apart": apart(run["kept"]["out"], int8), "rude": COUNTS["rude"], "report": run["reports"]["5"]}
    return seen


def spoilt(how: Callable[[torch.Tensor], torch.Tensor], name: str = "wan") -> Check:
    """The 4-bit kernel's third call gives a wrong result; all others are right. Wan's is layer 1's self-attention."""

    def check(lab: Lab) -> dict[str, Any]:
        reference = lab.comfy.module("reference")
        real, count = reference.fp4_attention, 0
        plain = lab.good(graph(name))["kept"]["out"]
        want = lab.good(graph(name, precision="fp4"))["kept"]["out"]

        def wrong(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            out, *rest = real(*args, **kwargs)
            return (how(out) if count == 3 else out, *rest)

        reference.fp4_attention = wrong
        try:
            run = lab.run(graph(name, precision="fp4"), compare=True)
        finally:
            reference.fp4_attention = real
        after = lab.good(graph(name, precision="fp4"))
        return {
            "ok": run["ok"],
            "error": run["error"],
            "calls": run["calls"],
            "report": run["reports"].get("5"),
            "apart_from_exact": apart(run["kept"]["out"], plain) if run["ok"] else None,
            "after": apart(after["kept"]["out"], want),
            "after_report": after["reports"]["5"],
        }

    return check


def batches(lab: Lab) -> dict[str, Any]:
    """Cond and uncond in one batch, and apart where their lengths keep them from it."""
    seen = {}
    for label, tokens in (("together", 20), ("apart", 24)):
        plain, made = graph("flux"), graph("flux", precision="int8")
        for prompt in (plain, made):
            prompt["4"]["inputs"]["tokens"] = tokens
        want = lab.good(plain)
        run = lab.good(made, compare=True)
        seen[label] = {
            "calls": run["calls"],
            "apart": apart(run["kept"]["out"], want["kept"]["out"]),
            "report": run["reports"]["5"],
        }
    return seen


def write_lora() -> None:
    """tiny.safetensors among the LoRAs: the self-attention of every layer of Wan."""
    import folder_paths
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(5)
    file = {}
    for i in range(3):
        for part in ("q", "k", "v"):
            key = f"diffusion_model.blocks.{i}.self_attn.{part}"
            file[f"{key}.lora_A.weight"] = torch.randn(4, 256, generator=generator)
            file[f"{key}.lora_B.weight"] = torch.randn(256, 4, generator=generator) * 0.1
    save_file(file, f"{folder_paths.get_folder_paths('loras')[0]}/tiny.safetensors")


def lora(lab: Lab) -> dict[str, Any]:
    """A LoRA before and after our node does what it does without it."""
    write_lora()

    def made(order: str, **settings: Any) -> Prompt:
        prompt, model = graph("wan"), ["1", 0]
        for i, what in enumerate(order):
            if what == "l":
                inputs = {"model": model, "lora_name": "tiny.safetensors", "strength_model": 1.0}
                prompt[f"2{i}"] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
            else:
                prompt[f"2{i}"] = sage(model, **settings)
            model = [f"2{i}", 0]
        return finished(prompt, model)

    without = lab.good(graph("wan"))["kept"]["out"]
    plain = lab.good(made("l"))["kept"]["out"]
    seen: dict[str, Any] = {"matters": apart(plain, without)}
    for order in ("ls", "sl"):
        run = lab.good(made(order, precision="int8"))
        seen[order] = {
            "exact": apart(lab.good(made(order, precision="exact"))["kept"]["out"], plain),
            "int8": apart(run["kept"]["out"], plain),
            "report": run["reports"]["5"],
        }
    seen["without_again"] = apart(lab.good(graph("wan"))["kept"]["out"], without)
    return seen


def clones(lab: Lab) -> dict[str, Any]:
    """One loader, two patched clones and the model itself, all in one graph."""
    plain = lab.good(graph("wan"))["kept"]["out"]
    int8 = lab.good(graph("wan", precision="int8"))["kept"]["out"]
    fp4 = lab.good(graph("wan", precision="fp4", min_tokens=SELF_ONLY))["kept"]["out"]
    made = graph("wan", precision="int8")
    made["22"] = sage(["1", 0], precision="fp4", min_tokens=SELF_ONLY)
    made = finished(finished(made, ["22", 0], "b"), ["1", 0], "c")
    run = lab.good(made)
    return {
        "int8": apart(run["kept"]["out"], int8),
        "fp4": apart(run["kept"]["outb"], fp4),
        "plain": apart(run["kept"]["outc"], plain),
        "reports": run["reports"],
    }


def write_other_wan() -> None:
    """tiny_other_wan.safetensors: Wan with other weights before its attention, so that all that differs goes through it."""
    import folder_paths
    from safetensors.torch import load_file, save_file

    path = Path(folder_paths.get_full_path("diffusion_models", "tiny_wan.safetensors"))
    weights = load_file(path)
    other = random_weights(weights, seed=1)
    of_attention = re.compile(r"blocks\.\d+\.(self|cross)_attn\.[qkv]\.weight")
    mixed = {key: other[key] if of_attention.fullmatch(key) else weights[key] for key in weights}
    save_file(mixed, path.with_name("tiny_other_wan.safetensors"))


def merged(lab: Lab) -> dict[str, Any]:
    """Two models merged, plain and with our node: on the merge, and on either model before it."""
    write_other_wan()

    def made(where: str = "", precision: str = "int8") -> Prompt:
        prompt = graph("wan")
        inputs = {"unet_name": "tiny_other_wan.safetensors", "weight_dtype": "default"}
        prompt["10"] = {"class_type": "UNETLoader", "inputs": inputs}
        models = {"first": ["1", 0], "second": ["10", 0], "after": ["11", 0]}
        if where:
            prompt["2"] = sage(models[where], precision=precision)
            models[where] = ["2", 0]
        inputs = {"model1": models["first"], "model2": models["second"], "ratio": 0.5}
        prompt["11"] = {"class_type": "ModelMergeSimple", "inputs": inputs}
        return finished(prompt, models["after"])

    without, plain = lab.good(graph("wan")), lab.good(made())
    deaf = lab.good(made(), instead=without["outs"])
    seen: dict[str, Any] = followed(without, plain, deaf)
    for where in ("first", "after", "second"):
        run = lab.good(made(where))
        exact = lab.good(made(where, precision="exact"))
        seen[where] = {
            "exact": apart(exact["kept"]["out"], plain["kept"]["out"]),
            "int8": apart(run["kept"]["out"], plain["kept"]["out"]),
            "report": run["reports"]["5"],
        }
    seen["without_again"] = apart(lab.good(graph("wan"))["kept"]["out"], without["kept"]["out"])
    return seen


def controlled(made: Callable[..., Prompt]) -> Check:
    """``made(control, **settings)``: sampling with a control net or without, plain or with our node."""

    def check(lab: Lab) -> dict[str, Any]:
        without, plain = lab.good(made(False)), lab.good(made(True))
        deaf = lab.good(made(True), instead=without["outs"])
        run, exact = lab.good(made(True, precision="int8"), compare=True), lab.good(made(True, precision="exact"))
        again = lab.good(made(False))
        return followed(without, plain, deaf) | {
            "int8": apart(run["kept"]["out"], plain["kept"]["out"]),
            "exact": apart(exact["kept"]["out"], plain["kept"]["out"]),
            "without_again": apart(again["kept"]["out"], without["kept"]["out"]),
            "calls": run["calls"],
            "report": run["reports"]["5"],
        }

    return check


def residuals_on_sd3(control: bool, **settings: Any) -> Prompt:
    """SD3 with a control net's residuals."""
    prompt = graph("sd3", **settings)
    if control:
        inputs = {"positive": ["3", 0], "negative": ["4", 0], "layers": 4, "tokens": 64, "width": 256}
        prompt["9"] = {"class_type": "TinyResiduals", "inputs": inputs}
        prompt["7"]["inputs"] |= {"positive": ["9", 0], "negative": ["9", 1]}
    return prompt


def network_on_unet(control: bool, **settings: Any) -> Prompt:
    """A UNet with a control net of its kind, applied by the stock node to a picture."""
    prompt = unet_graph(**settings)
    if control:
        prompt["90"] = {"class_type": "TinyControlNet", "inputs": {}}
        size = {"width": 128, "height": 128, "batch_size": 1}
        prompt["91"] = {"class_type": "EmptyImage", "inputs": size | {"color": 0xA06030}}
        inputs = {"positive": ["3", 0], "negative": ["4", 0], "control_net": ["90", 0], "image": ["91", 0]}
        settings = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
        prompt["9"] = {"class_type": "ControlNetApplyAdvanced", "inputs": inputs | settings}
        prompt["7"]["inputs"] |= {"positive": ["9", 0], "negative": ["9", 1]}
    return prompt


def cached_steps(lab: Lab) -> dict[str, Any]:
    """The stock EasyCache node, which leaves out whole passes of the model, before our node and after it."""

    def made(where: str, **settings: Any) -> Prompt:
        prompt = graph("wan", **settings)
        settings = {"reuse_threshold": 3.0, "start_percent": 0.1, "end_percent": 0.95, "verbose": False}
        prompt["9"] = {"class_type": "EasyCache", "inputs": {"model": ["1", 0]} | settings}
        last = "9"
        if where == "before":
            prompt["2"]["inputs"]["model"], last = ["9", 0], "2"
        elif where == "after":
            prompt["9"]["inputs"]["model"] = ["2", 0]
        return finished(prompt, [last, 0], steps=8)

    without = lab.good(finished(graph("wan"), ["1", 0], steps=8))["kept"]["out"]
    plain = lab.good(made(""))
    seen: dict[str, Any] = {"matters": apart(without, plain["kept"]["out"]), "plain_calls": len(plain["calls"])}
    for where in ("before", "after"):
        run = lab.good(made(where, precision="int8"))
        seen[where] = {
            "calls": len(run["calls"]),
            "int8": apart(run["kept"]["out"], plain["kept"]["out"]),
            "report": run["reports"]["5"],
        }
    return seen


def compiled(lab: Lab) -> dict[str, Any]:
    """torch.compile of the whole model, behind our node."""

    def made(steps: int = STEPS, **settings: Any) -> Prompt:
        prompt = graph("wan", **settings)
        prompt["9"] = {"class_type": "TinyCompile", "inputs": {"model": ["2" if settings else "1", 0]}}
        return finished(prompt, ["9", 0], steps=steps)

    plain = lab.good(made())["kept"]["out"]
    want = lab.good(graph("wan", precision="int8"))["kept"]["out"]
    run = lab.good(made(precision="int8"))
    twice = lab.good(made(precision="int8"))
    window = lab.good(made(steps=4, precision="int8", end_percent=0.5))
    plain_window = lab.good(finished(graph("wan", precision="int8", end_percent=0.5), ["2", 0], steps=4))
    return {
        "apart_in_window": apart(window["kept"]["out"], plain_window["kept"]["out"]),
        "apart_from_plain": apart(run["kept"]["out"], plain),
        "apart_from_int8": apart(run["kept"]["out"], want),
        "report": run["reports"]["5"],
        "second_report": twice["reports"]["5"],
    }


def window(lab: Lab) -> dict[str, Any]:
    """Half of the schedule, on the sampler's own sigmas."""
    made = finished(graph("wan", precision="int8", end_percent=0.5), ["2", 0], steps=4)
    run = lab.good(made, compare=True)
    return {"calls": run["calls"], "report": run["reports"]["5"]}


def no_hook(lab: Lab) -> dict[str, Any]:
    """A model whose attention never asks: somebody replaced it."""
    import comfy.ldm.wan.model as wan

    seen_by_models = wan.optimized_attention

    def deaf(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("transformer_options", None)
        return seen_by_models(*args, **kwargs)

    wan.optimized_attention = deaf
    try:
        run = lab.good(graph("wan", precision="int8"))
    finally:
        wan.optimized_attention = seen_by_models
    return {"report": run["reports"]["5"]}


def group(name: str) -> dict[str, Check]:
    """The checks of "models", "together" or "offload"."""
    if name == "models":
        return {model: one_model(model) for model in MODELS} | {"unet": unet, "batches": batches}
    if name == "offload":
        from tiny_offload import GROUP  # which builds on this module

        return GROUP

    def of_kernel() -> Exception:
        return RuntimeError("an illegal memory access was encountered\nin the kernel")

    def of_memory() -> Exception:
        return torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return {
        "interrupted": interrupted,
        "kernel_fails": failing(of_kernel),
        "kernel_fails_once": failing(of_kernel, at=2),
        "kernel_fails_stop": failing(of_kernel, at=2, on_trouble="stop"),
        "out_of_memory": failing(of_memory, at=2),
        "nan": spoilt(lambda out: out * torch.nan),
        "noise": spoilt(torch.randn_like),
        "nan_unnamed": spoilt(lambda out: out * torch.nan, "sd3"),
        "noise_unnamed": spoilt(torch.randn_like, "sd3"),
        "other_overrides": other_overrides,
        "replaced": replaced,
        "lora": lora,
        "clones": clones,
        "merged": merged,
        "controlled_sd3": controlled(residuals_on_sd3),
        "controlled_unet": controlled(network_on_unet),
        "cached_steps": cached_steps,
        "compiled": compiled,
        "window": window,
        "no_hook": no_hook,
    }
