"""The page says what the numbers say: whether the claims hold, what broke, and when it is a miniature only."""

import json
from dataclasses import replace

import pytest
from study_made_up import SETTINGS, study

from comfy_sage3.errors import InputError
from comfy_sage3.training_study import page, tables
from comfy_sage3.training_study.results import groups
from comfy_sage3.training_study.store import Store, results


def conclusion(found, start):
    (line,) = [x for x in tables.conclusions(groups(found)) if start in x]
    return line


def written(found, tmp_path):
    source = tmp_path / "study.json"
    source.write_text(json.dumps({"schema": 1, "results": found}))
    page.write(source, tmp_path / "docs" / "training.md")
    return (tmp_path / "docs" / "training.md").read_text("utf-8")


@pytest.fixture(autouse=True)
def _folder(tmp_path):
    (tmp_path / "docs").mkdir()


@pytest.mark.parametrize(
    ("gap", "verdict"),
    [
        (0.0, "holds here."),
        (0.001, "holds here within what seeds do, though the difference is real."),
        (0.05, "does not hold here."),
        (-0.05, "holds here (it is even better)."),
    ],
)
def test_a_claim_holds_or_not_by_its_numbers(gap, verdict):
    found = study(gap={("finetune", "int8"): gap, ("finetune", "int8-reference"): gap}, names=("finetune",))
    assert f"Fine-tuning in 8 bits loses nothing against exact attention: {verdict}" in conclusion(found, "loses nothing")


def test_a_claim_that_only_one_seed_has_tested_is_not_settled():
    line = conclusion(study(gap={}, seeds=1, names=("finetune",)), "loses nothing")
    assert "not tested enough" in line
    assert "too few seeds to say" in line
    assert "inf" not in line


def test_a_claim_fails_where_8_bits_break_off_and_exact_attention_does_not():
    found = study(gap={}, names=("pretrain-many",), broken={"pretrain-many.int8.seed1"})
    line = conclusion(found, "40,960 tokens a step with QK norm")
    assert "does not hold here" in line
    assert "1 of 4 runs of int8 broke off at a number that is not finite (0 of exact)" in line
    table = tables.outcome_table(groups(found)[0])
    assert table.splitlines()[-1].startswith("| int8 | 4 |")
    assert table.splitlines()[-1].endswith("| 1 | 1 |")


def test_a_page_from_a_gpu_has_tables_plots_and_commands(tmp_path):
    text = written(study(gap={}), tmp_path)
    assert "miniature" not in text
    assert "python -m comfy_sage3 train-study run" in text
    assert "| finetune | 320 × 32 | int8 | 30.0 | 1.33 | 1.00 (0.50 ×) |" in text
    assert "| finetune | int8 | int8-sm90 | 7,200 | 7,200 | 7,200 |" in text
    for name in page.IMAGES:
        assert f"(images/{name})" in text
        assert (tmp_path / "docs" / "images" / name).read_bytes().startswith(b"\x89PNG")


def test_a_study_on_a_cpu_or_with_other_settings_says_that_it_proves_nothing(tmp_path):
    assert page.SMALL in written(study(gap={}, device="CPU", names=("pretrain-few",)), tmp_path)
    found = study(gap={}, names=("pretrain-few",))
    for result in found.values():
        result["setting"]["rate"] = 0.5
    assert page.SMALL in written(found, tmp_path)


def test_of_a_page_that_is_there_only_its_own_part_is_made_anew(tmp_path):
    path = tmp_path / "docs" / "training.md"
    path.write_text(f"# Mine\n\nbefore\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    text = written(study(gap={}, names=("pretrain-few",)), tmp_path)
    assert text.startswith("# Mine\n\nbefore\n" + page.BEGIN)
    assert text.endswith(page.END + "\nafter\n")
    assert "old\n" + page.END not in text
    path.write_text("# Mine\n")
    with pytest.raises(InputError, match="has no place for the study"):
        written(study(gap={}, names=("pretrain-few",)), tmp_path)


def test_runs_that_broke_off_and_a_lone_seed_are_drawn_too(tmp_path):
    broken = {f"finetune.int8.seed{i}" for i in range(4)} | {"pretrain-few.int8.seed0"}
    text = written(study(gap={}, broken=broken), tmp_path)
    assert "not tested. 4 of 4 runs of int8 broke off" in text
    assert "training-difference.png" in written(study(gap={}, seeds=1, names=("finetune",)), tmp_path)


def test_results_of_different_settings_are_not_mixed():
    found = study(gap={}, names=("pretrain-few",))
    found["pretrain-few.int8.seed0"]["setting"]["rate"] = 1.0
    with pytest.raises(InputError, match="is of other settings"):
        groups(found)


def test_a_study_travels_in_one_file(tmp_path):
    found = study(gap={}, seeds=2, names=("pretrain-few",))
    first = Store(tmp_path / "first")
    for name, result in found.items():
        first.put(name, result)
    packed = first.pack()
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "study.json").write_bytes(packed.read_bytes())
    second = Store(tmp_path / "second")
    assert second.done("pretrain-few.int8.seed1", SETTINGS["pretrain-few"])
    assert not second.done("pretrain-few.int8.seed2", SETTINGS["pretrain-few"])
    with pytest.raises(InputError, match="other settings"):
        second.done("pretrain-few.int8.seed1", replace(SETTINGS["pretrain-few"], steps=1))
    assert results(packed) == results(tmp_path / "second") == found


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no results"):
        results(tmp_path)
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(InputError, match="is not a result"):
        results(tmp_path / "other.json")
