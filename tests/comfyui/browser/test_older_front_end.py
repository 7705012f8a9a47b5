"""What works on the page of a ComfyUI that cannot load the bundled model's VAE (before 0.3.76): all that needs no video."""

from __future__ import annotations

import pytest
from given import LOADS_THE_BUNDLED_VAE, version
from screen import STEPS, open_page, ours, workflow

EXACT, LOW, EXACT_REPORT, LOW_REPORT = "10", "20", "12", "22"
EMULATED = "emulated: quality is real, speed is not"


@pytest.fixture(scope="module")
def screen(client, browser):
    """The A/B workflow without videos, opened and run through the page."""
    if version() >= LOADS_THE_BUNDLED_VAE:
        pytest.skip("this ComfyUI can load the bundled model's VAE: test_front_end.py is for those")
    made = open_page(client, browser, "classic")
    page = made.page
    page.evaluate("made => app.loadGraphData(made)", workflow(3, "text_to_video_ab_latent"))
    page.wait_for_timeout(1000)
    page.evaluate(
        """() => {
            window.sage3Seen = [];
            window.comfyAPI.api.api.addEventListener("sage3.status", ({ detail }) => {
                const box = document.querySelector(`.sage3-status[data-node="${detail.node}"]`);
                setTimeout(() => window.sage3Seen.push([detail.node, detail.running, box.innerText]), 0);
            });
        }"""
    )
    page.get_by_test_id("queue-button").click()
    page.wait_for_function("() => window.sage3Seen.filter(([, running]) => !running).length === 2", timeout=120_000)
    page.locator(f".sage3-report[data-node='{LOW_REPORT}'] table").first.wait_for(timeout=60_000)
    page.wait_for_timeout(500)
    (entry,) = list(client._json("/history?max_items=1").values())
    made.outputs = entry["outputs"]
    made.live = [text for node, running, text in page.evaluate("() => window.sage3Seen") if running and node == LOW]
    yield made
    page.close()


def test_the_nodes_say_what_happened(screen):
    (run,) = screen.outputs[LOW_REPORT]["sage3_run"]
    box = screen.element(LOW, "status")
    assert box.locator(".sage3-badge").inner_text() == EMULATED
    assert f"{run['calls']} attention calls" in box.inner_text()
    assert f"{STEPS} steps" in box.inner_text()
    assert "does not say which layer calls" in box.inner_text()
    assert screen.element(EXACT, "status").locator(".sage3-badge").inner_text() == "not active"
    assert any(f"of {STEPS}" in text for text in screen.live)
    screen.node(LOW)
    screen.picture("older-status")


@pytest.mark.parametrize("report", [EXACT_REPORT, LOW_REPORT])
def test_the_report_is_a_table(screen, report):
    (run,) = screen.outputs[report]["sage3_run"]
    rows = screen.element(report, "report").locator("table").first.locator("tbody tr").all_inner_texts()
    assert {(kernel.strip(), int(calls)) for kernel, calls, *_ in (row.split("\t") for row in rows)} == {
        (line["kernel"].replace("-emulated", ", emulated"), line["calls"]) for line in run["lines"]
    }


def test_the_panel_has_the_map(screen):
    page = screen.page
    page.evaluate("() => app.extensionManager.command.execute('Workspace.ToggleBottomPanelTab.sage3')")
    panel = page.locator(".sage3-panel")
    panel.wait_for()
    assert "node 20, fp4" in panel.get_by_label("Which run").locator("option:checked").inner_text()
    canvas = panel.get_by_role("img", name="Map of layers and steps")
    assert canvas.get_attribute("aria-label").endswith(f"{STEPS} steps")
    screen.picture("older-panel")
    page.evaluate("() => app.extensionManager.command.execute('Workspace.ToggleBottomPanelTab.sage3')")


def test_a_build_that_failed_is_told(screen):
    screen.send("sage3.build", {"state": "failed", "text": "No <b>compiler</b>."})
    screen.page.get_by_text("No <b>compiler</b>.").wait_for()


def test_pictures_are_compared(screen):
    """Two stills of one colour each, three times."""
    page = screen.page
    page.evaluate(
        """() => {
            app.graph.clear();
            const compare = LiteGraph.createNode("Sage3Compare");
            app.graph.add(compare);
            [0x804020, 0x804820].forEach((colour, slot) => {
                const values = { width: 64, height: 64, batch_size: 3, color: colour };
                const image = LiteGraph.createNode("EmptyImage");
                app.graph.add(image);
                for (const widget of image.widgets) widget.value = values[widget.name] ?? widget.value;
                image.connect(0, compare, slot);
            });
        }"""
    )
    page.get_by_test_id("queue-button").click()
    page.wait_for_function("() => document.querySelector('.sage3-compare .sage3-count')?.textContent", timeout=60_000)
    box = page.locator(".sage3-compare")
    assert box.locator(".sage3-count").inner_text() == "1 / 3"
    page.wait_for_function(
        """() => {
            const canvas = document.querySelector(".sage3-compare canvas"), context = canvas.getContext("2d");
            const at = part => context.getImageData(canvas.width * part, canvas.height / 2, 1, 1).data.join();
            return at(0.45) === "128,64,32,255" && at(0.55) === "128,72,32,255";
        }""",
        timeout=20_000,
    )
    screen.picture("older-compare")


def test_the_console_has_no_errors_of_ours(screen):
    """Last, for all that was done before it."""
    assert [fault for fault in screen.faults if ours(fault)] == []
