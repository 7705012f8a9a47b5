"""The folder of results: whole or not there at all, lossless, and never over somebody else's files."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from PIL import Image

from comfy_sage3.compare import output
from comfy_sage3.compare.measure import compare
from comfy_sage3.errors import InputError


@pytest.fixture
def comparison(standin, request_, sides):
    return compare(standin, request_, *sides, repeats=1)


@pytest.fixture
def quick(monkeypatch):
    """The folder's own rules need no real plots."""
    for name in ("psnr_plot", "error_plot"):
        monkeypatch.setattr(output, name, lambda m: b"plot")
    monkeypatch.setattr(output, "report_html", lambda m, videos: "page")


def test_every_file_is_there_and_lossless(comparison, tmp_path):
    out = output.write(comparison, tmp_path / "deep" / "out")
    assert sorted(p.name for p in out.iterdir()) == [
        *("a", "a.webp", "attention_error.png", "b", "b.webp", "metrics.json", "psnr.png", "report.html"),
        "side_by_side.webp",
    ]
    assert json.loads((out / "metrics.json").read_text()) == comparison.metrics
    for key in ("a", "b"):
        stored = np.stack([np.asarray(Image.open(p)) for p in sorted((out / key).iterdir())])
        np.testing.assert_array_equal(stored, comparison.videos[key])
        big = output.enlarged(comparison.videos[key])
        with Image.open(out / f"{key}.webp") as animation:
            assert animation.n_frames == len(big)
            for i in range(animation.n_frames):
                animation.seek(i)
                np.testing.assert_array_equal(np.asarray(animation.convert("RGB")), big[i])
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_side_by_side_shows_a_left_and_b_right(comparison):
    a, b = (output.enlarged(comparison.videos[k]) for k in ("a", "b"))
    both = output.side_by_side(comparison.videos["a"], comparison.videos["b"])
    np.testing.assert_array_equal(both[:, :, : a.shape[2]], a)
    np.testing.assert_array_equal(both[:, :, -b.shape[2] :], b)
    assert a.shape[2] == 32 * 12  # whole pixels: nothing is blurred


def test_the_attention_plot_is_left_out_where_nothing_was_captured(standin, request_, sides, tmp_path):
    standin.inspects = False
    out = output.write(compare(standin, request_, *sides, repeats=1), tmp_path / "out")
    assert not (out / "attention_error.png").exists()
    assert (out / "report.html").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_nothing(comparison, quick, tmp_path, monkeypatch, error):
    def stop(*_):
        raise error

    monkeypatch.setattr(output, "report_html", stop)
    with pytest.raises(error):
        output.write(comparison, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_comparison_is_replaced_whole(comparison, quick, tmp_path):
    out = output.write(comparison, tmp_path / "out")
    (out / "a" / "9999.png").write_bytes(b"left over")
    output.write(comparison, out)
    assert not (out / "a" / "9999.png").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_earlier_comparison_survives_a_failed_replacement(comparison, quick, tmp_path, monkeypatch):
    out = output.write(comparison, tmp_path / "out")
    before = (out / "report.html").read_text()
    monkeypatch.setattr(output, "psnr_plot", lambda m: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        output.write(comparison, out)
    assert (out / "report.html").read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_earlier_comparison_comes_back_when_the_last_rename_fails(comparison, quick, tmp_path, monkeypatch):
    out = output.write(comparison, tmp_path / "out")
    rename = output.Path.rename

    def fail_into_place(self, target):
        if target == out and not self.name.endswith("-earlier"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(output.Path, "rename", fail_into_place)
    with pytest.raises(InputError, match="No space left on device"):
        output.write(comparison, out)
    assert (out / "report.html").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_other_files_is_refused(comparison, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="holds files that are not an earlier comparison's"):
        output.write(comparison, tmp_path)
    (tmp_path / "metrics.json").write_text('{"schema": "something else"}')
    with pytest.raises(InputError, match="holds files"):
        output.check_out(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_an_empty_folder_is_welcome(tmp_path):
    output.check_out(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match="is a file"):
        output.check_out(tmp_path / "out")
    with pytest.raises(InputError, match="Cannot write to"):
        output.check_out(tmp_path / "out" / "below")


def test_no_write_access_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(output.tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match=r"^Cannot write to .* \(Permission denied\): give a folder") as told:
        output.check_out(tmp_path / "out")
    assert "\n" not in str(told.value)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write everywhere")
def test_a_read_only_parent_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(InputError, match="Cannot write to"):
            output.check_out(tmp_path / "out")
    finally:
        tmp_path.chmod(0o755)
