"""Train LoRA in a real ComfyUI, on the bundled model: gradients run in 8 bits, and the LoRA becomes what it becomes without.

On a GPU with a kernel for them that serves the calls, elsewhere they are emulated; the counts are the same.
"""

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
STEPS, LAYERS = 12, 6


@pytest.fixture(scope="module")
def client():
    with serve(COMFYUI, python=PYTHON) as made:
        outputs = made.object_info("TrainLoraNode")["TrainLoraNode"]["output"]
        if outputs[0] != "LORA_MODEL":
            pytest.skip(f"this ComfyUI's Train LoRA gives {outputs[0]} first: the workflow is for those that give the LoRA")
        yield made


def workflow(checkpointing=False, steps=STEPS, **sage):
    """Train on a flat latent, then sample with the LoRA and without."""

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
            steps=steps, learning_rate=0.003, rank=4, optimizer="AdamW", loss_function="MSE", seed=1, training_dtype="fp32",
            lora_dtype="fp32", quantized_backward=False, algorithm="LoRA", gradient_checkpointing=checkpointing,
            checkpoint_depth=1, offloading=False, existing_lora="[None]", bucket_mode=False, bypass_mode=False,
        ),
        "7": node("Sage3Report", model=["2", 0], after=["6", 1]),
        "8": node("LoraModelLoader", model=["1", 0], lora=["6", 0], strength_model=1.0, bypass=False),
        "9": node("KSampler", model=["8", 0], **sample),
        "10": node("SaveLatent", samples=["9", 0], filename_prefix="trained"),
        "11": node("KSampler", model=["1", 0], **sample),
        "12": node("SaveLatent", samples=["11", 0], filename_prefix="plain"),
    }  # fmt: skip


class Outcome:
    """One run of the workflow: what Sage3 Report says, its run and losses, the latents of the two samplings by name."""

    def __init__(self, client, made, folder):
        from safetensors.torch import load_file

        folder.mkdir()
        entry = client.wait(client.submit(made), timeout=600)
        shown = entry["outputs"]["7"]
        self.text, self.told, self.losses = shown["text"][0], shown["sage3_run"][0], shown["sage3_loss"]
        saved = [p for p in save(client, entry, folder) if p.suffix == ".latent"]
        self.latents = {p.name.split("_")[1]: load_file(p)["latent_tensor"] for p in saved}
        self.learnt = self.latents["trained"] - self.latents["plain"]
        self.forward = sum(x["calls"] for x in self.told["lines"] if x["kernel"].startswith("int8"))
        self.backward = sum(n for kernel, n in self.told["gradients"].items() if kernel.startswith("int8"))


@pytest.fixture(scope="module")
def outcomes(client, tmp_path_factory):
    """Both from the same LoRA: Train LoRA draws it from torch's global generator, which the sampling before has seeded."""
    folder = tmp_path_factory.mktemp("trained")
    Outcome(client, workflow(precision="exact", steps=1), folder / "before")
    return {precision: Outcome(client, workflow(precision=precision), folder / precision) for precision in ("int8", "exact")}


def test_every_layers_attention_runs_in_8_bits_forward_and_backward(outcomes):
    eight, exact = outcomes["int8"], outcomes["exact"]
    assert (eight.forward, eight.backward) == (STEPS * LAYERS, STEPS * LAYERS), eight.text
    assert eight.told["fell_back"] == 0, eight.text
    assert f"Gradients in 8 bits: {STEPS * LAYERS} x int8-" in eight.text
    assert (exact.forward, exact.backward) == (0, 0), exact.text


def test_the_loss_is_that_of_exact_training_within_two_percent(outcomes):
    """Of all steps together: one step's loss, of one noise, moves more when anything in the steps before is rounded."""
    eight, exact = outcomes["int8"].losses, outcomes["exact"].losses
    assert len(eight) == len(exact) == STEPS
    assert eight != exact
    assert sum(eight) == pytest.approx(sum(exact), rel=0.02)
    assert f"Loss over {STEPS} steps: {eight[0]:.4g} at first, {eight[-1]:.4g} at last." in outcomes["int8"].text


def test_time_and_the_most_memory_are_reported(outcomes):
    for outcome in outcomes.values():
        told = outcome.told["training"]
        assert 0.1 < told["seconds"] < 600
        assert f"Training took {told['seconds']:.1f} s" in outcome.text
        if told["peak_bytes"] is None:
            assert told["device"] == "cpu"  # and not Linux, or a container that forbids asking
        else:
            assert 8e6 * 4 < told["peak_bytes"] < 64e9  # the model's own parameters, and a machine's memory
            assert f"at most {told['peak_bytes'] / 2**20:.0f} MiB" in outcome.text


def test_the_lora_loads_and_draws_the_video_towards_what_it_was_trained_on(outcomes):
    """That is a flat latent, all zeros."""
    for outcome in outcomes.values():
        assert outcome.latents["trained"].isfinite().all()
        assert outcome.latents["trained"].norm() < 0.9 * outcome.latents["plain"].norm()
    learnt, want = outcomes["int8"].learnt, outcomes["exact"].learnt
    assert torch.equal(outcomes["int8"].latents["plain"], outcomes["exact"].latents["plain"])
    assert torch.cosine_similarity(learnt.flatten(), want.flatten(), 0) > 0.98
    assert 0 < (learnt - want).norm() / want.norm() < 0.2


def test_with_checkpointing_the_forward_pass_runs_twice_and_the_backward_once(client, tmp_path):
    outcome = Outcome(client, workflow(checkpointing=True, steps=2), tmp_path / "checkpointed")
    assert (outcome.forward, outcome.backward) == (2 * 2 * LAYERS, 2 * LAYERS), outcome.text
    assert outcome.learnt.norm() > 0


def test_what_no_kernel_serves_trains_exactly_and_the_report_says_so(client, tmp_path):
    outcome = Outcome(client, workflow(emulate=False, min_tokens=4096, steps=2), tmp_path / "exact")
    assert "Gradients in 8 bits: none." in outcome.text
    assert "fewer than 4096 tokens" in outcome.text
    assert outcome.told["accelerated"] == 0
    assert outcome.learnt.norm() > 0
