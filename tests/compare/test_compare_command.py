"""The command: the whole way once, and every refusal in one sentence."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal

import pytest

from comfy_sage3.cli import main
from comfy_sage3.compare import command
from comfy_sage3.compare.engine import EMULATED_NOTE

pytest.importorskip("diffusers")
# 8 tokens: without --min-tokens 0 they would all stay exact.
SMALL = ["--size", "32x32x5", "--steps", "2", "--repeats", "2", "--device", "cpu", "--min-tokens", "0"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One real comparison, with what it printed."""
    out = tmp_path_factory.mktemp("compare") / "out"
    with pytest.MonkeyPatch.context() as patch:
        told, warned = io.StringIO(), io.StringIO()
        patch.setattr("sys.stdout", told)
        patch.setattr("sys.stderr", warned)
        status = main(
            [
                "compare",
                "--prompt",
                "a small blue square standing still",
                "--seed",
                "5",
                "--out",
                str(out),
                *SMALL,
            ]
        )
    assert status == 0, warned.getvalue()
    return out, told.getvalue(), warned.getvalue()


def test_it_writes_the_results_and_says_where(ran):
    out, told, _ = ran
    assert str(out / "report.html") in told
    m = json.loads((out / "metrics.json").read_text())
    assert m["request"]["prompt"] == "a small blue square standing still"
    assert (m["request"]["seed"], m["request"]["steps"], m["timing"]["order"]) == (5, 2, "ABAB")
    assert [m["sides"][k]["precision"] for k in "ab"] == ["exact", "fp4"]
    assert m["quality"]["replay"]["summary"]["self"]["b"]["cosine"] > 0.9
    assert len(list((out / "a").iterdir())) == 5


def test_emulation_is_said_and_no_ratio_is_shown(ran):
    out, told, _ = ran
    assert EMULATED_NOTE in told
    page = (out / "report.html").read_text()
    assert EMULATED_NOTE in page
    assert json.loads((out / "metrics.json").read_text())["note"] == EMULATED_NOTE
    for text in (told, page, (out / "metrics.json").read_text()):
        assert "as fast as A" not in text
        assert "faster" not in text


def test_progress_is_one_line_per_piece_of_work_in_a_log(ran):
    lines = ran[2].splitlines()
    doing = [line[6:] for line in lines]
    assert doing[:6] == [
        *("warming up A (exact)", "warming up B (fp4)"),
        *("A (exact), run 1 of 2", "B (fp4), run 1 of 2", "A (exact), run 2 of 2", "B (fp4), run 2 of 2"),
    ]
    assert lines[-1].startswith("100%  done in ")


def test_the_bar_on_a_terminal_stays_on_one_line():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    bar = command.Bar(stream)
    bar(0.0, "first")
    bar(0.5, "x" * 200)
    bar.done()
    bar.close()
    drawn = stream.getvalue().split("\r")[1:]
    assert all(len(line.rstrip("\n")) == 79 for line in drawn)
    assert stream.getvalue().count("\n") == 1
    assert drawn[1].startswith("[###############...............]  50%")


@pytest.mark.parametrize(
    ("arguments", "shift"),
    [(["--size", "cpu"], 3.0), (["--size", "gpu"], 7.0), (["--size", "gpu", "--shift", "4"], 4.0)],
)
def test_the_shift_follows_the_size_unless_it_is_given(arguments, shift):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command._request(parser.parse_args(arguments)).shift == shift
    assert "3 below 2,048 tokens and 7 from there" in " ".join(parser.format_help().split())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--a", "fp3"], "Unknown precision 'fp3'"),
        (["--b", "fp8"], "Unknown precision 'fp8'"),
        (["--size", "100x100x5"], "width is 100"),
        (["--size", "32x32x6"], "number of frames is 6"),
        (["--size", "big"], "Cannot read the size 'big'"),
        (["--steps", "0"], "number of steps is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--device", "abacus"], "Unknown device 'abacus'"),
        (["--min-tokens", "-1"], "min_tokens is -1"),
        (["--repeats", "0"], "number of repeats is 0"),
        (["--prompt", "a red unicorn"], "does not know the word 'unicorn'"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(arguments, sentence, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", "--out", str(out), *SMALL, *arguments]) == 2
    told = capsys.readouterr()
    assert sentence in told.err
    assert told.err.count("error:") == 1
    assert "Traceback" not in told.err
    assert list(tmp_path.iterdir()) == []


def test_an_unusable_out_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "_engine", lambda args: pytest.fail("work began"))
    (tmp_path / "file").write_text("")
    assert main(["compare", "--out", str(tmp_path / "file"), *SMALL]) == 2
    assert main(["compare", "--out", str(tmp_path), *SMALL]) == 2
    assert capsys.readouterr().err.count("error:") == 2


@pytest.fixture
def listening():
    """SIGINT raises KeyboardInterrupt, also where the suite is a shell's background job, which ignores it."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
@pytest.mark.usefixtures("listening")
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, capsys, signal_name):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(
        command.Bar,
        "__call__",
        lambda self, fraction, doing: os.kill(os.getpid(), getattr(signal, signal_name)),
    )
    assert main(["compare", "--out", str(tmp_path / "out"), *SMALL]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_by_default_short_calls_stay_exact_and_that_is_said(tmp_path, capsys):
    out = tmp_path / "out"
    small = ["--size", "64x64x17", "--steps", "1", "--repeats", "1", "--device", "cpu"]  # 80 tokens
    assert main(["compare", "--out", str(out), *small]) == 0
    m = json.loads((out / "metrics.json").read_text())
    side = m["sides"]["b"]
    assert (side["min_tokens"], side["calls"], side["kept_exact"], side["fell_back"]) == (64, 24, 12, False)
    assert {(x["kernel"], x["reason"]) for x in side["report"] if x["wished"] == "exact"} == {
        ("exact", "fewer than 64 tokens")
    }
    errors = {kind: m["quality"]["replay"]["summary"][kind] for kind in ("self", "cross")}
    assert errors["cross"]["b"] == errors["cross"]["floor"]
    assert errors["self"]["b"]["relative_l1"] > 1e-3
    assert "12 of 24 calls were kept exact by --min-tokens 64" in capsys.readouterr().out


def test_emulation_can_be_switched_off(tmp_path, capsys):
    out = tmp_path / "out"
    small = ["--size", "16x16x5", "--steps", "1", "--repeats", "1", "--device", "cpu", "--min-tokens", "0"]
    assert main(["compare", "--no-emulate", "--out", str(out), *small]) == 0
    assert "Side B did not run as fp4 throughout" in capsys.readouterr().out
    side = json.loads((out / "metrics.json").read_text())["sides"]["b"]
    assert (side["emulated"], side["fell_back"]) == (False, True)
