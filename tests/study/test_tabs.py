"""The handlers of the Study, Kernels and History tabs, called as the page and the API call them."""

from __future__ import annotations

import json
import math
import shutil
import sys
import types
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from study_fake import FakeEngine

from comfy_sage3.compare.engine import EMULATED_NOTE
from comfy_sage3.errors import EngineError, InputError
from comfy_sage3.study import benchmark, recorded
from comfy_sage3.study.run import run
from comfy_sage3.study.store import Store

gr = pytest.importorskip("gradio", reason="gradio is not installed: pip install 'comfy-sage3[app]'")

from comfy_sage3.app import history_tab, kernels_tab, study_tab  # noqa: E402
from comfy_sage3.app.services import Services  # noqa: E402

VISITOR = types.SimpleNamespace(session_hash="visitor")
FORM = {"name": "", "prompts": "a red circle\n\n  a blue square  \n", "seeds": "1, 2", "precisions": ["fp4", "int8"]}
FORM |= {"plans": None, "size": "128x128", "frames": 5, "steps": 2, "cfg": 3, "repeats": 1, "file": None}


@pytest.fixture
def services(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "private"))
    (tmp_path / "private").mkdir()
    return Services(out=tmp_path / "out", open_engine=lambda name: FakeEngine())


@pytest.fixture
def study(services):
    return study_tab.StudyTab(services)


def make(study, **change):
    return study.make(**{**FORM, **change})


def last(turns):
    *_, end = turns
    return end


def test_a_sweep_is_made_run_and_shown(study, services):
    name = make(study, name="first look")
    assert study.sweeps()["value"] == name
    told = list(study.run(name, VISITOR))
    assert told[0][0]["running"]
    assert told[-1][0]["doing"] == "8 of 8 cells have a result; 8 were run now."
    assert not told[-1][0]["running"]
    fractions = [t[0]["fraction"] for t in told]
    assert fractions == sorted(fractions)
    _, summary, plots, details, csv, found, report = told[-1]
    assert summary[0] == {"kind": "verdict", "text": "first look"}
    table = next(block for block in summary if block["kind"] == "table")
    assert [row[0] for row in table["rows"]] == ["fp4", "int8"]
    assert [p["caption"].split()[0] for p in plots] == ["Every", "Attention", "Quality"]
    assert all(p[theme].startswith("data:image/png;base64,") for p in plots for theme in ("light", "dark"))
    assert len(details[-1]["blocks"][0]["rows"]) == 8
    for update, ending in ((csv, "results.csv"), (found, "results.json"), (report, "report.html")):
        path = Path(update["value"])
        assert path.name.endswith(ending)
        assert path.is_file()
        assert services.out not in path.parents  # what is downloaded is a copy in the private folder


def test_the_closed_page_stops_the_sweep_and_it_goes_on_later(study, services):
    engines = []
    services.open_engine = lambda name: engines.append(FakeEngine(nap=0.05)) or engines[-1]
    name = make(study)
    turns = study.run(name, VISITOR)
    next(turns)
    next(turns)
    turns.close()
    assert engines[0].closed
    assert not services.gpu.locked()
    store = services.history.open(name)
    before = sum(store.state(cell) == "done" for cell in store.sweep.cells())
    assert before < 8
    services.open_engine = lambda name: FakeEngine()
    end = last(study.run(name, VISITOR))[0]
    assert end["doing"] == f"8 of 8 cells have a result; {8 - before} were run now."


def test_stop_says_what_is_kept_and_is_no_error(study, services):
    services.open_engine = lambda name: FakeEngine(nap=0.05)
    name = make(study)
    study.ask(VISITOR)
    turns = study.run(name, VISITOR)
    next(turns)
    assert study.stop(VISITOR) == "stopping"
    end = last(turns)[0]
    assert end["doing"].startswith("Stopped: what was finished is kept")
    assert study.stop(VISITOR) == "nothing runs"


def test_an_engine_that_cannot_be_had_is_told(study, services):
    def refuse(name):
        raise EngineError("There is no server: start one.")

    services.open_engine = refuse
    with pytest.raises(gr.Error, match="There is no server: start one"):
        list(study.run(make(study), VISITOR))


def test_failed_cells_are_shown_with_their_reasons(study, services):
    engine = FakeEngine(emulated=True)
    engine.fails["int8"] = RuntimeError("<b>gave up</b>")
    services.open_engine = lambda name: engine
    end = last(study.run(make(study), VISITOR))
    text = json.dumps(end[1:4])
    assert "RuntimeError: <b>gave up</b>" in text  # as data: the page makes a text node of it
    assert EMULATED_NOTE[1:] in text
    assert len(end[2]) == 2  # no plot with a speed axis


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompts": ""}, "0 prompts"),
        ({"prompts": None}, "0 prompts"),
        ({"prompts": "a red unicorn"}, "Prompt 1: .*unicorn"),
        ({"prompts": "a red circle\na red circle"}, "twice under prompts"),
        ({"prompts": "x" * 50_000}, "50000 characters"),
        ({"seeds": "one"}, "Cannot read the seeds at 'one'"),
        ({"seeds": "5-1"}, "Cannot read the seeds"),
        ({"seeds": "1-999999999"}, "Cannot read the seeds"),
        ({"seeds": "1-100"}, "100 seeds: give 1 to 64"),
        ({"seeds": ""}, "0 seeds"),
        ({"precisions": []}, "neither precisions nor plans"),
        ({"precisions": ["exact"]}, "Exact attention is side A"),
        ({"precisions": ["fp4", 7]}, "'precisions' has the value '7'"),
        ({"precisions": None}, "'precisions' has the value 'None'"),
        ({"size": "64x64"}, "32 tokens, fewer than min_tokens 64"),
        ({"size": "9x9"}, "width is 9"),
        ({"size": "../etc"}, "Cannot read the size"),
        ({"frames": 6}, "number of frames is 6"),
        ({"steps": math.nan}, "number of steps"),
        ({"steps": 1e308}, "number of steps"),
        ({"cfg": math.inf}, "guidance"),
        ({"repeats": 6}, "number of timed runs is 6"),
        ({"name": "x" * 100}, "at most 80 characters"),
    ],
)
def test_hostile_forms_are_refused_in_one_sentence_and_leave_nothing(study, services, change, sentence):
    with pytest.raises(InputError, match=sentence):
        make(study, **change)
    assert not services.out.exists()


def test_an_uploaded_sweep_reads_no_files_of_this_machine(study, tmp_path, data):
    file = tmp_path / "s.json"
    file.write_text(json.dumps({**data, "plans": ["/etc/passwd.json"]}))
    with pytest.raises(InputError, match="put the plan itself into the sweep"):
        make(study, file=str(file))
    file.write_text(json.dumps(data))
    assert isinstance(study._store(make(study, file=str(file))), Store)
    file.write_bytes(b"\xff")
    with pytest.raises(InputError, match="cannot be read"):
        make(study, file=str(file))


def test_a_public_app_calls_no_server_of_the_visitors_and_runs_no_large_sweep(study, services, tmp_path, data):
    services.mask_errors = True
    file = tmp_path / "s.json"
    file.write_text(json.dumps({**data, "engine": "http://10.0.0.1:80"}))
    with pytest.raises(InputError, match="uses the engine it was started with"):
        make(study, file=str(file))
    with pytest.raises(InputError, match="cells: here 24 are the most"):
        make(study, seeds="1-20")


@pytest.mark.parametrize("name", [None, "", "..", "/etc", "missing", 5, ["a"]])
def test_only_sweeps_of_the_out_folder_are_shown_and_run(study, name):
    with pytest.raises(InputError):
        study.show(name)
    with pytest.raises(gr.Error):
        list(study.run(name, VISITOR))


@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_seeds_are_numbers_or_one_sentence(text):
    try:
        found = study_tab.seeds_of(text)
    except InputError as error:
        assert "such as 1, 2, 5-8" in str(error)  # noqa: PT017
        return
    assert all(isinstance(seed, int) and seed >= 0 for seed in found)


def test_seeds_may_be_ranges():
    assert study_tab.seeds_of("1, 2 5-8;10") == [1, 2, 5, 6, 7, 8, 10]


# ------------------------------------------------------------------------------------------------ history
@pytest.fixture
def history(services, sweep):
    """Two sweeps of which one is done, one comparison, and a folder of something else."""
    services.out.mkdir()
    done = Store.create(services.out / "done", sweep)
    run(done, lambda name: FakeEngine())
    Store.create(services.out / "begun", sweep)
    shutil.copytree(done.folder(sweep.cells()[0]), services.out / "single")
    (services.out / "photos").mkdir()
    return history_tab.HistoryTab(services)


def test_the_history_lists_opens_and_compares(history):
    blocks, choices = history.listing()
    assert {row[0] for row in blocks[0]["rows"]} == {"done", "begun", "single"}
    assert "photos: not a run of this app" in blocks[1]["blocks"][0]["items"][0]
    assert {value for _, value in choices["choices"]} == {"done", "begun", "single"}
    above, player, plots, _ = history.open(["single"])
    assert above[0]["kind"] == "verdict"
    assert player["visible"]
    assert player["value"]["frames"] == 5
    assert plots is None
    _, player, plots, details = history.open(["done"])
    assert not player["visible"]
    assert len(plots) == 3
    assert details[-1]["text"] == "Every cell"
    above, *_ = history.compare(["single", "done", "begun"])
    assert len(above[0]["rows"]) == 1 + 8


def test_deleting_needs_the_box_and_takes_only_what_was_chosen(history, services):
    with pytest.raises(InputError, match="tick the box"):
        history.delete(["single"], False)
    blocks, choices, box = history.delete(["single"], True)
    assert box is False
    assert choices["value"] == []
    assert {row[0] for row in blocks[0]["rows"]} == {"done", "begun"}
    for name in ("photos", "../out/done", "done/cells"):
        with pytest.raises(InputError):
            history.delete([name], True)
    assert (services.out / "photos").is_dir()
    assert (services.out / "done" / "sweep.json").is_file()


@given(st.none() | st.text(max_size=20) | st.lists(st.none() | st.integers() | st.text(max_size=20), max_size=25))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_choice_does_worse_than_one_sentence(history, chosen):
    if chosen in ("done", "begun", "single"):
        return
    for do in (history.open, history.compare, lambda x: history.delete(x, True)):
        with pytest.raises(InputError):
            do(chosen)


def test_an_empty_history_says_so(services):
    blocks, choices = history_tab.HistoryTab(services).listing()
    assert blocks[0]["text"].startswith("There are no runs yet")
    assert choices["choices"] == []


# ------------------------------------------------------------------------------------------------ kernels
def test_recorded_results_are_those_of_the_checkout():
    folder = recorded.BENCHMARKS / "results"
    if not folder.is_dir():
        pytest.skip("benchmarks/ is not part of an installed package")
    made = json.loads(json.dumps(recorded.gather(folder)))
    assert made == json.loads(recorded.FILE.read_text()), "run python -m comfy_sage3.study.recorded"


def test_recorded_results_are_labelled_as_recorded(services):
    tab = kernels_tab.KernelsTab(services)
    for result in recorded.recorded():
        for value in kernels_tab.VALUES:
            blocks, plots = tab.recorded(result["device"], value)
            assert blocks[0]["text"].startswith("Recorded on another machine, not measured here")
            table = blocks[1]
            assert all(len(row) == len(table["heads"]) for row in table["rows"])
            assert len(plots) == 1
    blocks, plots = tab.recorded("no such GPU", "nonsense")
    assert (blocks[0]["text"], plots) == (kernels_tab.NONE, None)


@pytest.mark.parametrize("text", ["", "[]", '{"schema": "another"}'])
def test_without_recorded_results_the_page_still_opens(services, monkeypatch, tmp_path, text):
    monkeypatch.setattr(recorded, "FILE", tmp_path / "recorded.json")
    (tmp_path / "recorded.json").write_text(text)
    assert recorded.recorded() == []
    with gr.Blocks(), gr.Tab("Kernels"):
        kernels_tab.build(services)


def test_the_machine_is_described_and_visitors_see_no_folders(services, monkeypatch):
    blocks = kernels_tab.KernelsTab(services).machine()
    tests = next(block for block in blocks if block.get("title") == "Self-test against exact attention")
    assert all(row[2] == "passed" for row in tests["rows"])
    assert any("fp4 runs as" in item for block in blocks for item in block.get("items", ()))
    services.mask_errors = True
    assert not any(block["kind"] == "code" for block in kernels_tab.KernelsTab(services).machine())


def test_without_a_gpu_the_benchmark_says_why(monkeypatch):
    monkeypatch.setattr(benchmark.torch.cuda, "is_available", lambda: False)
    assert "There is no CUDA GPU here" in benchmark.why_not()
    with pytest.raises(EngineError, match="There is no CUDA GPU here"):
        list(benchmark.measure(["wan"]))


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A benchmark of our own in place of the real one, which needs a GPU."""

    def written(code):
        (tmp_path / "attention.py").write_text(code)
        monkeypatch.setattr(benchmark, "BENCHMARKS", tmp_path)
        monkeypatch.setattr(benchmark, "why_not", lambda: "")
        monkeypatch.setattr(benchmark, "LOOK", 0.05)

    return written


def test_the_benchmark_streams_its_lines_and_ends_in_its_result(stand_in, services):
    source = recorded.BENCHMARKS / "results" / "h200.json"
    if not source.is_file():
        pytest.skip("benchmarks/ is not part of an installed package")
    stand_in(f"import shutil, sys\nprint('measuring', sys.argv[2])\nshutil.copy({str(source)!r}, sys.argv[4])\n")
    told = [x for x in benchmark.measure(["wan", "flux", "evil; rm -rf /"]) if x]
    assert told[0] == "measuring wan,flux"
    assert told[-1]["device"] == "NVIDIA H200"
    *_, (blocks, plots) = kernels_tab.KernelsTab(services).measure(["wan"])
    assert blocks[0]["text"] == "Measured here, now"
    assert len(plots) == 1


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("import sys; print('out of memory'); sys.exit(1)", "ended without a result: out of memory"),
        ("import time; time.sleep(60)", "took more than 0 s"),
    ],
)
def test_a_benchmark_that_fails_or_hangs_is_ended(stand_in, code, sentence):
    stand_in(code)
    with pytest.raises(EngineError, match=sentence):
        list(benchmark.measure(["wan"], seconds=0.3 if "sleep" in code else 60))


def test_a_benchmark_of_no_shapes_or_that_is_stopped_leaves_no_process(stand_in):
    stand_in("import time; print('begun', flush=True); time.sleep(60)")
    with pytest.raises(EngineError, match="No shapes were chosen"):
        list(benchmark.measure(["nonsense"]))
    asked = iter(range(100))
    with pytest.raises(EngineError, match="was stopped"):
        list(benchmark.measure(["wan"], stop=lambda: next(asked) > 3))
    turns = benchmark.measure(["wan"])
    next(turns)
    turns.close()


@pytest.mark.skipif(sys.platform == "win32", reason="the command is POSIX's")
def test_the_command_that_makes_the_recorded_results(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(recorded, "FILE", tmp_path / "recorded.json")
    assert recorded.main([str(tmp_path / "missing")]) == 2
    (tmp_path / "results").mkdir()
    assert recorded.main([str(tmp_path / "results")]) == 0
    assert recorded.recorded() == []
    with pytest.raises(InputError, match="not a result of benchmarks/attention.py"):
        recorded.condensed({"schema": 1})
