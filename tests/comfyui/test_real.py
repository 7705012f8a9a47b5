"""The pack in a real ComfyUI: COMFYUI_PATH names a checkout, COMFYUI_PYTHON its Python."""

import json
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from compared import are_videos
from formats import as_the_editor_reads, as_the_server_gets
from given import LOADS_THE_BUNDLED_VAE, kind, version, warm_up

from comfy_sage3.errors import EngineError
from comfy_sage3.workflow import load_workflow, serve
from comfy_sage3.workflow.command import save
from comfy_sage3.workflow.server import find_python

ROOT = Path(__file__).resolve().parents[2]
LAYERS, STEPS = 6, 4
SIZE = {"width": 64, "height": 64, "length": 5}  # 32 tokens

if not os.environ.get("COMFYUI_PATH"):
    pytest.skip("COMFYUI_PATH is not set: no real ComfyUI to run the pack in", allow_module_level=True)

COMFYUI = Path(os.environ["COMFYUI_PATH"])
PYTHON = find_python(COMFYUI, Path(os.environ["COMFYUI_PYTHON"]) if os.environ.get("COMFYUI_PYTHON") else None)


@pytest.fixture(scope="module")
def client():
    with serve(COMFYUI, python=PYTHON) as made:
        warm_up(made)
        yield made


def workflow(name, **sage):
    """A shipped workflow at test size; ``sage`` changes the low-bit side's Sage3 Attention node."""
    made = load_workflow(ROOT / "workflows" / "api" / f"{name}.json")
    for node in made.values():
        if node["class_type"] == "EmptyHunyuanLatentVideo":
            node["inputs"] |= SIZE
        elif node["class_type"] == "KSampler":
            node["inputs"]["steps"] = STEPS
        elif node["class_type"] == "Sage3Attention" and node["inputs"]["precision"] != "exact":
            node["inputs"] |= {"min_tokens": 16} | sage
    return made


def run(client, made, tmp_path):
    entry = client.wait(client.submit(made), timeout=300)
    return entry, save(client, entry, tmp_path)


def latent(paths, side):
    from safetensors.torch import load_file

    (path,) = [p for p in paths if side in p.name]
    return load_file(path)["latent_tensor"]


def test_the_pack_registers(client):
    for node in ("Sage3Attention", "Sage3Report", "Sage3DemoPrompt"):
        info = client.object_info(node)[node]
        assert info["python_module"] == "custom_nodes.comfy-sage3"
    models = client.object_info("UNETLoader")["UNETLoader"]["input"]["required"]["unet_name"]
    assert "sage3_demo_wan.safetensors" in json.dumps(models)
    with client._open("/extensions") as answer:
        assert "/extensions/comfy-sage3/js/sage3_status.js" in json.load(answer)
    with client._open("/extensions/comfy-sage3/docs/Sage3Attention.md") as answer:
        assert answer.read() == (ROOT / "web/docs/Sage3Attention.md").read_bytes()


@pytest.mark.parametrize("name", ["text_to_video", "text_to_video_ab", "text_to_video_ab_latent"])
def test_editor_and_api_formats_agree(client, name):
    assert as_the_editor_reads(client, name) == as_the_server_gets(name)


def test_both_sides_run_and_report(client, tmp_path):
    steps = []
    made = workflow("text_to_video_ab_latent")
    prompt_id = client.submit(made)
    entry = client.wait(prompt_id, lambda *a: steps.append(a), timeout=300)
    paths = save(client, entry, tmp_path)
    exact, fp4 = client.texts(entry)["12"], client.texts(entry)["22"]
    total = 2 * LAYERS * STEPS  # self- and cross-attention; cond and uncond run as one batch
    assert exact.splitlines()[0] == f"{total} attention calls: 0 accelerated, 0 fell back, {total} left exact"
    half = total // 2
    assert fp4.splitlines()[0] == f"{total} attention calls: {half} accelerated, 0 fell back, {half} left exact"
    assert f"{half} x exact: fewer than 16 tokens" in fp4
    lines = entry["outputs"]["22"]["sage3"]
    assert {(kind(x["kernel"]), x["calls"], x["fell_back"]) for x in lines} == {("fp4", half, False), ("exact", half, False)}
    (kernel,) = {x["kernel"] for x in lines} - {"exact"}  # fp4-emulated on a CPU; a GPU may have a kernel of its own
    assert f"{half} x {kernel}" in fp4
    a, b = latent(paths, "exact"), latent(paths, "fp4")
    assert a.isfinite().all()
    assert b.isfinite().all()
    assert not torch.equal(a, b)
    assert (a - b).norm() / a.norm() < 0.5
    assert any(maximum == STEPS for _, _, maximum in steps)


def test_the_exact_side_is_comfyuis_own_result_bit_for_bit(client, tmp_path):
    made = workflow("text_to_video_ab_latent")
    made["21"]["inputs"]["model"] = ["2", 0]  # past the node altogether
    _, paths = run(client, made, tmp_path)
    assert torch.equal(latent(paths, "exact"), latent(paths, "fp4"))


def test_the_window_counts_steps(client, tmp_path):
    entry, _ = run(client, workflow("text_to_video_ab_latent", end_percent=0.5, min_tokens=0), tmp_path)
    text = client.texts(entry)["22"]
    outside = [line for line in text.splitlines() if "outside the window 0% to 50%" in line]
    assert len(outside) == 1
    left = int(outside[0].split()[0])
    assert left % (2 * LAYERS) == 0
    assert 0 < left < 2 * LAYERS * STEPS


def test_without_emulation_this_machine_falls_back_or_accelerates(client, tmp_path):
    entry, paths = run(client, workflow("text_to_video_ab_latent", emulate=False), tmp_path)
    text, (told,) = client.texts(entry)["22"], entry["outputs"]["22"]["sage3_run"]
    exact, low = latent(paths, "exact"), latent(paths, "fp4")
    kinds = {kind(x["kernel"]) for x in told["lines"]}
    if kinds == {"exact"}:
        assert "fp4 needs" in text or "fp4 and int8 need" in text, text
        assert torch.equal(exact, low), text
    else:
        assert len(kinds & {"fp4", "int8"}) == 1, text
        assert told["accelerated"] + told["fell_back"] == LAYERS * STEPS, text  # to 8 bits, where those run and 4 do not
        assert 0 < (exact - low).norm() / exact.norm() < 0.5, text


def test_videos(client, tmp_path):
    made = workflow("text_to_video_ab")
    if version() < LOADS_THE_BUNDLED_VAE:
        with pytest.raises(EngineError, match=r"Node 6 \(VAELoader\) failed: .*size mismatch"):
            run(client, made, tmp_path)
        return
    entry, paths = run(client, made, tmp_path)
    from PIL import Image

    for path in (p for p in paths if p.suffix == ".webp"):
        with Image.open(path) as video:
            assert (video.size, video.n_frames) == ((64, 64), 5)
    (found,) = entry["outputs"]["30"]["sage3_compare"]
    assert (found["frames"], found["width"], found["labels"]) == (5, 64, ["exact", "fp4"])
    assert all(10 < x < 100 for x in found["psnr"])
    assert found["psnr"][found["worst"]] == min(found["psnr"])
    assert client.texts(entry)["30"].startswith("fp4 against exact, 5 frames of 64x64: mean PSNR ")
    are_videos(client, "30", found)
    exact, fp4 = (entry["outputs"][node]["sage3_run"][0] for node in ("12", "22"))
    half = LAYERS * STEPS
    assert (exact["calls"], exact["accelerated"], exact["fell_back"]) == (2 * half, 0, 0)
    assert (fp4["calls"], fp4["accelerated"], fp4["fell_back"]) == (2 * half, half, 0)


def test_text_to_video_has_sage3_attention_as_a_new_node_comes(client):
    given = dict(load_workflow(ROOT / "workflows" / "api" / "text_to_video.json")["7"]["inputs"])
    assert given.pop("model") == ["2", 0]
    spec = client.object_info("Sage3Attention")["Sage3Attention"]["input"]
    known = spec["required"] | spec["optional"]
    assert set(known) == {*given, "model", "plan"}
    assert given == {name: known[name][1]["default"] for name in given}


@pytest.mark.parametrize("precision", [None, "fp4", "int8"])
def test_text_to_video(client, tmp_path, precision):
    """As it is but for fewer steps, its calls being long enough for the node's defaults; small for a given precision."""
    made = load_workflow(ROOT / "workflows" / "api" / "text_to_video.json")
    least, shape = 1024, (17, 256, 256, 3)
    if precision is not None:
        least, shape = 16, (5, 64, 64, 3)
        made["7"]["inputs"] |= {"precision": precision, "emulate": True, "min_tokens": least}
        made["5"]["inputs"] |= SIZE
    made["8"]["inputs"]["steps"] = STEPS
    made["12"] = {"class_type": "SaveLatent", "inputs": {"samples": ["9", 1], "filename_prefix": "sage3/video"}}
    if version() < LOADS_THE_BUNDLED_VAE:
        del made["6"], made["10"], made["11"]
    entry, paths = run(client, made, tmp_path)
    (told,) = entry["outputs"]["9"]["sage3_run"]
    half = LAYERS * STEPS  # self-attention; cross-attention is the other half
    counts = told["calls"], told["accelerated"], told["fell_back"], told["exact"]
    by_kind = {(kind(x["kernel"]), x["reason"].split(":")[0]): x["calls"] for x in told["lines"]}
    assert by_kind.pop(("exact", f"fewer than {least} tokens")) == half
    ((served, reason), calls) = by_kind.popitem()
    assert (calls, by_kind) == (half, {})
    if precision is not None:
        assert served == precision
    elif served == "exact":
        assert reason.startswith("auto")  # no kernel, or none that is faster at this length
    assert counts == ((2 * half, 0, 0, 2 * half) if served == "exact" else (2 * half, half, 0, half))
    assert (told["step"], told["steps"], told["running"]) == (STEPS, STEPS, False)
    assert client.texts(entry)["9"].splitlines()[0] == (
        f"{2 * half} attention calls: {counts[1]} accelerated, 0 fell back, {counts[3]} left exact"
    )
    assert latent(paths, "12_").isfinite().all()
    if "11" in made:
        (path,) = [p for p in paths if p.suffix == ".webp"]
        shown = frames_of(path)
        assert shown.shape == shape
        assert (shown.std(axis=(1, 2, 3)) > 3).all()
        assert (np.abs(np.diff(shown, axis=0)).mean(axis=(1, 2, 3)) > 0.1).all()


def frames_of(path):
    """(F, H, W, 3), 0 to 255."""
    from PIL import Image, ImageSequence

    with Image.open(path) as video:
        return np.stack([np.asarray(frame.convert("RGB"), float) for frame in ImageSequence.Iterator(video)])


def test_an_unknown_word_is_refused_before_anything_runs(client):
    made = workflow("text_to_video_ab_latent")
    made["3"]["inputs"]["text"] = "a red dragon"
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"node 3 \(Sage3DemoPrompt\).*does not know the word 'dragon'"):
        client.submit(made)
    assert time.monotonic() - started < 10


def test_a_failing_node_is_named(client):
    made = workflow("text_to_video_ab_latent")
    made["3"] = made["4"] = {
        "class_type": "LotusConditioning",
        "inputs": {},
    }  # 1024 wide; the model wants 4096
    with pytest.raises(EngineError, match=r"^Node \d1 \(KSampler\) failed: RuntimeError: "):
        client.wait(client.submit(made), timeout=300)


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    out = tmp_path_factory.mktemp("probe") / "out.npz"
    script = Path(__file__).with_name("probe.py")
    command = [str(PYTHON), str(script), str(COMFYUI), str(ROOT), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=COMFYUI, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1]), np.load(out)


def test_every_backend_of_comfyui(probe):
    seen, _ = probe
    assert {"optimized", "masked", "pytorch"} <= set(seen["backends"])
    assert all(seen["backends"].values()), seen["backends"]
    assert seen.get("containers", True)


def test_a_real_model_under_the_hook(probe):
    seen, _ = probe
    assert (seen["served"], seen["left"]) == (
        LAYERS,
        LAYERS,
    )  # self-attention served, cross-attention passed on
    assert 0 < seen["relative_change"] < 0.2
    assert seen["grad"] > 0
    assert seen["grad_kernels"] == ["int8-emulated"]


def test_the_stock_loader_agrees_with_diffusers(probe):
    pytest.importorskip("diffusers")
    from comfy_sage3.demo.load import load_transformer
    from comfy_sage3.demo.prompts import embed

    _, saved = probe
    transformer = load_transformer()
    context = embed("a large red circle moving left quickly on a black background")[None]
    with torch.inference_mode():
        out = transformer(
            hidden_states=torch.from_numpy(saved["x"]),
            timestep=torch.tensor([float(saved["timestep"])]),
            encoder_hidden_states=context,
            return_dict=False,
        )[0]
    assert (out - torch.from_numpy(saved["out"])).abs().max() < 5e-5
