"""Train LoRA in a real ComfyUI, on the bundled model: gradients arrive, and the report says through what they ran."""

import os
from pathlib import Path

import pytest
import torch

from comfy_sage3.workflow import serve
from comfy_sage3.workflow.command import save
from comfy_sage3.workflow.server import find_python

if not os.environ.get("COMFYUI_PATH"):
    pytest.skip("COMFYUI_PATH is not set: no real ComfyUI to train in", allow_module_level=True)

COMFYUI = Path(os.environ["COMFYUI_PATH"])
PYTHON = find_python(COMFYUI, Path(os.environ["COMFYUI_PYTHON"]) if os.environ.get("COMFYUI_PYTHON") else None)
STEPS, LAYERS = 2, 6


@pytest.fixture(scope="module")
def client():
    with serve(COMFYUI, python=PYTHON) as made:
        outputs = made.object_info("TrainLoraNode")["TrainLoraNode"]["output"]
        if outputs[0] != "LORA_MODEL":
            pytest.skip(f"this ComfyUI's Train LoRA gives {outputs[0]} first: the workflow is for those that give the LoRA")
        yield made


def workflow(**sage):
    """Train two steps on a flat latent, then sample with the LoRA and without."""

    def node(kind, **inputs):
        return {"class_type": kind, "inputs": inputs}

    sage = {"precision": "int8", "min_tokens": 16, "emulate": True} | sage
    sample = {
        "seed": 1, "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
        "positive": ["4", 0], "negative": ["4", 0], "latent_image": ["5", 0],
    }  # fmt: skip
    return {
        "1": node("UNETLoader", unet_name="sage3_demo_wan.safetensors", weight_dtype="default"),
        "2": node("Sage3TrainingAttention", model=["1", 0], **sage),
        "4": node("Sage3DemoPrompt", text="a large red circle moving left quickly on a black background"),
        "5": node("EmptyHunyuanLatentVideo", width=64, height=64, length=5, batch_size=1),
        "6": node(
            "TrainLoraNode", model=["2", 0], latents=["5", 0], positive=["4", 0], batch_size=1, grad_accumulation_steps=1,
            steps=STEPS, learning_rate=0.01, rank=4, optimizer="AdamW", loss_function="MSE", seed=1, training_dtype="fp32",
            lora_dtype="fp32", quantized_backward=False, algorithm="LoRA", gradient_checkpointing=False,
            checkpoint_depth=1, offloading=False, existing_lora="[None]", bucket_mode=False, bypass_mode=False,
        ),
        "7": node("Sage3Report", model=["2", 0], after=["6", 1]),
        "8": node("LoraModelLoader", model=["1", 0], lora=["6", 0], strength_model=1.0, bypass=False),
        "9": node("KSampler", model=["8", 0], **sample),
        "10": node("SaveLatent", samples=["9", 0], filename_prefix="trained"),
        "11": node("KSampler", model=["1", 0], **sample),
        "12": node("SaveLatent", samples=["11", 0], filename_prefix="plain"),
    }  # fmt: skip


def run(client, made, tmp_path):
    """(what the report node says, its run, the latents of the two samplings by name)"""
    from safetensors.torch import load_file

    entry = client.wait(client.submit(made), timeout=300)
    saved = [p for p in save(client, entry, tmp_path) if p.suffix == ".latent"]
    latents = {p.name.split("_")[1]: load_file(p)["latent_tensor"] for p in saved}
    shown = entry["outputs"]["7"]
    return shown["text"][0], shown["sage3_run"][0], latents


def test_a_lora_learns_through_8_bits_as_it_does_through_exact_attention(client, tmp_path):
    outcome = {}
    for precision in ("int8", "exact"):
        folder = tmp_path / precision
        folder.mkdir()
        text, told, latents = run(client, workflow(precision=precision), folder)
        outcome[precision] = latents["trained"] - latents["plain"]
        assert latents["trained"].isfinite().all()
        if precision == "int8":
            kernels = {x["kernel"] for x in told["lines"]}
            assert "int8-emulated" in kernels, text
            assert told["fell_back"] == 0, text
            assert told["accelerated"] >= STEPS * LAYERS, text
    learnt, want = outcome["int8"], outcome["exact"]
    assert want.norm() > 0
    assert torch.cosine_similarity(learnt.flatten(), want.flatten(), 0) > 0.98
    assert 0 < (learnt - want).norm() / want.norm() < 0.2


def test_without_a_kernel_the_gradients_are_exact_and_the_report_says_so(client, tmp_path):
    text, told, latents = run(client, workflow(emulate=False), tmp_path)
    assert "gradients run through exact attention" in text
    assert told["accelerated"] == 0
    assert (latents["trained"] - latents["plain"]).norm() > 0
