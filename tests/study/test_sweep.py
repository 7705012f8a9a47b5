"""What a sweep file may say, how it is refused, and ids that stay the same."""

from __future__ import annotations

import json
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_sage3.cli import main
from comfy_sage3.demo.prompts import COLOURS, SHAPES
from comfy_sage3.errors import InputError
from comfy_sage3.plan.plan import Budget, LayerPlan
from comfy_sage3.precision import Precision
from comfy_sage3.study import sweep as sweeps
from comfy_sage3.study.sweep import MAX_CELLS, Sweep, loads, parse, read

PROMPTS = [f"a {c} {s}" for c in COLOURS for s in SHAPES]


def plan(precision: Precision = Precision.FP4) -> LayerPlan:
    return LayerPlan(
        model="WanModel-0123456789abcdef",
        layers=("0", "1"),
        sigmas=(1.0, 0.5),
        steps=(1, 1),
        chosen=((precision,) * 2, (Precision.EXACT,) * 2),
        errors={precision: ((0.1, 0.1),) * 2},
        seconds={precision: ((0.5, 0.5),) * 2, Precision.EXACT: ((1.0, 1.0),) * 2},
        budget=Budget("balanced", 0.05, 0.2),
        bound=1.0,
        costs="measured",
        device="GPU",
    )


def test_every_combination_is_a_cell_and_the_exact_side_is_shared(sweep):
    cells = sweep.cells()
    assert len(cells) == len({c.id for c in cells}) == 2 * 2 * 2
    assert len({c.exact for c in cells}) == 2 * 2
    for first, second in zip(cells[::2], cells[1::2], strict=True):
        assert (first.prompt, first.seed, first.exact) == (second.prompt, second.seed, second.exact)
    assert all(re.fullmatch(r"(fp4|int8)-seed[12]-[0-9a-f]{10}", c.id) for c in cells)


def test_ids_do_not_depend_on_order_name_or_on_what_else_is_in_the_sweep(data):
    ids = {c.id for c in parse(data).cells()}
    data |= {"name": "tuesday", "seeds": [3, 2, 1], "prompts": data["prompts"][::-1], "precisions": ["int8", "fp4", "auto"]}
    assert ids < {c.id for c in parse(data).cells()}


@pytest.mark.parametrize(
    "change",
    [{"steps": 3}, {"size": "16x16x5"}, {"cfg": 2}, {"shift": 4}, {"repeats": 1}, {"min_tokens": 1}, {"emulate": False},
     {"negative": "a red circle"}, {"engine": "http://127.0.0.1:8188"}],
)  # fmt: skip
def test_whatever_changes_a_result_changes_its_id(data, change):
    before = {c.id for c in parse(data).cells()}
    after = parse({**data, **change}).cells()
    assert not before & {c.id for c in after}


def test_ids_are_the_same_in_every_version(sweep):
    # Folders of earlier sweeps are found by these: a change here must come with another ID_VERSION.
    assert sweep.cells()[0].id == "fp4-seed1-d96631cc16"


@given(
    st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=4, unique=True),
    st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4, unique=True),
    st.lists(st.sampled_from(["fp4", "int8", "int8-fast", "auto"]), min_size=1, max_size=4, unique=True),
    st.integers(1, 100),
)
@settings(max_examples=40, deadline=None)
def test_what_is_stored_reads_back_as_the_same_sweep(prompts, seeds, precisions, steps):
    made = parse({"prompts": prompts, "seeds": seeds, "precisions": precisions, "steps": steps})
    again = parse(json.loads(json.dumps(made.to_data())))
    assert again == made
    assert again.cells() == made.cells()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(sweeps.KEYS), json_values)
@settings(max_examples=200, deadline=None)
def test_no_value_of_any_setting_does_worse_than_one_sentence(key, value):
    refused = ""
    try:
        assert (
            1
            <= len(parse({"prompts": ["a red circle"], "seeds": [1], "precisions": ["fp4"], key: value}).cells())
            <= MAX_CELLS
        )
    except InputError as error:
        refused = str(error)
    assert "\n" not in refused.strip()
    assert len(refused) < 600


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompt": "a red circle"}, "no setting 'prompt': did you mean 'prompts'"),
        ({"colour": 1}, "no setting 'colour': known are"),
        ({"prompts": []}, "0 prompts: give 1 to 64"),
        ({"prompts": "a red circle"}, "'prompts' is not a list"),
        ({"prompts": ["a red circle", "a red circle"]}, "'a red circle' twice under prompts"),
        ({"prompts": ["a red circle", "a red unicorn"]}, "Prompt 2: .*unicorn"),
        ({"seeds": [1, True]}, "'seeds' has the value 'True': give a whole number"),
        ({"seeds": [1.5]}, "'seeds' has the value '1.5'"),
        ({"seeds": [-1]}, "seed is -1"),
        ({"seeds": [10**30]}, "too large"),
        ({"seeds": list(range(65))}, "65 seeds: give 1 to 64"),
        ({"precisions": ["fp3"]}, "Unknown precision 'fp3'"),
        ({"precisions": ["exact"]}, "Exact attention is side A of every cell"),
        ({"precisions": []}, "neither precisions nor plans"),
        ({"precisions": ["fp4", "fp4"]}, "'fp4' twice"),
        ({"prompts": PROMPTS, "seeds": list(range(40)), "precisions": ["fp4"]}, "960 cells"),
        ({"size": "big"}, "Cannot read the size 'big'"),
        ({"steps": 0}, "number of steps is 0"),
        ({"steps": "20"}, "'steps' has the value '20': give a whole number"),
        ({"cfg": float("nan")}, "cfg is nan"),
        ({"shift": 0}, "shift is 0"),
        ({"repeats": 21}, "number of repeats is 21"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"min_tokens": 64}, "have 4 tokens, fewer than min_tokens 64, so that every call would stay exact"),
        ({"emulate": 1}, "'emulate' has the value '1': give true or false"),
        ({"engine": "file:///etc/passwd"}, "give 'embedded', or a server's address"),
        ({"negative": "a unicorn"}, "The negative prompt: .*unicorn"),
        ({"plans": ["balanced"]}, "'balanced' cannot be used with this engine: give a plan's .json file"),
        ({"plans": ["balanced"], "engine": "http://127.0.0.1:8188", "seeds": [-1]}, "seed is -1"),
        ({"name": "a\nb"}, "not one line"),
        ({"plans": ["p.json"]}, "cannot be read from here"),
        ({"plans": [{"name": "p"}]}, "A plan is the name of its file"),
        ({"plans": [{"name": "p", "plan": {}}]}, "not a precision plan"),
    ],
)
def test_refusals_are_one_sentence_that_says_what_to_do(data, change, sentence):
    with pytest.raises(InputError, match=sentence):
        parse({**data, **change})


@pytest.mark.parametrize("missing", ["prompts", "seeds"])
def test_prompts_and_seeds_must_be_given(data, missing):
    del data[missing]
    with pytest.raises(InputError, match=f"has no {missing}"):
        parse(data)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"seeds": [1],\n "seeds": [2]}', "twice"),
        ('{"seeds": [NaN]}', "NaN"),
        ("{", "line 1"),
        ("[" * 100_000, "not JSON"),
        ("[1, 2]", "A sweep is a table"),
    ],
)
def test_text_that_is_no_sweep_is_refused(text, sentence):
    with pytest.raises(InputError, match=sentence):
        parse(loads(text, ".json"))


def test_files_in_json_and_toml_say_the_same(tmp_path, data):
    (tmp_path / "s.json").write_text(json.dumps(data))
    lines = [f"{key} = {json.dumps(value)}" for key, value in data.items()]
    (tmp_path / "s.toml").write_text("# a comment\n" + "\n".join(lines))
    assert read(tmp_path / "s.json") == parse(data)
    if sys.version_info >= (3, 11):
        assert read(tmp_path / "s.toml") == parse(data)
        (tmp_path / "s.toml").write_text("prompts = [")
        with pytest.raises(InputError, match="not TOML"):
            read(tmp_path / "s.toml")
    else:
        with pytest.raises(InputError, match="need Python 3.11"):
            read(tmp_path / "s.toml")


@pytest.mark.parametrize("name", ["missing.json", "sweep.yaml", "folder.json", "binary.json", "huge.json"])
def test_files_that_cannot_be_read_are_named(tmp_path, name):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "huge.json").write_text(" " * (sweeps.MAX_FILE_BYTES + 1))
    with pytest.raises(InputError, match=re.escape(name)):
        read(tmp_path / name)


def test_plans_are_read_beside_the_sweep_and_kept_inside_it(tmp_path, data):
    (tmp_path / "balanced.json").write_text(plan().to_json())
    (tmp_path / "draft.json").write_text(plan(Precision.INT8).to_json())
    (tmp_path / "s.json").write_text(json.dumps({**data, "precisions": [], "plans": ["balanced.json", "draft.json"]}))
    made = read(tmp_path / "s.json")
    assert [c.name for c in made.contestants] == ["plan balanced", "plan draft"]
    (tmp_path / "balanced.json").unlink()
    assert parse(made.to_data()) == made
    assert made.cells()[0].id.startswith("plan-balanced-seed1-")
    assert len({c.id for c in made.cells()}) == 8


def test_two_plans_of_one_name_are_refused(data):
    both = [{"name": "p", "plan": json.loads(plan(x).to_json())} for x in (Precision.FP4, Precision.INT8)]
    with pytest.raises(InputError, match="Two plans of this sweep have one name"):
        parse({**data, "plans": both})


def test_the_example_in_the_refusal_is_a_sweep():
    assert isinstance(parse(json.loads(sweeps.EXAMPLE)), Sweep)


@pytest.mark.parametrize("text", ["{}", "[]", "{"])
def test_the_command_refuses_in_one_sentence_and_leaves_nothing(tmp_path, capsys, text):
    (tmp_path / "s.json").write_text(text)
    assert main(["compare", "--sweep", str(tmp_path / "s.json"), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert told.err.count("error:") == 1
    assert "Traceback" not in told.err
    assert not (tmp_path / "out").exists()
