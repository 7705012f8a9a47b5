"""Study, Kernels and History in a real browser: a sweep killed with its server goes on; tables, plots, deletion."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .test_browser import Seen, choose, enable, find_axe

SCRIPT = Path(__file__).parents[1] / "study" / "app_script.py"
BUSY = 240_000  # ms: plots are drawn on a machine that does other things too


def opened(browser, address, tab, width=1280):
    page = browser.new_page(viewport={"width": width, "height": 900}, reduced_motion="reduce")
    page.seen = Seen(page)
    page.goto(address)
    page.get_by_role("tab", name=tab).click()
    return page


def clean(page):
    assert page.seen.errors == []
    assert page.seen.elsewhere == []
    page.close()


def small(page, seeds="1, 2", prompts="a red circle\na blue square"):
    page.locator("#study-prompts textarea").fill(prompts)
    page.locator("#study-seeds input, #study-seeds textarea").first.fill(seeds)
    number = page.locator("#study-steps input[type=number]")
    number.fill("2")
    number.press("Enter")


def progress(page, text):
    page.wait_for_function(
        "text => document.querySelector('#study-progress')?.textContent.includes(text)", arg=text, timeout=BUSY
    )


@pytest.fixture
def server(tmp_path):
    """``server(nap)`` starts an app in a process of its own: (process, address)."""
    started = []

    def start(nap):
        words = [sys.executable, str(SCRIPT), str(tmp_path / "runs"), str(tmp_path / "journal"), str(nap)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[2])}
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_sweep_goes_on_after_its_server_is_killed(browser, server, tmp_path):
    process, address = server(0.2)
    page = opened(browser, address, "Study")
    small(page)
    page.locator("#study-make").click()
    progress(page, "3 of 8")
    process.send_signal(signal.SIGKILL)
    process.wait()
    page.close()

    _, address = server(0.0)
    page = opened(browser, address, "Study")
    shown = page.locator("#study-sweep input")
    page.wait_for_function("() => document.querySelector('#study-sweep input')?.value.includes('cells)')")
    done = int(re.search(r"\((\d) of 8 cells\)", shown.input_value())[1])
    assert 2 <= done < 8
    page.locator("#study-resume").click()
    progress(page, f"8 of 8 cells have a result; {8 - done} were run now.")
    ends = [x.split() for x in (tmp_path / "journal").read_text().splitlines() if x.startswith("inspect")]
    assert len({tuple(x[2:]) for x in ends}) == 8
    assert len(ends) <= 9  # at most the one that was killed was begun twice
    page.wait_for_function("() => document.querySelectorAll('#study-plots img').length === 3", timeout=BUSY)
    clean(page)


def test_a_study_is_made_watched_stopped_and_taken_away(browser, launch):
    address, services = launch(0.02)
    page = opened(browser, address, "Study")
    small(page, seeds="1", prompts="a red circle")
    page.locator("#study-make").click()
    progress(page, "of 2: fp4, seed 1")
    progress(page, "2 of 2 cells have a result; 2 were run now.")
    page.wait_for_function("() => document.querySelectorAll('#study-plots img').length >= 2", timeout=BUSY)
    for picture in page.locator("#study-plots img").all():
        assert picture.evaluate("p => p.complete && p.naturalWidth") > 300
        assert len(picture.get_attribute("alt")) > 10
    assert "emulated" in page.locator("#study-summary").inner_text().lower()
    with page.expect_download() as waiting:
        page.locator("#study-json").click()
    found = json.loads(Path(waiting.value.path()).read_text())
    assert found["states"] == {"done": 2, "failed": 0, "waiting": 0}
    with page.expect_download() as waiting:
        page.locator("#study-report").click()
    assert "<!doctype html>" in Path(waiting.value.path()).read_text()

    small(page, seeds="1-9")
    page.locator("#study-make").click()
    progress(page, "of 36:")
    page.locator("#study-stop").click()
    progress(page, "Stopped: what was finished is kept")
    assert len([e for e in services.history.list() if e.kind == "sweep"]) == 2
    clean(page)


def test_a_form_that_cannot_be_run_is_told(browser, app):
    page = opened(browser, app[0], "Study")
    small(page, prompts="a red unicorn")
    page.locator("#study-make").click()
    page.get_by_text(re.compile("does not know the word 'unicorn'")).first.wait_for()
    clean(page)


def test_kernels_say_what_runs_and_what_is_recorded(browser, app):
    page = opened(browser, app[0], "Kernels")
    page.locator("#recorded-plots img").wait_for()
    assert "Recorded on another machine, not measured here" in page.locator("#recorded").inner_text()
    choose(page, "Numbers", "relative L1 error")
    page.wait_for_function("() => document.querySelector('#recorded')?.textContent.includes('relative L1 error')")
    page.locator("#examine").click()
    page.wait_for_function("() => document.querySelector('#machine')?.textContent.includes('Self-test')", timeout=BUSY)
    assert "fp4 runs as" in page.locator("#machine").inner_text()
    clean(page)


def test_history_opens_compares_and_deletes(browser, launch):
    address, services = launch()
    page = opened(browser, address, "Study")
    small(page, seeds="1", prompts="a red circle")
    page.locator("#study-make").click()
    progress(page, "2 of 2 cells have a result")
    (services.out / "photos").mkdir()
    page.get_by_role("tab", name="History").click()
    page.locator("#history-refresh").click()
    page.wait_for_function("() => document.querySelector('#history-list')?.textContent.includes('1 other folder')")
    page.locator("#history-runs input").click()
    page.get_by_role("option").first.click()
    page.keyboard.press("Escape")
    page.locator("#history-compare").click()
    page.wait_for_function("() => document.querySelectorAll('#history-above tbody tr').length === 2")
    page.locator("#history-open").click()
    page.wait_for_function("() => document.querySelectorAll('#history-plots img').length >= 2", timeout=BUSY)
    page.locator("#history-delete").click()
    page.get_by_text("tick the box to delete them").first.wait_for()
    page.locator("#history-sure input").check()
    page.locator("#history-delete").click()
    page.wait_for_function("() => document.querySelector('#history-list')?.textContent.includes('no runs yet')")
    assert [path.name for path in services.out.iterdir()] == ["photos"]
    clean(page)


TABS = ["Study", "Kernels", "History"]


@pytest.mark.parametrize("tab", TABS)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_does_not_scroll_sideways_and_plots_follow_the_theme(browser, app, tab, theme):
    page = opened(browser, f"{app[0]}?__theme={theme}", tab, width=390)
    page.wait_for_timeout(500)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    if tab == "Kernels":
        picture = page.locator("#recorded-plots img")
        picture.wait_for()
        assert (brightness_of(picture) < 100) == (theme == "dark")
    clean(page)


def brightness_of(picture):
    """Of the corner of a picture, 0 to 255."""
    return picture.evaluate(
        """async (p) => { await p.decode(); const c = document.createElement("canvas"); const d = c.getContext("2d");
        d.drawImage(p, 0, 0); return d.getImageData(1, 1, 1, 1).data[0]; }"""
    )


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_has_no_serious_finding(browser, app, theme):
    axe = find_axe()
    page = opened(browser, f"{app[0]}?__theme={theme}", "Study")
    for tab in TABS:
        page.get_by_role("tab", name=tab).click()
        enable(page)
        page.wait_for_timeout(800)
        page.evaluate(axe)
        found = page.evaluate("() => axe.run(document, {resultTypes: ['violations']})")
        serious = [
            (tab, v["id"], v["nodes"][0]["html"][:200])
            for v in found["violations"]
            if v["impact"] in ("serious", "critical")
        ]
        assert serious == []
    clean(page)
