"""A model of one layer and the smallest clips: an arm takes about a second."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comfy_sage3.demo import load
from comfy_sage3.training_study import arm as arm_module
from comfy_sage3.training_study import settings

sys.path.insert(0, str(Path(__file__).parent))  # for study_made_up.py


@pytest.fixture(scope="session")
def encoded(tmp_path_factory):
    """A folder for clips, so that they are encoded once."""
    return tmp_path_factory.mktemp("clips")


@pytest.fixture
def tiny(monkeypatch):
    """A setting of four steps from scratch."""
    pytest.importorskip("diffusers", reason="the bundled model's training code needs diffusers")
    torch.set_num_threads(1)  # bitwise the same on every machine
    config = {**load.TRANSFORMER_CONFIG, "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 64, "ffn_dim": 64}
    monkeypatch.setattr(load, "TRANSFORMER_CONFIG", config)
    monkeypatch.setattr(arm_module, "LOOKS", 2)
    made = next(s for s in settings.SETTINGS if s.name == "pretrain-few")
    return replace(made, size="32x32x5", steps=4, warmup=1, batch=2, clips=6, held_out=3, forms=("exact", "int8"), seeds=2)


@pytest.fixture
def store(tmp_path, encoded):
    from comfy_sage3.training_study.store import Store

    made = Store(tmp_path / "study")
    made.data = encoded
    return made
