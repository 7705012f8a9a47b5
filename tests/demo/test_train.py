"""The training script end to end, at toy sizes: it must run, checkpoint, resume, export and score."""

import argparse
import json

import pytest
import torch

from comfy_sage3.demo import load, train
from comfy_sage3.demo.sizes import CPU_SIZE, GPU_SIZE

pytest.importorskip("diffusers", reason="the training script needs diffusers")


@pytest.fixture
def toy(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "VAE_BATCHES", {kind: (1, 5, 32) for kind in train.VAE_BATCHES})
    sets = {train.SMALL_SIZE: (4, 2), CPU_SIZE: (1, 1), GPU_SIZE: (1, 1)}
    monkeypatch.setattr(train, "LATENT_SETS", {train.SMALL_SIZE: sets[train.SMALL_SIZE]})
    monkeypatch.setattr(train, "SCORED", {train.SMALL_SIZE: (2, 2)})
    monkeypatch.setattr(train, "RECONSTRUCTED", {train.SMALL_SIZE: 2})
    monkeypatch.setattr(train, "FOLDED", {train.SMALL_SIZE: 2})
    monkeypatch.setattr(train, "_phase", lambda progress, step: train.SMALL_SIZE)

    def run(stage, seconds=0.5, budget=1e9):
        args = argparse.Namespace(stage=stage, out=tmp_path, budget=budget, slice=seconds, device="cpu", no_compile=True)
        return train.run(args)

    return run, tmp_path


def test_every_stage_runs_resumes_and_exports(toy):
    run, folder = toy
    run("vae")
    run("vae")  # resumes from the checkpoint
    run("transformer")
    run("score")
    card = json.loads((folder / load.CARD_FILE).read_text())
    assert set(card["files"]) == {load.VAE_FILE, load.TRANSFORMER_FILE}
    steps = [row["step"] for row in card["files"][load.VAE_FILE]["curve"]]
    assert steps == sorted(set(steps))
    scores = card["scores"]["sizes"][str(train.SMALL_SIZE)]
    assert scores["prompts"] == 2
    assert scores["scorer_on_truth"]["colour"] == 1.0


def test_without_a_checkpoint_training_goes_on_from_the_exported_weights(toy):
    run, folder = toy
    for stage, name in (("vae", load.VAE_FILE), ("transformer", load.TRANSFORMER_FILE)):
        run(stage)
        (folder / f"{stage}.checkpoint.safetensors").unlink()
        first = json.loads((folder / load.CARD_FILE).read_text())["files"][name]
        run(stage)
        second = json.loads((folder / load.CARD_FILE).read_text())["files"][name]
        assert second["curve"][: len(first["curve"])] == first["curve"]
        assert second["curve"][-1]["step"] > first["curve"][-1]["step"]
        assert [s["steps"] > 0 for s in second["slices"]] == [True, True]
        assert second["sha256"] != first["sha256"]


def test_folding_the_statistics_changes_no_pixel_and_standardises_the_latents(monkeypatch):
    monkeypatch.setattr(train, "FOLDED", {train.SMALL_SIZE: 16})
    torch.manual_seed(0)
    vae = load.new_vae().eval()
    generator = torch.Generator().manual_seed(0)
    labels = train.random_labels(2, generator)
    video = train.render_labels(labels, 5, 32, 32, generator)

    def round_trip():
        with torch.no_grad():
            z = train.fast_vae.encode(vae, video)[0]
            return z, train.fast_vae.decode(vae, z)

    _, before = round_trip()
    train.fold_statistics(vae, "cpu")
    _, after = round_trip()
    assert torch.allclose(before, after, atol=1e-4)
    same = torch.Generator().manual_seed(1)
    labels = train.random_labels(16, same)
    z = train.encoded(vae, labels, train.SMALL_SIZE, same)
    mean, std = train.latent_statistics(vae, z)
    standard = (z - mean) / std
    flat = standard.transpose(0, 1).flatten(1)
    assert torch.allclose(flat.mean(1), torch.zeros(16), atol=1e-3)
    assert torch.allclose(flat.std(1), torch.ones(16), atol=1e-3)
