"""Runs inside a real ComfyUI's Python (see test_real.py): loads, calls and patches with ComfyUI's own code.

    python probe.py COMFYUI REPOSITORY OUT.npz

Prints one line of JSON with what it saw; OUT.npz gets the bundled transformer's output as loaded by ComfyUI.
"""

import json
import sys

comfyui, repository, out_path = sys.argv[1:4]
sys.path[:0] = [comfyui, repository]
sys.argv = ["main.py", "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.sd  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.modules import attention as backends  # noqa: E402

from comfy_sage3.attention import attention  # noqa: E402
from comfy_sage3.comfyui.hook import Hook  # noqa: E402
from comfy_sage3.comfyui.install import install  # noqa: E402
from comfy_sage3.comfyui.override import make_override  # noqa: E402
from comfy_sage3.demo.load import TRANSFORMER_FILE, weights_folder  # noqa: E402
from comfy_sage3.demo.prompts import embed  # noqa: E402
from comfy_sage3.precision import PrecisionPlan  # noqa: E402

torch.set_num_threads(1)
seen = {}


def hook(precision="fp4", emulate=True, **plan):
    return Hook(PrecisionPlan(precision, **plan), emulate=emulate)


def flat(t):
    return t.transpose(1, 2).flatten(2)


def options(given, previous=None):
    return {"optimized_attention_override": make_override(given, previous)}


g = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(2, 4, 48, 64, generator=g) for _ in range(3))
mask = torch.randn(48, 48, generator=g)
served = attention(q, k, v, precision="fp4", emulate=True)

# every registered back end: declined calls give exactly its own result, served calls give the door's
functions = dict(backends.REGISTERED_ATTENTION_FUNCTIONS)
functions["optimized"] = backends.optimized_attention
functions["masked"] = backends.optimized_attention_masked
seen["backends"] = {}
for name, function in sorted(functions.items()):
    if name in ("sage", "sage3", "flash", "xformers", "comfy_kitchen_int8"):
        continue  # need a GPU
    same = []
    for m in (None, mask):
        for split in (False, True):
            args = (q, k, v) if split else (flat(q), flat(k), flat(v))
            kwargs = {"mask": m, "skip_reshape": split}
            own = function(*args, 4, **kwargs)
            declined = function(*args, 4, **kwargs, transformer_options=options(hook(emulate=False)))
            same.append(torch.equal(own, declined))
            if m is None:
                ours = function(*args, heads=4, **kwargs, transformer_options=options(hook()))
                same.append(torch.equal(ours, flat(served)))
    seen["backends"][name] = all(same)

if hasattr(backends, "AttentionTensorContainer"):
    held = [backends.AttentionTensorContainer(t) for t in (q, k, v)]
    given = hook()
    out = backends.optimized_attention(
        *held, 4, skip_reshape=True, transformer_options=options(given), skip_output_reshape=True
    )
    seen["containers"] = torch.equal(out, served) and given.report.accelerated == 1

# the stock loader, its output, and the hook on a real model
path = weights_folder() / TRANSFORMER_FILE
model = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})
network = model.model.diffusion_model
x = torch.randn(1, 16, 3, 8, 8, generator=g)
context = embed("a large red circle moving left quickly on a black background")[None]
with torch.inference_mode():
    out = network(x, torch.tensor([700.0]), context=context, transformer_options={})
np.savez(out_path, x=x.numpy(), out=out.numpy(), timestep=700.0)

calls = []


def earlier(func, *args, **kwargs):
    calls.append(func)
    return func(*args, **kwargs)


model.model_options["transformer_options"]["optimized_attention_override"] = earlier
given = hook(min_tokens=16)
patched = install(model, given, lambda h: None, lambda: None).clone()
with torch.inference_mode():
    to = patched.model_options["transformer_options"]
    low = network(x, torch.tensor([700.0]), context=context, transformer_options=to)
seen["served"] = given.report.accelerated
seen["left"] = len(calls)
seen["relative_change"] = float((low - out).norm() / out.norm())

# gradients through the real model, as Train LoRA needs them; it sets the flag where there is one
comfy.model_management.in_training = True
given = hook("int8")
to = {"optimized_attention_override": make_override(given)}
x.requires_grad_()
network.requires_grad_(False)
network(x, torch.tensor([700.0]), context=context, transformer_options=to).sum().backward()
seen["grad"] = float(x.grad.norm())
seen["grad_kernels"] = sorted({line["kernel"] for line in given.report.lines()})

print(json.dumps(seen))
