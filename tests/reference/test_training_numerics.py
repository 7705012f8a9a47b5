"""``numerics --training``: the bars of accuracy, and what each of our choices gains over the paper's."""

import re
from pathlib import Path

import pytest
import torch

from comfy_sage3 import training_numerics
from comfy_sage3.cli import main
from comfy_sage3.errors import InputError
from comfy_sage3.reference import Int8Options

TOKENS = 1024


@pytest.fixture(scope="module")
def rows():
    made = training_numerics.tables(seeds=1, tokens=TOKENS, sigmas=(1.0, 5.0))
    return {row.label: row for table in made for row in table.rows}


@pytest.mark.parametrize(("name", "bar"), [("O", 0.9995), ("dQ", 0.999), ("dK", 0.999), ("dV", 0.999)])
def test_the_bars_on_normal_inputs(rows, name, bar):
    assert rows[f"{name}, ours"].cosine >= bar


@pytest.mark.parametrize(("name", "at_most"), [("dQ", 0.75), ("dK", 0.75), ("dV", 0.9)])
def test_a_scale_for_a_query_leaves_less_error_than_one_for_a_block(rows, name, at_most):
    assert rows[f"{name}, ours"].relative_l1 < at_most * rows[f"{name}, paper (P V in INT8)"].relative_l1


@pytest.mark.parametrize(("name", "at_most"), [("dQ", 0.45), ("dK", 0.6), ("dV", 0.4)])
def test_int8_with_a_scale_for_a_row_leaves_less_yet(rows, name, at_most):
    assert rows[f"{name}, INT8, a scale a row"].relative_l1 < at_most * rows[f"{name}, ours"].relative_l1


@pytest.mark.parametrize("name", ["dQ", "dK"])
@pytest.mark.parametrize("sigma", [1, 5])
def test_no_worse_than_the_paper_at_any_sharpness(rows, name, sigma):
    ours, paper = (rows[f"{name}, sigma {sigma}, {method}"] for method in ("ours", "paper (P V in FP8)"))
    assert ours.cosine >= paper.cosine


@pytest.mark.parametrize("name", ["dQ", "dK"])
def test_dout_v_in_8_bits_is_worse(rows, name):
    assert rows[f"{name}, paper, dO V^T in INT8"].relative_l1 > rows[f"{name}, paper (P V in INT8)"].relative_l1


@pytest.mark.parametrize(("name", "at_most"), [("dQ", 0.8), ("dK", 0.8), ("dV", 0.8)])
def test_ours_is_nearer_than_the_papers_scales_in_fp8_which_are_no_better_than_in_int8_in_all(rows, name, at_most):
    ours, int8, fp8 = (rows[f"{name}, {method}"] for method in ("ours", "paper (P V in FP8)", "paper, FP8 for INT8"))
    assert ours.relative_l1 < at_most * fp8.relative_l1
    assert fp8.relative_l1 == pytest.approx(int8.relative_l1, rel=0.15)  # the paper's inputs have FP8 far behind


# What arXiv 2603.02170 prints for dQ, of its own inputs of these scales. At sigma 1 it has 0.9998: more than e4m3 gives.
FOLLOW_UP = {3: 0.9971, 5: 0.9798, 8: 0.8900, 10: 0.7823}


def test_the_documented_sweep_is_nowhere_below_the_papers_method_nor_from_sigma_3_on_below_what_the_follow_up_prints():
    text = (Path(__file__).parents[2] / "docs" / "numerics.md").read_text()
    found = {}
    for name, sigma, method, cosine in re.findall(r"\| (d[QK]), sigma (\d+), (ours|paper).*? \| ([\d.]+) ", text):
        found[name, int(sigma), method] = float(cosine)
    assert len(found) == 2 * 2 * len(training_numerics.SIGMAS)
    for name, sigma, method in found:
        assert found[name, sigma, "ours"] >= found[name, sigma, method], (name, sigma)
    for sigma, theirs in FOLLOW_UP.items():
        assert found["dQ", sigma, "ours"] >= theirs, sigma


@pytest.mark.parametrize(("sink", "of_dk"), [("sink", 0.998), ("every second query's sink", 0.9975)])
@pytest.mark.parametrize("name", ["dQ", "dK", "dV"])
def test_keys_beside_a_sink_keep_their_gradients(rows, name, sink, of_dk):
    ours, paper = (rows[f"{name}, {sink}, {method}"] for method in ("ours", "paper (P V in INT8)"))
    assert ours.cosine > max({"dQ": 0.99, "dK": of_dk, "dV": 0.999}[name], paper.cosine)
    if name != "dQ":
        assert rows[f"{name}, {sink}, INT8, a scale a row"].cosine > 0.999


@pytest.mark.parametrize("form", ["row", "query"])
def test_unquantised_it_is_the_exact_gradient(form):
    """The algebra of our forms is that of the block form, which is checked against autograd."""
    x = training_numerics.inputs(0, 200)
    options = Int8Options(pv="int8", gradient_scales=form, quantize=False)
    for got, want in zip(training_numerics.computed(x, options), training_numerics.exact(*x), strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-3, atol=1e-5)


def test_the_command_prints_the_tables(capsys):
    assert main(["numerics", "--training", "--seeds", "1", "--tokens", "64"]) == 0
    printed = capsys.readouterr().out
    assert "| dK, ours |" in printed
    assert "| dQ, sigma 10, paper (P V in FP8) |" in printed
    assert "| dK, sink, ours |" in printed


def test_bad_choices_are_one_sentence(capsys):
    assert main(["numerics", "--training", "--tokens", "0"]) == 2
    assert "--tokens is 0" in capsys.readouterr().err
    with pytest.raises(InputError, match='needs do_v "high"'):
        Int8Options(gradient_scales="row", do_v="int8")
    with pytest.raises(InputError, match='needs products "int8"'):
        Int8Options(gradient_scales="row", products="fp8")
