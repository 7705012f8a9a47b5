"""The node on a model that is loaded in part (low-VRAM offload), and under the stock torch.compile node."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tiny_checks import Check, Lab, Prompt, apart, finished, graph, write_lora
from tiny_nodes import KEPT_MODELS


@contextmanager
def room_for_weights(share: float | None) -> Iterator[dict[str, int]]:
    """Models are loaded anew, with room for ``share`` of their weights (None: as ComfyUI sees fit, on a CPU all).

    ComfyUI never offloads from a CPU (``load_models_gpu`` sets the room to 0, "unlimited", there), so the room is put in
    where it would arrive; everything behind that is ComfyUI's own. Counts the weights that were cast at call time.
    """
    import comfy.model_management as management
    import comfy.ops as ops

    load, cast = management.LoadedModel.model_load, ops.cast_bias_weight
    seen = {"casts": 0}

    def load_in_part(self: Any, room: float = 0, force_patch_weights: bool = False) -> Any:
        if share is not None:
            room = share * self.model_memory()
        return load(self, room, force_patch_weights=force_patch_weights)

    def counted(*args: Any, **kwargs: Any) -> Any:
        seen["casts"] += 1
        return cast(*args, **kwargs)

    management.unload_all_models()
    management.LoadedModel.model_load, ops.cast_bias_weight = load_in_part, counted
    try:
        yield seen
    finally:
        management.LoadedModel.model_load, ops.cast_bias_weight = load, cast


def offloaded_modules(model: Any) -> int:
    """How many of the model's modules keep their weights where they were and cast them at every call."""
    return sum(hasattr(m, "prev_comfy_cast_weights") for m in model.model.modules())


def offloaded(share: float, lora: bool = False) -> Check:
    """Wan with room for ``share`` of its weights, against the same wholly loaded; each plain, exact and int8."""

    def check(lab: Lab) -> dict[str, Any]:
        import comfy.model_management as management

        if lora:
            write_lora()

        def made(**settings: Any) -> Prompt:
            prompt = graph("wan", **settings)
            if not lora:
                return prompt
            inputs = {"model": ["2" if settings else "1", 0], "lora_name": "tiny.safetensors", "strength_model": 1.0}
            prompt["9"] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
            return finished(prompt, ["9", 0])

        def run(share: float | None, **settings: Any) -> dict[str, Any]:
            with room_for_weights(share) as seen:
                done = lab.good(made(**settings), compare=True)
            model = KEPT_MODELS["out"]
            state = {
                "modules": offloaded_modules(model),
                "lowvram": model.model.model_lowvram,
                "patches_at_call": model.lowvram_patch_counter(),
                "loaded": model.loaded_size() / model.model_size(),
            }
            return done | state | seen

        whole = {wish: run(None, precision=wish) for wish in ("exact", "int8")}
        plain = run(None)
        management.unload_all_models()
        weights = {k: v.clone() for k, v in KEPT_MODELS["out"].model.state_dict().items()}
        part = {wish: run(share, precision=wish) for wish in ("exact", "int8")}
        plain_in_part = run(share)
        again = run(None)
        left_behind = offloaded_modules(KEPT_MODELS["out"])
        management.unload_all_models()
        after = KEPT_MODELS["out"].model.state_dict()
        out = plain["kept"]["out"]
        facts = ("modules", "lowvram", "patches_at_call", "loaded", "casts")
        return {
            "whole": {k: whole["int8"][k] for k in facts},
            "part": {k: part["int8"][k] for k in facts},
            "left_behind": left_behind,
            "errors": [c["error"] for c in part["int8"]["calls"]],
            "whole_errors": [c["error"] for c in whole["int8"]["calls"]],
            "report": part["int8"]["reports"]["5"],
            "whole_report": whole["int8"]["reports"]["5"],
            "plain": apart(plain_in_part["kept"]["out"], out),
            "exact": apart(part["exact"]["kept"]["out"], plain_in_part["kept"]["out"]),
            "int8": apart(part["int8"]["kept"]["out"], whole["int8"]["kept"]["out"]),
            "int8_from_plain": apart(part["int8"]["kept"]["out"], out),
            "again": apart(again["kept"]["out"], out),
            "weights_same": after.keys() == weights.keys() and all(torch.equal(after[k], weights[k]) for k in after),
        }

    return check


def stock_compile(lab: Lab) -> dict[str, Any]:
    """The stock TorchCompileModel node with Inductor, before and after our node, on models with and without it."""
    import folder_paths

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder_paths.get_temp_directory()}/inductor"

    def made(where: str = "after", steps: int = 2, **settings: Any) -> Prompt:
        prompt = graph("wan", **settings)
        compile_ = {"class_type": "TorchCompileModel", "inputs": {"model": ["1", 0], "backend": "inductor"}}
        prompt["9"] = compile_
        model = ["9", 0]
        if settings and where == "after":
            compile_["inputs"]["model"], model = ["2", 0], ["9", 0]
        elif settings:
            prompt["2"]["inputs"]["model"], model = ["9", 0], ["2", 0]
        return finished(prompt, model, steps=steps)

    window = {"precision": "int8", "end_percent": 0.5}
    plain = lab.good(graph("wan"))["kept"]["out"]
    in_window = lab.good(finished(graph("wan", **window), ["2", 0], steps=4))
    seen: dict[str, Any] = {}

    def run(prompt: Prompt) -> dict[str, Any]:
        """The watch does not see what a compiled graph calls: what it sees is called from outside of any."""
        torch._dynamo.utils.counters.clear()
        done = lab.good(prompt)
        return done | {"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}

    compiled_plain = run(made())
    seen["plain"] = {"apart": apart(compiled_plain["kept"]["out"], plain), "graphs": compiled_plain["graphs"]}
    for where, wish in (("after", "int8"), ("before", "fp4")):
        want = lab.good(graph("wan", precision=wish))["kept"]["out"]
        done = run(made(where, precision=wish))
        seen[where] = {
            "graphs": done["graphs"],
            "outside": len(done["calls"]),
            "not_compiled": apart(want, plain),
            "from_not_compiled": apart(done["kept"]["out"], want),
            "from_plain": apart(done["kept"]["out"], plain),
            "report": done["reports"]["5"],
        }
    done = run(made("after", steps=4, **window))
    seen["window"] = {
        "from_not_compiled": apart(done["kept"]["out"], in_window["kept"]["out"]),
        "report": done["reports"]["5"],
        "not_compiled_report": in_window["reports"]["5"],
    }
    seen["compiled_again"] = apart(run(made())["kept"]["out"], compiled_plain["kept"]["out"])
    seen["again"] = apart(lab.good(graph("wan"))["kept"]["out"], plain)
    return seen


GROUP: dict[str, Check] = {
    "offloaded": offloaded(0.5),
    "offloaded_all": offloaded(1e-6),
    "offloaded_lora": offloaded(1e-6, lora=True),
    "stock_compile": stock_compile,
}
