"""The nodes and the pack's entry, against the stand-in."""

import asyncio
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from comfy_sage3.comfyui.install import hooks_of
from comfy_sage3.demo import load
from comfy_sage3.demo.load import weights_folder
from comfy_sage3.demo.prompts import embed
from comfy_sage3.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def nodes(comfy):
    from comfy_sage3.comfyui import nodes

    return nodes


def load_pack(name):
    """Load the repository the way ComfyUI loads a folder of custom_nodes: under a name made of its path."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_the_pack_loads_as_comfyui_loads_it(comfy, monkeypatch, tmp_path):
    sys.modules["folder_paths"].folders["user"] = [str(tmp_path)]
    for missing in ("gradio", "diffusers", "skimage", "matplotlib", "imageio"):
        monkeypatch.setitem(sys.modules, missing, None)  # importing it would raise
    name = "/somewhere/custom_nodes/comfy-sage3"
    try:
        pack = load_pack(name)
        assert not hasattr(pack, "NODE_CLASS_MAPPINGS")
        assert (ROOT / pack.WEB_DIRECTORY / "js" / "sage3_status.js").is_file()
        extension = asyncio.run(pack.comfy_entrypoint())
        found = asyncio.run(extension.get_node_list())
        schemas = [n.define_schema().options for n in found]
        assert {s["node_id"] for s in schemas} >= {
            "Sage3Attention", "Sage3Report", "Sage3DemoPrompt", "Sage3Compare", "Sage3PrecisionPlan", "Sage3LoadPlan",
        }  # fmt: skip
        assert found[0].__module__.startswith(name)
        for schema in schemas:
            assert (ROOT / "web" / "docs" / f"{schema['node_id']}.md").is_file()
    finally:
        for module in [m for m in sys.modules if m.startswith(name)]:
            del sys.modules[module]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_node_and_input_has_a_name_in_every_language(comfy, language, tmp_path):
    sys.modules["folder_paths"].folders["user"] = [str(tmp_path)]
    from comfy_sage3.comfyui import extension

    said = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    for node in asyncio.run(extension().get_node_list()):
        schema = node.define_schema().options
        inputs = said.pop(schema["node_id"])["inputs"]
        assert set(inputs) == {made.id for made in schema["inputs"]}
        assert all(text["name"] for text in inputs.values())
    assert said == {}


def test_the_bundled_weights_are_listed(nodes):
    nodes.register_weights()
    folders = sys.modules["folder_paths"].folders
    assert set(folders) == {"diffusion_models", "vae"}
    assert all((Path(p[0]) / "sage3_demo_wan.safetensors").is_file() for p in folders.values())


def test_altered_weights_are_not_offered(nodes, tmp_path, monkeypatch, caplog):
    for name in ("weights.json", "sage3_demo_wan.safetensors", "sage3_demo_vae.safetensors"):
        shutil.copy(weights_folder() / name, tmp_path)
    with (tmp_path / "sage3_demo_wan.safetensors").open("r+b") as file:
        file.seek(5000)
        file.write(b"altered")
    monkeypatch.setattr(load, "weights_folder", lambda: tmp_path)
    monkeypatch.setattr(nodes, "weights_folder", lambda: tmp_path)
    nodes.register_weights()
    assert sys.modules["folder_paths"].folders == {"vae": [str(tmp_path)]}
    (record,) = caplog.records
    assert "was altered" in record.getMessage()


def run_attention(nodes, comfy, **changes):
    settings = {
        "precision": "fp4",
        "start_percent": 0.0,
        "end_percent": 1.0,
        "min_tokens": 0,
        "emulate": True,
    }
    return nodes.Sage3Attention.execute(comfy.Patcher(), **(settings | changes)).args[0]


def test_attention_node_then_report_node(nodes, comfy):
    model = run_attention(nodes, comfy)
    latent = {"samples": torch.zeros(1)}
    model.sample([1.0, 0.5])
    out = nodes.Sage3Report.execute(model, latent)
    assert out.args[:2] == (model, latent)
    assert out.args[2].startswith("4 attention calls: 4 accelerated, 0 fell back")
    (hook,) = hooks_of(model)
    (run,) = out.ui.pop("sage3_run")
    assert out.ui == {"text": [out.args[2]], "sage3": hook.report.lines()}
    assert (run["node"], run["calls"], run["accelerated"], run["steps"], run["running"]) == ("7", 4, 4, 2, False)
    assert hook.node_id == "7"
    assert hook.prompt_id == "prompt-1"


def test_after_train_lora_the_report_has_the_losses(nodes, comfy):
    model = run_attention(nodes, comfy)
    model.sample([1.0])
    out = nodes.Sage3Report.execute(model, after={"loss": [0.5, 0.25, 0.125]})
    assert out.ui["sage3_loss"] == [0.5, 0.25, 0.125]
    assert out.args[2].endswith("\nLoss over 3 steps: 0.5 at first, 0.125 at last.")
    for other in ({"loss": []}, {"loss": "none"}, {"loss": ["0.5"]}, {}, [0.5]):
        assert "sage3_loss" not in nodes.Sage3Report.execute(model, after=other).ui


def test_report_of_a_model_without_the_node(nodes, comfy):
    assert "did not go through" in nodes.Sage3Report.execute(comfy.Patcher(), {}).args[2]


def test_unusable_settings_are_refused(nodes, comfy):
    validate = nodes.Sage3Attention.validate_inputs
    assert validate(start_percent=0.2, end_percent=0.8) is True
    assert validate() is True
    assert "after end_percent" in validate(start_percent=0.8, end_percent=0.2)
    with pytest.raises(InputError):
        run_attention(nodes, comfy, start_percent=0.8, end_percent=0.2)
    with pytest.raises(InputError, match="Unknown precision"):
        run_attention(nodes, comfy, precision="fp2")


def test_demo_prompt(nodes):
    ((tensor, extra),) = nodes.Sage3DemoPrompt.execute("a red circle").args[0]
    assert tensor.shape == (1, 11, 4096)
    assert torch.equal(tensor[0], embed("a red circle"))
    assert extra == {}
    validate = nodes.Sage3DemoPrompt.validate_inputs
    assert validate(text="a red circle") is True
    assert validate(text="") is True
    assert validate() is True
    assert "does not know the word 'dragon'" in validate(text="a red dragon")
    with pytest.raises(InputError, match="dragon"):
        nodes.Sage3DemoPrompt.execute("a red dragon")


def test_emulate_is_folded_away_where_comfyui_can(nodes):
    class New:
        def __init__(self, name, advanced=None):
            self.advanced = advanced

    class Old:
        def __init__(self, name):
            self.name = name

    assert nodes.advanced(New, "emulate").advanced is True
    assert nodes.advanced(Old, "emulate").name == "emulate"
