"""The tally of calls: exact under threads, readable, and reachable from inside a torch op."""

import gc
from concurrent.futures import ThreadPoolExecutor

from comfy_sage3.report import Report, note_of, record_gradient_note, record_note


def test_equal_outcomes_are_one_line_most_frequent_first():
    report = Report()
    report.record("fp4", "exact", "no GPU", True)
    report.record("fp4", "fp4-emulated", "asked for", False, calls=3)
    report.record("fp4", "exact", "no GPU", True)
    assert report.lines() == [
        {"wished": "fp4", "kernel": "fp4-emulated", "reason": "asked for", "fell_back": False, "calls": 3},
        {"wished": "fp4", "kernel": "exact", "reason": "no GPU", "fell_back": True, "calls": 2},
    ]
    assert (report.accelerated, report.fell_back) == (3, 2)


def test_exact_calls_that_were_asked_for_are_neither_accelerated_nor_fallen_back():
    report = Report()
    report.record("exact", "exact", "asked for", False)
    assert (report.accelerated, report.fell_back) == (0, 0)


def test_summary_gives_totals_then_reasons():
    report = Report()
    assert report.summary() == "no attention calls were seen"
    report.record("fp4", "exact", "no GPU", True, calls=2)
    assert report.summary().splitlines() == [
        "2 attention calls: 0 accelerated, 2 fell back",
        "       2 x exact: no GPU",
    ]
    report.reset()
    assert report.lines() == []


def test_gradients_are_counted_by_kernel_and_told_last():
    report = Report()
    note = note_of(report, "int8", "int8-sm90", "asked for | runs", False)
    record_note(note)
    record_gradient_note(note)
    record_gradient_note(note)
    record_gradient_note("")
    assert report.gradients() == {"int8-sm90": 2}
    assert report.summary().splitlines()[1:] == ["       1 x int8-sm90: asked for | runs", "       2 x int8-sm90: gradients"]
    report.reset()
    assert report.gradients() == {}


def test_gradients_may_be_counted_in_a_report_that_outlives_the_call_s():
    run = Report()
    call = Report(gradients_in=run)
    note = note_of(call, "int8", "int8-sm90", "asked for", False)
    record_note(note)
    assert [line["calls"] for line in call.lines()] == [1]
    del call
    gc.collect()
    record_gradient_note(note)
    assert (run.lines(), run.gradients()) == ([], {"int8-sm90": 1})


def test_threads_lose_no_call():
    report = Report()

    def work(i):
        for _ in range(500):
            report.record("fp4", f"kernel{i % 2}", "asked for", False)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert [line["calls"] for line in report.lines()] == [2000, 2000]


def test_a_note_carries_an_outcome_to_its_own_report():
    one, other = Report(), Report()
    reason = "fp4 needs a | in this sentence; and more"
    record_note(note_of(one, "fp4", "exact", reason, True))
    record_note(note_of(one, "int8", "int8-emulated", "asked for", False))
    assert one.lines() == [
        {"wished": "fp4", "kernel": "exact", "reason": reason, "fell_back": True, "calls": 1},
        {"wished": "int8", "kernel": "int8-emulated", "reason": "asked for", "fell_back": False, "calls": 1},
    ]
    assert other.lines() == []


def test_no_note_and_the_note_of_a_dropped_report_count_nothing():
    report = Report()
    note = note_of(report, "fp4", "exact", "no GPU", True)
    record_note("")
    assert report.lines() == []
    del report
    gc.collect()
    record_note(note)  # the reader is gone; the call itself must go on
    assert Report().lines() == []
