"""What a person types, and what is refused."""

import json

import pytest
from study_made_up import study

from comfy_sage3 import cli
from comfy_sage3.training_study import command
from comfy_sage3.training_study.settings import SETTINGS


def arguments(*typed):
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["run", *typed])


def test_the_list_says_what_is_done(tmp_path, capsys):
    (tmp_path / "arms").mkdir()
    (tmp_path / "arms" / "finetune.int8.seed0.json").write_text("{}")
    assert cli.main(["train-study", "list", "--only", "finetune", "--seeds", "1", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines[:3] == ["-    finetune.exact.seed0", "-    finetune.exact-again.seed0", "done finetune.int8.seed0"]


def test_a_report_is_written_from_the_one_file_that_a_study_travels_in(tmp_path, capsys):
    source = tmp_path / "study.json"
    source.write_text(json.dumps({"schema": 1, "results": study(gap={}, seeds=2, names=("pretrain-few",))}))
    page = tmp_path / "training.md"
    assert cli.main(["train-study", "report", "--out", str(source), "--page", str(page)]) == 0
    assert f"wrote {page}" in capsys.readouterr().out
    assert "Pretraining at 2,560 tokens a step" in page.read_text("utf-8")


def test_the_command_that_results_name_holds_no_folder():
    args = arguments("--only", "finetune,lora", "--seeds", "3", "--steps", "20", "--miniature", "--out", "/somewhere")
    assert command._command(args) == (
        "python -m comfy_sage3 train-study run --only finetune,lora --seeds 3 --steps 20 --miniature"
    )


def test_smaller_runs_are_other_settings():
    asked = command._settings(arguments("--only", "before,finetune", "--steps", "20", "--size", "64x64x9"))
    assert [(s.name, s.steps, s.size) for s in asked] == [("before", 0, "64x64x9"), ("finetune", 20, "64x64x9")]
    tiny = command._settings(arguments("--miniature"))
    assert [s.name for s in tiny] == [s.name for s in SETTINGS]
    assert {s.size for s in tiny} == {"32x32x5"}
    many, few = (next(s for s in tiny if s.name == name) for name in ("pretrain-many", "pretrain-few"))
    assert many.tokens > few.tokens


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--steps", "0"], "0 steps are too few"),
        (["--workers", "0"], "0 workers are too few"),
        (["--size", "12x12x5"], "multiple of 16"),
        (["--only", "pretrain"], "There is no setting 'pretrain': give some of before, finetune"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(typed, message, tmp_path, capsys):
    assert cli.main(["train-study", "run", *typed, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
