"""Sage3 Compare: the numbers, the pictures it leaves, and what it says about input that cannot be compared."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from comfy_sage3 import metrics
from comfy_sage3.comfyui.frames import FrameFolder, shown
from comfy_sage3.errors import InputError


@pytest.fixture
def node(comfy, tmp_path):
    from comfy_sage3.comfyui import compare_node

    sys.modules["folder_paths"].folders["temp"] = [str(tmp_path)]
    return compare_node


def video(frames=4, height=24, width=32, seed=0):
    return torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(seed))


def spoilt(a):
    """``a`` with frame 1 left alone, and frame 2 changed most."""
    b = a.clone()
    for i, amount in enumerate((0.05, 0.0, 0.4, 0.1)):
        b[i] = (b[i] + amount * torch.sin(torch.arange(32.0))[None, :, None]).clamp(0, 1)
    return b


def run(node, a, b, **settings):
    """The output of one run -> (report, payload), the payload as the browser gets it."""
    out = node.Sage3Compare.execute(a, b, **settings)
    assert out.ui["text"] == [out.args[0]]
    (payload,) = json.loads(json.dumps(out.ui["sage3_compare"], allow_nan=False))
    return out.args[0], payload


def files(payload, side, temp):
    assert payload["files"]["type"] == "temp"
    return [temp / payload["files"]["subfolder"] / name for name in payload["files"][side]]


def test_the_numbers_are_those_of_the_8_bit_pictures(node):
    a = video()
    b = spoilt(a)
    report, found = run(node, a, b, fps=8.0, label_a="exact", label_b="fp4")
    eight = [(x.numpy() * 255).astype(np.uint8) for x in (a, b)]
    noise, structure = metrics.psnr(*eight), metrics.ssim(*eight)
    assert [x for x in found["psnr"] if x != "identical"] == pytest.approx(noise[[0, 2, 3]].tolist())
    assert found["psnr"][1] == "identical"
    assert found["ssim"] == pytest.approx(structure.tolist())
    assert (found["worst"], found["frames"], found["identical"]) == (2, 4, 1)
    assert found["mean_psnr"] == pytest.approx(noise[[0, 2, 3]].mean())
    assert (found["fps"], found["labels"], found["width"], found["height"]) == (8.0, ["exact", "fp4"], 32, 24)
    first, second, third = report.splitlines()
    mean = f"mean PSNR {found['mean_psnr']:.2f} dB, SSIM {structure.mean():.4f}"
    assert first == f"fp4 against exact, 4 frames of 32x24: {mean}"
    assert second == f"worst frame: 3, PSNR {noise[2]:.2f} dB, SSIM {structure[2]:.4f}"
    assert third == "1 of the frames are identical and not in the mean PSNR"


def test_the_pictures_are_the_frames(node, tmp_path):
    a = video()
    b = spoilt(a)
    _, found = run(node, a, b)
    assert found["shown"] == [0, 1, 2, 3]
    for side, images in (("a", a), ("b", b)):
        for path, image in zip(files(found, side, tmp_path), images, strict=True):
            with Image.open(path) as saved:
                assert np.array_equal(np.asarray(saved), (image.numpy() * 255).astype(np.uint8))


def test_one_still_of_four_channels(node):
    a = torch.cat([video(1), torch.zeros(1, 24, 32, 1)], dim=3)
    b = a.clone()
    b[..., :3] *= 0.9
    report, found = run(node, a, b)
    assert report.startswith("B against A, 1 frame of 32x24: PSNR ")
    assert "worst" not in report
    assert found["frames"] == 1


def test_identical_videos(node):
    report, found = run(node, video(), video())
    assert report == "B against A, 4 frames of 32x24: identical, to the last pixel"
    assert found["psnr"] == ["identical"] * 4
    assert found["mean_psnr"] == "identical"
    assert found["ssim"] == [1.0] * 4
    assert found["worst"] == 0


def test_frames_too_small_for_ssim_have_none(node):
    a, b = video(2, 8, 8), video(2, 8, 8, seed=1)
    report, found = run(node, a, b)
    assert found["ssim"] == [None, None]
    assert "SSIM" not in report


def test_broken_frames_are_black_and_said(node, tmp_path):
    a, b = video(), video()
    b[3, 0, 0, 0] = torch.nan
    report, found = run(node, a, b, label_b="fp4")
    (note,) = found["notes"]
    assert note.startswith("fp4: 1 of 4 frames hold NaN or infinity, the first is frame 4")
    assert note in report
    assert found["worst"] == 3
    with Image.open(files(found, "b", tmp_path)[3]) as saved:
        assert saved.getpixel((0, 0))[0] == 0


def test_every_frame_is_measured_and_so_many_are_shown(node, monkeypatch, tmp_path):
    monkeypatch.setattr(node, "shown", lambda count, worst: shown(count, worst, 5))
    a = video(30, 12, 12)
    b = a.clone()
    b[13] = 1 - b[13]
    report, found = run(node, a, b)
    assert len(found["psnr"]) == 30
    assert len(found["shown"]) == 5
    assert {0, 13, 29} <= set(found["shown"])
    assert len(files(found, "a", tmp_path)) == 5
    assert "5 of 30 are shown" in report


@pytest.mark.parametrize(("count", "worst"), [(1, 0), (5, 2), (6, 1), (1000, 0), (1000, 499), (1000, 999)])
def test_shown_frames_hold_the_ends_and_the_worst(count, worst):
    chosen = shown(count, worst, 5)
    assert len(chosen) == min(count, 5)
    assert {0, worst, count - 1} <= set(chosen)
    assert chosen == sorted(chosen)


def test_the_bar_counts_frames(node, comfy):
    run(node, video(), video())
    assert (comfy.ProgressBar.made[-1].total, comfy.ProgressBar.made[-1].done) == (4, 4)


def test_a_node_keeps_its_latest_two_runs(tmp_path):
    folders = []
    for _ in range(4):
        folder = FrameFolder("12:7", tmp_path)
        folder.save("a", 0, np.zeros((2, 2, 3), np.uint8))
        folders.append(tmp_path / folder.reference()["subfolder"])
    other = FrameFolder("8", tmp_path)
    assert [f.is_dir() for f in folders[-2:]] == [True, True]
    assert sum(f.is_dir() for f in folders) == 2
    assert (tmp_path / other.reference()["subfolder"]).is_dir()
    assert all(f.parent == tmp_path / "sage3_compare" / "12_7" for f in folders)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (video(4), video(3), "images_a is 4 frames of 32x24 and images_b 3 frames of 32x24: connect as many frames"),
        (video(1), video(1, 32, 24), "images_a is 1 frame of 32x24 and images_b 1 frame of 24x32"),
        (video()[0], video()[0], r"images_a is \(24, 32, 3\): connect a batch of colour images"),
        (video(), video()[..., :1], r"images_b is \(4, 24, 32, 1\): connect"),
        (video(), None, "images_b is NoneType: connect"),
        (video()[:0], video()[:0], r"images_a is \(0, 24, 32, 3\): connect"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_sentence(node, a, b, message):
    with pytest.raises(InputError, match=message) as refused:
        node.Sage3Compare.execute(a, b)
    assert "\n" not in str(refused.value)


def test_the_schema(node):
    schema = node.Sage3Compare.define_schema().options
    assert schema["is_output_node"] is True
    assert [x.id for x in schema["inputs"]] == ["images_a", "images_b", "fps", "label_a", "label_b"]
    assert Path(__file__).parents[2].joinpath("web", "docs", "Sage3Compare.md").is_file()
