"""The benchmark of attention without a GPU: arithmetic, shapes, verdicts, pages, and who is named when absent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import attention, bars, machine, measure, page, peers, shapes
from benchmarks.bars import Bar
from comfy_sage3 import reference
from comfy_sage3.errors import InputError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "attention.py"


# ------------------------------------------------------------------------------------------------ shapes
def test_flops_count_two_products_half_when_causal_and_five_halves_backward():
    full = shapes.Shape("x", "x", 2, 3, 5, 7, 16)
    causal = shapes.Shape("x", "x", 2, 3, 5, 5, 16, causal=True)
    assert full.flops() == 2 * (2 * 2 * 3 * 5 * 7 * 16)
    assert causal.flops() == 2 * 3 * 5 * 5 * 16 * 2
    assert full.flops("backward") == 2.5 * full.flops()
    assert full.flops("both") == full.flops() + full.flops("backward")


@pytest.mark.parametrize(
    ("name", "heads", "tokens", "head_dim"),
    [
        ("wan-14b-480p", 40, 32760, 128),
        ("wan-14b-720p", 40, 75600, 128),
        ("wan-1.3b-480p", 12, 32760, 128),
        ("hunyuan-720p", 24, 119056, 128),
        ("flux-1024", 24, 4608, 128),
        ("qwen-image-1328", 24, 7401, 128),
        ("cogvideox-5b", 48, 17776, 64),
    ],
)
def test_models_have_the_tokens_of_their_papers(name, heads, tokens, head_dim):
    (shape,) = shapes.chosen([name])
    assert (shape.heads, shape.queries, shape.keys, shape.head_dim) == (heads, tokens, tokens, head_dim)


def test_groups_and_names_choose_shapes_and_an_unknown_one_is_told_what_there_is():
    assert [s.name for s in shapes.chosen(["sdxl-4096-text", "flux"])] == ["flux-1024", "sdxl-4096-text"]
    assert len(shapes.chosen(["square"])) == 8
    assert {s.name for s in shapes.chosen(shapes.QUICK)} == {"hd128-8192", "hd64-8192"}
    with pytest.raises(InputError, match="hd128-8192"):
        shapes.chosen(["hd12"])


def test_shape_names_are_unique_and_everything_fits_in_80_gb():
    assert len({s.name for s in shapes.SHAPES}) == len(shapes.SHAPES)
    for s in shapes.SHAPES:
        workspace_out_and_inputs = s.elements() * 2 + s.elements() * 1.1 + s.batch * s.heads * s.queries * s.head_dim * 2
        assert workspace_out_and_inputs * 4 < 80e9


# ------------------------------------------------------------------------------------------------ measuring
class FakeClock:
    """Every call costs what the table says; what ran is written down."""

    def __init__(self, costs):
        self.costs, self.ran, self.rests = costs, [], 0

    def rest(self, warm_up):
        self.rests += 1

    def time(self, batch):
        before = len(self.ran)
        batch()
        return sum(self.costs[name] for name in self.ran[before:])

    def batch(self, calls, count, tiny):
        return measure.looped(calls, count), "graph" if tiny else "events"

    def call(self, name):
        return lambda: self.ran.append(name)


def test_peers_take_turns_and_every_sample_lasts_ten_milliseconds():
    clock = FakeClock({"fast": 0.05, "slow": 4.0})
    found = measure.interleaved({n: [clock.call(n)] for n in clock.costs}, 1.0, clock)
    assert found["fast"].median == pytest.approx(0.05)
    assert found["slow"].median == pytest.approx(4.0)
    assert found["fast"].calls * 0.05 >= 10 - 1e-6
    assert found["slow"].calls * 4 >= 10
    assert (found["fast"].by, found["slow"].by) == ("graph", "events")
    assert found["fast"].samples == found["slow"].samples == measure.MOST_ROUNDS
    timed = clock.ran[-found["fast"].samples * (found["fast"].calls + found["slow"].calls) :]
    changes = [a for a, b in zip(timed, [*timed[1:], None], strict=True) if a != b]
    assert len(changes) > measure.MOST_ROUNDS  # interleaved, not one after the other


def test_a_long_shape_is_timed_twice_and_once_a_sample():
    clock = FakeClock({"a": 700.0, "b": 500.0})
    found = measure.interleaved({n: [clock.call(n)] for n in clock.costs}, 1.0, clock)
    assert [(t.samples, t.calls) for t in found.values()] == [(2, 1), (2, 1)]
    assert len(clock.ran) == 2 + 4


def test_the_device_rests_before_every_sample():
    clock = FakeClock({"a": 20.0, "b": 20.0})
    found = measure.interleaved({n: [clock.call(n)] for n in clock.costs}, 0.4, clock)
    assert clock.rests == sum(t.samples for t in found.values()) > 0


def test_every_set_of_inputs_is_used_equally_often():
    clock = FakeClock({"a": 3.0, "b": 3.0, "c": 3.0})
    (timing,) = measure.interleaved({"x": [clock.call(n) for n in "abc"]}, 0.2, clock).values()
    assert timing.calls % 3 == 0
    assert clock.ran[-timing.calls :].count("a") == timing.calls // 3


def test_small_inputs_rotate_and_large_ones_do_not():
    small, large = shapes.chosen(["sdxl-1024-text", "hd128-32768"])[::-1]
    assert measure.input_sets(small, 2, 50 * 2**20) > 1
    assert measure.input_sets(large, 2, 50 * 2**20) == 1


def test_quantiles_interpolate():
    assert measure.quantile([4, 1, 3, 2, 5], 0.5) == 3
    assert measure.quantile([0, 10], 0.1) == pytest.approx(1)
    assert measure.quantile([7], 0.9) == 7


SMALL = shapes.Shape("small", "square", 2, 3, 50, 70, 16)


@pytest.mark.parametrize("causal", [False, True])
def test_the_exact_rows_are_those_of_the_reference(causal, monkeypatch):
    monkeypatch.setattr(measure, "ROWS", 11)
    q, k, v = measure.inputs(SMALL, "normal", 0, "cpu", torch.float64)
    rows = measure.sampled_rows(SMALL.queries)
    out, _ = measure.exact_rows(q, k, v, rows, causal)
    want, _ = reference.exact_attention(q, k, v, is_causal=causal)
    assert (rows[0], rows[-1], len(rows)) == (0, 49, 11)
    torch.testing.assert_close(out, want[0][:, rows])
    assert measure.error(want, out, rows)["relative_l1"] < 1e-12


def test_the_exact_gradient_is_autograds():
    q, k, v = measure.inputs(SMALL, "normal", 0, "cpu", torch.float64)
    q.requires_grad_()
    dout = torch.randn_like(q)
    (want,) = torch.autograd.grad(torch.nn.functional.scaled_dot_product_attention(q, k, v), q, dout)
    rows = measure.sampled_rows(SMALL.queries)
    with torch.no_grad():
        _, dq = measure.exact_rows(q, k, v, rows, False, dout)
    torch.testing.assert_close(dq, want[0][:, rows])


def test_offsets_are_per_channel_and_on_the_tensors_they_are_said_to_be_on():
    shape = shapes.Shape("long", "square", 1, 2, 4000, 4000, 32)
    for kind, on in (("normal", ""), ("offsets", "qkv"), ("kv-offsets", "kv")):
        for which, x in zip("qkv", measure.inputs(shape, kind, 0, "cpu", torch.float32, heads=2), strict=True):
            assert x.mean(2).std().item() == pytest.approx(5.0 if which in on else 0.0, abs=1.5 if which in on else 0.1)
            assert (x - x.mean(2, keepdim=True)).std().item() == pytest.approx(1.0, abs=0.02)


def test_sharp_scores_and_a_sink_are_as_large_as_they_are_said_to_be():
    square = dict(group="weights", batch=1, heads=2, queries=300, keys=2000, head_dim=64)
    for std in (1.0, 2.25, 4.0):
        q, k, _ = measure.inputs(shapes.Shape("sharp", score_std=std, **square), "normal", 0, "cpu", torch.float32)
        assert (q @ k.mT / 8.0).std().item() == pytest.approx(std, rel=0.02)
    q, k, _ = measure.inputs(shapes.Shape("sink", sink=0.5, **square), "normal", 0, "cpu", torch.float32)
    assert (q @ k.mT / 8.0).softmax(-1)[..., 0].mean().item() == pytest.approx(0.5, abs=0.02)


def test_only_gradients_are_timed_with_other_weights_where_no_shape_is_named():
    assert "weights" in shapes.usual(backward=True)
    assert "weights" not in shapes.usual(backward=False)
    texts = [s.text for s in shapes.SHAPES if s.group == "weights"]
    assert len(set(texts)) == len(texts)


# ------------------------------------------------------------------------------------------------ peers
def test_on_a_machine_without_a_gpu_every_peer_is_absent_and_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for peer in peers.PEERS:
        assert peer.absent()


def test_an_uninstalled_peer_is_named_with_what_to_install(monkeypatch):
    def nothing(name):
        raise peers.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(peers.metadata, "version", nothing)
    (kitchen,) = peers.chosen(["comfy-kitchen"], False)
    assert "pip install comfy-kitchen" in kitchen.absent()


def test_the_hopper_kernel_is_absent_on_another_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    (sm90,) = peers.chosen(["sm90"], False)
    assert sm90.absent() == "this kernel is for sm_90 and this GPU is sm_89"


def test_peers_are_chosen_by_name_and_backward_ones_on_request():
    assert [p.name for p in peers.chosen(["cudnn", "sm90"], False)] == ["cudnn", "sm90"]
    assert [p.name for p in peers.chosen(["cudnn"], True)] == ["cudnn", "cudnn-backward", "cudnn-both"]
    assert all(p.direction == "forward" for p in peers.chosen(None, False))
    with pytest.raises(InputError, match="comfy-kitchen"):
        peers.chosen(["flash"], False)


def test_the_bandwidth_counts_inputs_read_and_codes_written():
    assert peers.quantisation_bytes(SMALL, 2, 1000) == 2 * 3 * 16 * (50 + 70 + 70) * 2 + 1000
    assert peers.gigabytes_per_second(3_000_000_000, 1000.0) == pytest.approx(3.0)


# ------------------------------------------------------------------------------------------------ verdicts and pages
def some_row(shape, peer, ms=1.0, error=None, **more):
    found = {"shape": shape, "text": "B=1", "group": "square", "peer": peer, "part": "", "direction": "forward"}
    timing = {"median": ms, "p10": ms, "p90": ms, "samples": 3, "calls": 2, "by": "events"}
    errors = {kind: {"relative_l1": e, "cosine": 1.0} for kind, e in (error or {}).items()}
    row = found | {"ms": timing, "tflops": 100 / ms, "ratio_to_cudnn": 2 / ms, "missing": None, "error": errors or None}
    return row | more


def some_result(*rows, absent=()):
    names = dict.fromkeys([r["peer"] for r in rows])
    listed = [{"name": n, "label": n.upper(), "part": "", "direction": "forward", "absent": None} for n in names]
    listed += [{"name": n, "label": n.upper(), "part": "", "direction": "forward", "absent": w} for n, w in absent]
    result = {
        "schema": page.SCHEMA,
        "when": "2026-01-01 00:00 UTC",
        "command": "python benchmarks/attention.py",
        "commit": {"hash": "0123456789abcdef", "changed": True},
        "device": {"name": "NVIDIA X1", "capability": "9.0", "multiprocessors": 132, "memory_gib": 80.0, "l2_mib": 50.0},
        "versions": {"torch": "2.13.0", "cuda": "13.0", "cudnn": "91900", "comfy_kitchen": None},
        "clocks": {"start": None, "busy": None, "end": None},
        "dtype": "bfloat16",
        "kinds": measure.KIND_TEXT,
        "peers": listed,
        "copy_gb_per_s": 4000.0,
        "rows": list(rows),
        "stopped": None,
    }
    return result | {"verdicts": bars.verdicts(result)}


SPEED = Bar("hd128-8192", "sm90", "speed", 1.4, 1.75, "cudnn")


@pytest.mark.parametrize(("ms", "verdict"), [(1.0, "aim"), (1.2, "must"), (1.5, "missed")])
def test_a_speed_is_held_against_the_peer_of_the_same_run(ms, verdict):
    result = some_result(some_row("hd128-8192", "cudnn", 2.0), some_row("hd128-8192", "sm90", ms))
    (found,) = bars.verdicts(result, [SPEED])
    assert found["value"] == pytest.approx(2.0 / ms)
    assert found["verdict"] == verdict


@pytest.mark.parametrize(("error", "verdict"), [(0.0159, "aim"), (0.02, "must"), (0.0201, "missed"), (None, "not measured")])
def test_an_error_must_stay_below(error, verdict):
    result = some_result(some_row("hd128-8192", "sm90", error={"normal": error}))
    (found,) = bars.verdicts(result, [Bar("hd128-8192", "sm90", "relative_l1", 0.020, 0.016)])
    assert found["verdict"] == verdict


def test_what_was_not_measured_says_why():
    rows = (some_row("hd128-8192", "sm90"), some_row("hd128-8192", "mma", missing="RuntimeError: no") | {"ms": None})
    result = some_result(*rows, absent=[("cudnn", "this torch has no cuDNN")])
    mma = Bar("hd128-8192", "mma", "speed", 1.15, None, "sm90")
    other = Bar("hd64-8192", "sm90", "speed", 1.4, None, "cudnn")
    whys = [v["why"] for v in bars.verdicts(result, [SPEED, mma, other])]
    assert whys == ["cudnn: this torch has no cuDNN", "mma: RuntimeError: no", "sm90: this shape was not run"]


def test_the_bars_of_bandwidth_and_of_a_ratio_of_errors():
    result = some_result(
        some_row("hd128-8192", "quantise", gb_per_s=3000.0),
        some_row("hd128-8192", "comfy-kitchen", error={"offsets": 0.004}),
        some_row("hd128-8192", "sm90", error={"offsets": 0.003}),
    )
    found = {v["text"]: v for v in result["verdicts"]}
    assert found["hd128-8192 quantise: bandwidth / copy"]["value"] == pytest.approx(0.75)
    offsets = found["hd128-8192 sm90: relative L1, offsets inputs / comfy-kitchen's"]
    assert (offsets["value"], offsets["verdict"]) == (pytest.approx(0.75), "must")


def test_every_bar_speaks_of_a_shape_and_peers_that_exist():
    for bar in bars.BARS:
        assert shapes.chosen([bar.shape])
        assert peers.chosen([n for n in (bar.peer, bar.against) if n not in (None, "copy")], False)
        assert bar.kind in measure.KINDS


def test_the_page_has_speeds_errors_verdicts_and_the_absent():
    text = page.markdown(
        some_result(
            some_row("hd128-8192", "cudnn", 2.0, {"normal": 0.0022}),
            some_row("hd128-8192", "sm90", 1.0, {"normal": 0.0151, "offsets": None}),
            some_row("hd128-8192", "quantise", 0.5, gb_per_s=3000.0, tflops=None),
            some_row("hd64-8192", "mma", 1.0) | {"ms": None, "tflops": None, "missing": "it | failed"},
            absent=[("comfy-kitchen", "comfy-kitchen is not installed")],
        )
    )
    assert "| hd128-8192 | B=1 | 50 (1.00x) | 100 (2.00x) |" in text
    assert "| hd128-8192 | B=1 | 0.0022 | 0.0151 |" in text
    assert "75 %" in text
    assert "| hd128-8192 sm90: speed / cudnn | >= 1.4 | >= 1.75 | 2.00 | aim reached |" in text
    assert "| hd128-8192 sm90: relative L1, normal inputs | <= 0.02 | <= 0.016 | 0.0151 | aim reached |" in text
    assert "COMFY-KITCHEN: comfy-kitchen is not installed" in text
    assert "MMA at hd64-8192: it | failed" in text
    assert "Commit 0123456789ab, with changes." in text
    for block in text.split("\n\n"):  # a table is a table only if its rows have one width
        widths = {line.replace("\\|", "").count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(widths) <= 1


def test_a_result_survives_its_file_and_is_rendered_from_it(tmp_path, capsys):
    result = some_result(some_row("hd128-8192", "cudnn", 2.0), some_row("hd128-8192", "sm90", 1.0, {"normal": None}))
    out = tmp_path / "deep" / "x.json"
    page.write(result, out)
    assert page.read(out) == json.loads(json.dumps(result))
    first = out.with_suffix(".md").read_text()
    out.with_suffix(".md").unlink()
    assert attention.main(["--from-json", str(out)]) == 0
    assert out.with_suffix(".md").read_text() == first
    assert {p.suffix for p in out.parent.iterdir()} <= {".json", ".md", ".png"}  # no half-written file stays
    assert "wrote" in capsys.readouterr().out


def test_the_plot_is_a_png_and_without_matplotlib_the_person_is_told(tmp_path, monkeypatch):
    result = some_result(some_row("hd128-8192", "cudnn", 2.0), some_row("hd128-8192", "sm90", 1.0))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert page.plot(result) is None
    assert "matplotlib" in page.render(result, tmp_path / "x.json")[-1]
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert page.plot(result).startswith(b"\x89PNG")


def test_a_foreign_json_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"schema": 99}')
    with pytest.raises(InputError, match="not a result"):
        page.read(tmp_path / "x.json")
    with pytest.raises(InputError, match="does not exist"):
        page.read(tmp_path / "none.json")


# ------------------------------------------------------------------------------------------------ machine and command
def test_nvidia_smi_is_read_and_what_it_does_not_know_is_none():
    said = "1980, 2619, 1980, 115.32, 700.00, 41, 580.95.05\n"
    assert machine.parse_smi(said) == {
        "sm_mhz": 1980.0, "memory_mhz": 2619.0, "sm_max_mhz": 1980.0, "power_w": 115.32, "power_limit_w": 700.0,
        "celsius": 41.0, "driver": "580.95.05",
    }  # fmt: skip
    assert machine.parse_smi("[N/A], 1, 1, [Not Supported], 1, 1, x")["power_w"] is None
    assert machine.parse_smi("") is None


@pytest.mark.parametrize(
    ("text", "tidied"),
    [
        ("no /home/me/.venv/bin/nvcc here", "no nvcc here"),
        ("'/opt/a b'", "'a b'"),
        ("--out=/tmp/x/y.json", "--out=y.json"),
        ("~/x/y.json and benchmarks/results/z.json", "y.json and benchmarks/results/z.json"),
        (r"C:\Users\me\x.json", "x.json"),
        ("GB/s, 3 / 4", "GB/s, 3 / 4"),
    ],
)
def test_no_folder_of_the_machine_stays_in_a_text(text, tidied):
    assert machine.tidy(text) == tidied


def test_without_a_gpu_it_says_so_in_one_sentence():
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, SCRIPT, "--quick"], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 2
    assert done.stderr == "benchmarks/attention.py needs a CUDA GPU, and torch sees none here.\n"
    assert not done.stdout


def test_an_unknown_shape_is_an_error_before_anything_runs(capsys):
    assert attention.main(["--shapes", "nonsense"]) == 1
    assert "choose from" in capsys.readouterr().err


@pytest.mark.parametrize("rest", ["-1", "61", "nan"])
def test_a_rest_that_is_none_is_an_error_before_anything_runs(rest, capsys):
    assert attention.main(["--rest", rest]) == 1
    assert "give 0 to 60 seconds" in capsys.readouterr().err


class CpuClock(FakeClock):
    """Runs the calls and says that each took a millisecond."""

    def __init__(self, rest_s=0.0):
        super().__init__({})

    def time(self, batch):
        batch()
        return 1.0


def failing(q, k, v, causal):
    raise RuntimeError("out of luck\nand more")


def test_a_whole_run_on_the_cpu_with_peers_that_work_refuse_and_fail(monkeypatch, tmp_path, capsys):
    """Everything but the GPU: a small shape, PyTorch's plain attention as two of the peers."""
    for name, value in (("DEVICE", "cpu"), ("CudaClock", CpuClock), ("under_load", lambda runners: None)):
        monkeypatch.setattr(attention, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(machine, "device", lambda: some_result()["device"])
    monkeypatch.setattr(machine, "smi", lambda: None)
    monkeypatch.setattr(machine, "l2_bytes", lambda: 2**14)
    monkeypatch.setattr(measure, "copy_bandwidth", lambda clock, device: 100.0)
    works, exact = lambda: None, peers._sdpa("MATH")  # noqa: E731
    codes = lambda q, k, v, causal: lambda: torch.zeros(1000, dtype=torch.uint8)  # noqa: E731
    made = (
        peers.Peer("cudnn", "plain", peers.PLAIN, exact, works),
        peers.Peer("sm90", "ours", peers.END_TO_END, exact, works),
        peers.Peer("quantise", "codes", peers.QUANTISATION, codes, works),
        peers.Peer("mma", "broken", peers.KERNEL, failing, works),
        peers.Peer("fa2", "away", peers.PLAIN, exact, lambda: "is not at home"),
        peers.Peer("comfy-kitchen", "picky", peers.END_TO_END, exact, works, peers._not_causal),
        peers.Peer("cudnn-backward", "plain back", peers.PLAIN, peers._sdpa_backward("MATH"), works, direction="backward"),
        peers.Peer("cudnn-both", "plain step", peers.PLAIN, peers._sdpa_both("MATH"), works, direction="both"),
        peers.Peer("sm90-both", "our step", peers.END_TO_END, peers._sdpa_both("MATH"), works, direction="both"),
    )
    both = Bar("hd128-8192-causal", "sm90-both", "speed", 0.0, None, "cudnn-both")
    monkeypatch.setattr(bars, "OF_GRADIENTS", (both,))
    small = shapes.Shape("hd128-8192-causal", "square", 2, 6, 96, 96, 32, causal=True)
    monkeypatch.setattr(peers, "PEERS", made)
    monkeypatch.setattr(shapes, "SHAPES", (small,))
    out = tmp_path / "run.json"
    assert attention.main(["--backward", "--seconds", "0.01", "--out", str(out)]) == 0
    result = page.read(out)
    rows = {r["peer"]: r for r in result["rows"]}
    assert set(rows) == {"cudnn", "sm90", "quantise", "mma", "comfy-kitchen", "cudnn-backward", "cudnn-both", "sm90-both"}
    for name in ("cudnn", "sm90"):
        assert set(rows[name]["error"]) == set(measure.KINDS)
        assert all(e["relative_l1"] < 0.01 for e in rows[name]["error"].values())  # bf16 against fp64
        assert rows[name]["tflops"] == pytest.approx(small.flops() / rows[name]["ms"]["median"] / 1e9)
    for name in ("cudnn-backward", "cudnn-both", "sm90-both"):
        assert rows[name]["error"]["normal"]["relative_l1"] < 0.02
    ratio = rows["cudnn-both"]["ms"]["median"] / rows["sm90-both"]["ms"]["median"]
    assert rows["sm90-both"]["ratio_to_cudnn"] == pytest.approx(ratio)
    assert {v["peer"]: v["value"] for v in result["verdicts"]}["sm90-both"] == pytest.approx(ratio)
    assert rows["quantise"]["bytes"] == small.elements() * 2 + 1000
    assert rows["mma"]["missing"] == "RuntimeError: out of luck"
    assert rows["comfy-kitchen"]["missing"] == "its int8_attention has no causal mode"
    said = capsys.readouterr().out
    assert "absent: away: is not at home" in said
    text = out.with_suffix(".md").read_text()
    assert "away: is not at home" in text
    assert "## Backward" in text
    assert str(tmp_path) not in out.read_text() + text
