"""A minimal stand-in for the parts of ComfyUI that the pack touches, written from their documented behaviour.

``attend`` calls a backend the way ComfyUI's models do: through a wrapper that looks for an override in
transformer_options once, and marks the call so that a backend calling another one does not look again.
"""

from __future__ import annotations

import functools
import json
import sys
import types
from typing import Any

import torch
import torch.nn.functional as F


class Container:
    """A tensor with one owner, as newer models pass q, k and v."""

    def __init__(self, tensor):
        self.tensor = tensor

    def peek(self):
        return self.tensor

    def take(self):
        tensor, self.tensor = self.tensor, None
        return tensor


def hooked(backend):
    """A backend as models see it."""

    @functools.wraps(backend)
    def call(*args, **kwargs):
        inside = "_inside_attn_wrapper" in kwargs
        override = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
        kwargs["_inside_attn_wrapper"] = True
        held = args[:3] if args and isinstance(args[0], Container) else ()
        if not inside and override is not None and held and hasattr(override, "container_function"):
            return override.container_function(*args, **kwargs)
        args = (*(c.take() for c in held), *args[len(held) :])
        if inside or override is None:
            return backend(*args, **kwargs)
        return override(backend, *args, **kwargs)

    return call


def sdpa(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    """A backend: PyTorch's attention behind the hook's arguments."""
    if not skip_reshape:
        head_dim = q.shape[-1] // heads
        q, k, v = (t.unflatten(-1, (-1, head_dim)).transpose(1, 2) for t in (q, k, v))
    while mask is not None and mask.ndim < 4:
        mask = mask.unsqueeze(0 if mask.ndim == 2 else 1)
    gqa = kwargs.get("enable_gqa", False)
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=kwargs.get("scale"), enable_gqa=gqa)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


attend = hooked(sdpa)


class Executor:
    """What a wrapper gets: the next callable, and the object whose method it wraps."""

    def __init__(self, function, class_obj=None):
        self.function = function
        self.class_obj = class_obj

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)


class Sampling:
    """Sigma falls linearly from 1 to 0 along the schedule, beyond all bounds at its ends as in ComfyUI."""

    def percent_to_sigma(self, percent):
        return 1e9 if percent <= 0 else 0.0 if percent >= 1 else 1.0 - percent


class Patcher:
    """A model with options, wrappers and attachments; one 'step' calls attention twice."""

    def __init__(self):
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list]] = {}
        self.attachments: dict[str, Any] = {}
        self.model_sampling = Sampling()

    def clone(self):
        import copy

        n = Patcher()
        n.model_options = copy.deepcopy(self.model_options)  # as 0.3.x does
        n.wrappers = {t: {k: list(w) for k, w in d.items()} for t, d in self.wrappers.items()}
        n.attachments = dict(self.attachments)
        return n

    def add_wrapper_with_key(self, kind, key, wrapper):
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def set_attachments(self, key, value):
        self.attachments[key] = value

    def get_attachment(self, key):
        return self.attachments.get(key)

    def run(self, kind, function, *args, class_obj=None):
        wrapped = function
        for wrapper in reversed([w for ws in self.wrappers.get(kind, {}).values() for w in ws]):
            wrapped = functools.partial(wrapper, Executor(wrapped, class_obj))
        return wrapped(*args)

    def sample(self, sigmas, tokens=96, calls=2, looks=1, options=None, callback=None, sampler=None, steps=True):
        """``calls`` attention calls for every sigma, in each of ``looks`` evaluations of it. Returns the last result.

        ``options`` changes the transformer_options that a step sees, as nodes that install themselves late do;
        ``steps=False`` is a sampler that never calls back.
        """
        sigmas = [*sigmas, 0.0]

        def step(x, t, c_concat, c_crossattn, control, transformer_options):
            for block in range(calls):
                q = k = v = torch.linspace(-1, 1, tokens * 32).reshape(1, tokens, 32)
                transformer_options["block_index"] = block
                x = attend(q, k, v, heads=2, transformer_options=transformer_options)
            return x

        def look(x, sigma):
            given = {**self.model_options["transformer_options"], **(options or {})}
            return self.run("apply_model", step, x, torch.tensor([sigma]), None, None, None, given, class_obj=self)

        def sampling(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar):
            out = None
            for i, sigma in enumerate(sigmas.tolist()[:-1]):
                for again in range(looks):
                    out = self.run("predict_noise", look, None, sigma)
                    if steps and again == 0 and callback is not None:
                        callback(i, out, None, len(sigmas) - 1)
            return out

        sampler = sampler or types.SimpleNamespace(sampler_function=sampling)  # as those of ComfyUI's own list have
        given = (None, None, sampler, torch.tensor(sigmas), None, callback, True)
        return self.run("outer_sample", sampling, *given, class_obj=self)


def modules() -> dict[str, types.ModuleType]:
    """The modules the pack imports, by name, fit for sys.modules."""

    def module(name, **names):
        made = types.ModuleType(name)
        made.__dict__.update(names)
        return made

    class Recorded:
        def __init__(self, *args, **options):
            self.id = args[0] if args else options.get("node_id")
            self.options = options

    def kind():
        return types.SimpleNamespace(Input=type("Input", (Recorded,), {}), Output=type("Output", (Recorded,), {}))

    kinds = {
        k: kind()
        for k in ("Model", "Combo", "Float", "Int", "Boolean", "Latent", "String", "Conditioning", "AnyType", "Image")
    }

    class NodeOutput:
        def __init__(self, *args, ui=None):
            self.args, self.ui = args, ui

    io = types.SimpleNamespace(
        ComfyNode=type("ComfyNode", (), {"hidden": types.SimpleNamespace(unique_id="7")}),
        Schema=type("Schema", (Recorded,), {}),
        Hidden=types.SimpleNamespace(unique_id="unique_id"),
        NodeOutput=NodeOutput,
        Custom=lambda name: kind(),
        **kinds,
    )

    class ComfyExtension:
        pass

    folders: dict[str, list[str]] = {}
    wrappers = types.SimpleNamespace(OUTER_SAMPLE="outer_sample", PREDICT_NOISE="predict_noise", APPLY_MODEL="apply_model")
    context = types.SimpleNamespace(prompt_id="prompt-1", node_id="7")
    return {
        "comfy": module("comfy"),
        "comfy.utils": module("comfy.utils", ProgressBar=ProgressBar),
        "comfy.samplers": module("comfy.samplers", KSampler=KSampler),
        "comfy.model_management": module(
            "comfy.model_management", throw_exception_if_processing_interrupted=KSampler.throw_if_interrupted
        ),
        "nodes": module("nodes", common_ksampler=KSampler.common),
        "aiohttp": module("aiohttp", web=types.SimpleNamespace(json_response=Answer)),
        "comfy.ldm": module("comfy.ldm"),
        "comfy.ldm.modules": module("comfy.ldm.modules", attention=types.SimpleNamespace(optimized_attention=attend)),
        "comfy.patcher_extension": module("comfy.patcher_extension", WrappersMP=wrappers),
        "comfy_api": module("comfy_api"),
        "comfy_api.latest": module(
            "comfy_api.latest",
            io=io,
            ComfyExtension=ComfyExtension,
        ),
        "comfy_execution": module("comfy_execution"),
        "comfy_execution.utils": module("comfy_execution.utils", get_executing_context=lambda: context),
        "folder_paths": module(
            "folder_paths",
            folders=folders,
            add_model_folder_path=lambda name, path: folders.setdefault(name, []).append(path),
            get_temp_directory=lambda: folders["temp"][0],
            get_user_directory=lambda: folders["user"][0],
        ),
        "server": module("server", PromptServer=Server),
    }


class ProgressBar:
    """Counts; ComfyUI's own raises out of ``update`` when the user cancels."""

    made: list[ProgressBar] = []

    def __init__(self, total):
        self.total, self.done = total, 0
        ProgressBar.made.append(self)

    def update(self, value):
        self.done += value


class Interrupted(Exception):
    """ComfyUI's InterruptProcessingException."""


class KSampler:
    """What ComfyUI's KSampler offers and runs; the user may have cancelled."""

    SAMPLERS, SCHEDULERS = ["euler", "heun"], ["simple", "normal"]
    interrupted = False

    @classmethod
    def throw_if_interrupted(cls):
        if cls.interrupted:
            raise Interrupted

    @staticmethod
    def common(model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent, denoise=1.0):
        """Sigmas fall evenly to 0; heun looks twice, euler once, each time at the step's own sigma."""
        sigmas = [1 - i / steps for i in range(steps)]
        out = model.sample(sigmas, latent["tokens"], looks=1 + (sampler_name == "heun"))
        return ({**latent, "samples": out},)


class Answer:
    """What a route answers: ``body`` is text that strict JSON can read."""

    def __init__(self, data, status=200):
        self.body, self.status = json.dumps(data, allow_nan=False), status


class Routes:
    """aiohttp's table: keeps the handlers by path."""

    def __init__(self):
        self.handlers: dict[str, Any] = {}

    def get(self, path):
        return lambda handler: self.handlers.setdefault(path, handler)


class Server:
    """PromptServer: keeps what was sent, and the routes."""

    instance: Server | None = None

    def __init__(self):
        self.sent: list[tuple[str, Any]] = []
        self.routes = Routes()

    def send_sync(self, event, data, sid=None):
        self.sent.append((event, data))


def install_modules(monkeypatch) -> None:
    """Put the stand-in in place of ComfyUI, with a server that listens, until the test ends."""
    for name, made in modules().items():
        monkeypatch.setitem(sys.modules, name, made)
    monkeypatch.setattr(Server, "instance", Server())
