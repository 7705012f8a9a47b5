"""What a person sees and does: the nodes' words and numbers, the comparison under mouse and keys, the panel, the toasts."""

from __future__ import annotations

import io
import re

import pytest
from PIL import Image
from screen import FRAMES, LAYERS, STEPS, open_page, ours, workflow

from comfy_sage3.workflow import OutputFile

EXACT, LOW = "10", "20"  # the Sage3 Attention nodes of the workflow
EXACT_REPORT, LOW_REPORT, COMPARE = "12", "22", "30"
EMULATED = "emulated: quality is real, speed is not"


def run_of(screen, report):
    (run,) = screen.outputs[report]["sage3_run"]
    return run


def test_the_node_says_what_happened(screen):
    screen.node(LOW)
    run, box = run_of(screen, LOW_REPORT), screen.element(LOW, "status")
    assert box.locator(".sage3-badge").inner_text() == EMULATED
    text = box.inner_text()
    assert f"{run['calls']} attention calls" in text
    for line in run["lines"]:
        name = line["kernel"].replace("-emulated", ", emulated")
        assert f"{name} {line['calls']} ({round(100 * line['calls'] / run['calls'])} %)" in text
    assert f"{STEPS} steps" in text
    assert "attention took" in text
    assert "saved" not in text  # nothing is, where it is emulated
    screen.picture("status")


def test_the_exact_node_does_not_claim_to_be_active(screen):
    box = screen.element(EXACT, "status")
    assert box.locator(".sage3-badge").inner_text() == "not active"
    assert "own settings left every call exact" in box.inner_text()


def test_the_node_spoke_while_it_sampled(screen):
    steps = [int(found[1]) for text in screen.live if (found := re.search(r"step (\d) of 3", text))]
    assert steps
    assert set(steps) <= {1, 2, 3}
    assert steps == sorted(steps)


def test_the_report_is_a_table(screen):
    screen.node(LOW_REPORT)
    run, box = run_of(screen, LOW_REPORT), screen.element(LOW_REPORT, "report")
    rows = [row.split("\t") for row in box.locator("table").first.locator("tbody tr").all_inner_texts()]
    assert {(kernel.strip(), int(calls)) for kernel, calls, *_ in rows} == {
        (line["kernel"].replace("-emulated", ", emulated"), line["calls"]) for line in run["lines"]
    }
    layers = box.locator("details[data-key=layers]")
    assert not layers.locator("table").is_visible()
    layers.locator("summary").click()
    rows = layers.locator("tbody tr")
    assert rows.count() == LAYERS == len(run["layers"])
    assert rows.first.inner_text().split()[:2] == run["layers"][0]["layer"].split()
    screen.picture("report")
    layers.locator("summary").click()
    assert not layers.locator("table").is_visible()


class Comparison:
    """Sage3 Compare on the page, beside the pictures that the server keeps."""

    def __init__(self, screen):
        screen.node(COMPARE, 1.2)
        self.screen, self.page = screen, screen.page
        self.box = screen.element(COMPARE, "compare")
        self.canvas = self.box.locator("canvas")
        (self.found,) = screen.outputs[COMPARE]["sage3_compare"]
        self.look("wipe")
        self.go(self.found["worst"])
        self.a, self.b = (self.file(side, self.found["worst"]) for side in "ab")
        # where the sides differ most: (x, y) in pixels of the picture
        self.spot = max(((x, y) for x in range(8, 56) for y in range(4, 60)), key=lambda spot: sum(self.apart(spot)))

    def apart(self, spot):
        """How far the sides are from each other in a pixel, by colour."""
        return [abs(x - y) for x, y in zip(self.a.getpixel(spot), self.b.getpixel(spot), strict=True)]

    def file(self, side, frame):
        where = self.found["files"]
        picture = self.screen.client.download(OutputFile(COMPARE, where[side][frame], where["subfolder"], where["type"]))
        return Image.open(io.BytesIO(picture)).convert("RGB")

    def look(self, mode):
        self.box.locator(f"button[data-mode={mode}]").click()
        assert self.box.locator("button[aria-pressed=true]").get_attribute("data-mode") == mode

    def go(self, frame):
        slider = self.box.get_by_label("Frame", exact=True)
        slider.focus()
        self.page.keyboard.press("Home")
        for _ in range(frame):
            self.page.keyboard.press("ArrowRight")
        assert self.count() == frame + 1
        self.page.wait_for_timeout(300)  # the pictures come from the server

    def count(self):
        place, frames = self.box.locator(".sage3-count").inner_text().split(" / ")
        assert int(frames) == FRAMES
        return int(place)

    def wiped(self):
        return int(self.canvas.get_attribute("aria-valuenow"))

    def pixel(self, spot, picture=0, pictures=1):
        """The colour on the canvas where the picture's pixel ``spot`` is drawn."""
        return tuple(
            self.canvas.evaluate(
                """(canvas, [x, y, picture, pictures]) => {
                    const gap = pictures > 1 ? 6 * devicePixelRatio : 0;
                    const scale = Math.min((canvas.width - gap) / (64 * pictures), canvas.height / 64);
                    const left = (canvas.width - 64 * pictures * scale - gap) / 2 + picture * (64 * scale + gap);
                    const top = (canvas.height - 64 * scale) / 2;
                    const at = [Math.floor(left + (x + 0.5) * scale), Math.floor(top + (y + 0.5) * scale)];
                    return [...canvas.getContext("2d").getImageData(...at, 1, 1).data].slice(0, 3);
                }""",
                [*spot, picture, pictures],
            )
        )

    def drag_to(self, part):
        """Drag the line to a part of the picture's width."""
        box = self.canvas.bounding_box()
        size = min(box["width"], box["height"])
        left, y = box["x"] + (box["width"] - size) / 2, box["y"] + box["height"] * 0.4
        self.page.mouse.move(left + size / 2, y)
        self.page.mouse.down()
        self.page.mouse.move(left + size * part, y, steps=4)
        self.page.mouse.up()


@pytest.fixture
def comparison(screen):
    return Comparison(screen)


def test_the_sides_differ(comparison):
    assert comparison.a.getpixel(comparison.spot) != comparison.b.getpixel(comparison.spot)


def test_the_wipe_follows_the_mouse(comparison):
    spot, nodes = comparison.spot, "() => app.graph.nodes.map(node => [...node.pos])"
    before = comparison.page.evaluate(nodes)
    comparison.drag_to(0.98)  # A is left of the line
    assert comparison.wiped() == 98
    assert comparison.pixel(spot) == comparison.a.getpixel(spot)
    comparison.screen.picture("wipe")
    comparison.drag_to(0.02)
    assert comparison.wiped() == 2
    assert comparison.pixel(spot) == comparison.b.getpixel(spot)
    assert comparison.page.evaluate(nodes) == before  # the line was dragged, not the node


def test_the_wipe_follows_the_keys(comparison):
    comparison.drag_to(0.5)
    comparison.canvas.focus()
    place, spot = comparison.count(), comparison.spot
    for _ in range(30):
        comparison.page.keyboard.press("ArrowRight")
    assert comparison.wiped() == 100
    assert comparison.pixel(spot) == comparison.a.getpixel(spot)
    for _ in range(60):
        comparison.page.keyboard.press("ArrowLeft")
    assert comparison.wiped() == 0
    assert comparison.pixel(spot) == comparison.b.getpixel(spot)
    assert comparison.count() == place
    comparison.page.keyboard.press("ArrowUp")
    assert comparison.count() == place - 1
    comparison.page.keyboard.press("ArrowDown")
    assert comparison.count() == place


def test_side_by_side(comparison):
    comparison.look("side")
    spot = comparison.spot
    assert comparison.pixel(spot, 0, 2) == comparison.a.getpixel(spot)
    assert comparison.pixel(spot, 1, 2) == comparison.b.getpixel(spot)
    comparison.screen.picture("side")


@pytest.mark.parametrize("factor", [1, 30])
def test_the_difference_is_amplified_and_says_so(comparison, factor):
    comparison.look("difference")
    comparison.box.get_by_label("How many times the difference is amplified").select_option(str(factor))
    assert comparison.box.locator(".sage3-left").inner_text() == f"|fp4 − exact| × {factor}"
    for spot in (comparison.spot, (10, 30)):
        assert comparison.pixel(spot) == tuple(min(255, x * factor) for x in comparison.apart(spot))
    comparison.screen.picture("difference")


def test_blink_shows_the_sides_in_turn(comparison):
    comparison.look("blink")
    seen = set()
    for _ in range(12):
        name = comparison.box.locator(".sage3-left").inner_text()
        colour = comparison.pixel(comparison.spot)
        if name == comparison.box.locator(".sage3-left").inner_text():  # it did not change in between
            seen.add((name, colour))
        comparison.page.wait_for_timeout(150)
    assert seen == {("exact", comparison.a.getpixel(comparison.spot)), ("fp4", comparison.b.getpixel(comparison.spot))}


def test_the_worst_frame_is_found(comparison):
    comparison.go(0)
    worst = comparison.found["worst"]
    button = comparison.box.locator(".sage3-worst")
    assert button.inner_text() == f"Worst frame: {worst + 1}"
    button.click()
    assert comparison.count() == worst + 1
    assert f"PSNR {comparison.found['psnr'][worst]:.2f} dB" in comparison.box.locator(".sage3-numbers").inner_text()


def test_a_click_on_the_curve_goes_to_its_frame(comparison):
    box = comparison.box.locator(".sage3-curve").bounding_box()
    comparison.page.mouse.click(box["x"] + box["width"] * 3 / (FRAMES - 1), box["y"] + box["height"] / 2)
    assert comparison.count() == 4


def test_space_plays_and_stops(comparison):
    comparison.canvas.focus()
    comparison.page.keyboard.press("Space")
    assert comparison.box.get_by_role("button", name="Stop").is_visible()
    places = set()
    for _ in range(20):
        places.add(comparison.count())
        comparison.page.wait_for_timeout(100)
    assert len(places) > 4
    comparison.page.keyboard.press("Space")
    assert comparison.box.get_by_role("button", name="Play").is_visible()
    place = comparison.count()
    comparison.page.wait_for_timeout(400)
    assert comparison.count() == place


def test_the_wheel_zooms_the_workflow_where_there_is_nothing_to_scroll(screen):
    screen.node(COMPARE)
    scale = "() => app.canvas.ds.scale"
    before = screen.page.evaluate(scale)
    screen.element(COMPARE, "compare").locator("canvas").hover()
    screen.page.mouse.wheel(0, -100)
    screen.page.wait_for_timeout(500)
    assert screen.page.evaluate(scale) > before


def test_a_still_has_no_time(comparison):
    """As if the run had given one frame."""
    found, worst = comparison.found, comparison.found["worst"]
    still = found | {"frames": 1, "shown": [0], "psnr": [found["psnr"][worst]], "ssim": [found["ssim"][worst]], "worst": 0}
    still["files"] = found["files"] | {side: [found["files"][side][worst]] for side in "ab"}

    def show(payload):
        detail = {"node": COMPARE, "display_node": COMPARE, "output": {"sage3_compare": [payload]}}
        comparison.screen.send("executed", detail)
        comparison.page.wait_for_timeout(500)

    show(still)
    seen = [comparison.box.locator(part).is_visible() for part in (".sage3-count", ".sage3-curve", ".sage3-worst")]
    comparison.look("blink")
    before, after = comparison.canvas.evaluate(  # at once, so that the clock does not change sides in between
        """canvas => {
            const name = canvas.parentElement.querySelector(".sage3-left"), before = name.textContent;
            canvas.dispatchEvent(new KeyboardEvent("keydown", { key: " ", bubbles: true }));
            return [before, name.textContent];
        }"""
    )
    show(found)
    assert seen == [False, False, False]
    assert {before, after} == {"exact", "fp4"}
    assert comparison.box.locator(".sage3-curve").is_visible()


def test_pictures_that_are_gone_are_said_to_be(comparison):
    screen = comparison.screen
    gone = comparison.found | {"files": comparison.found["files"] | {"subfolder": "sage3_compare/nowhere"}}
    for payload, message in ((gone, "These pictures are gone from ComfyUI's temp folder"), (comparison.found, "")):
        screen.send("executed", {"node": COMPARE, "display_node": COMPARE, "output": {"sage3_compare": [payload]}})
        screen.page.wait_for_timeout(800)
        text = comparison.box.locator(".sage3-message").inner_text()
        assert text.startswith(message)
        assert bool(text) == bool(message)
    screen.faults[:] = [fault for fault in screen.faults if "nowhere" not in fault]


def test_the_panel_has_the_map_and_the_machine(screen):
    page = screen.page
    page.evaluate("() => app.extensionManager.command.execute('Workspace.ToggleBottomPanelTab.sage3')")
    panel = page.locator(".sage3-panel")
    panel.wait_for()
    run = run_of(screen, LOW_REPORT)
    assert "node 20, fp4" in panel.get_by_label("Which run").locator("option:checked").inner_text()
    canvas = panel.get_by_role("img", name="Map of layers and steps")
    assert canvas.get_attribute("aria-label").endswith(f"{LAYERS} layers, {STEPS} steps")
    assert run["map"]["cells"] == [["fp4-emulated"] * STEPS] * LAYERS
    canvas.hover(position={"x": 64 + 8, "y": 5 + 8})
    says = panel.locator("[aria-live]")
    assert says.inner_text() == "layer double 0, step 1: fp4, emulated"
    canvas.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert says.inner_text() == "layer double 1, step 2: fp4, emulated"
    colours = canvas.evaluate(
        """canvas => {
            const r = devicePixelRatio, context = canvas.getContext("2d"), found = new Set();
            const at = (x, y) => [...context.getImageData(x * r, y * r, 1, 1).data].join();
            for (let x = 66; x < 84; x++) for (let y = 8; y < 19; y++) found.add(at(x, y));
            return [...found];
        }"""
    )
    assert "86,180,233,255" in colours  # fp4's blue
    examine = panel.get_by_role("button", name="Examine this machine")
    if examine.is_visible():  # else the other renderer's test has asked for it
        examine.click()
    table = panel.locator(".sage3-doctor")
    table.first.wait_for(timeout=120_000)
    rows = table.first.locator("tbody tr").all_inner_texts()
    assert [row.split()[0] for row in rows] == ["auto", "fp4", "int8", "int8-fast", "exact"]
    assert sum("✓" in row for row in rows) == 4
    screen.picture("panel")
    choice = panel.get_by_label("Which run")
    mine = choice.locator("option").filter(has_text=f"node {EXACT},").filter(has_not_text="Another workflow")
    choice.select_option(mine.get_attribute("value"))
    assert panel.locator(".sage3-badge").inner_text() == "not active"
    page.evaluate("() => app.extensionManager.command.execute('Workspace.ToggleBottomPanelTab.sage3')")


def payload(**changes):
    made = {"version": 1, "node": LOW, "prompt": "p", "running": False, "text": "", "notes": []}
    made |= {"precision": "fp4", "emulated": False}
    made |= {"calls": 10, "accelerated": 0, "fell_back": 0, "exact": 10, "lines": [], "step": 4, "steps": 4, "layers": []}
    return made | {"map": {"layers": [], "steps": 4, "cells": []}, "seconds": None, "saved_seconds": None} | changes


def line(kernel, calls, fell_back=False, reason=""):
    return {"wished": "fp4", "kernel": kernel, "reason": reason, "fell_back": fell_back, "calls": calls}


BADGES = {
    "active": payload(lines=[line("fp4-sm120", 8), line("exact", 2, reason="fewer than 64 tokens")]),
    "partly active": payload(fell_back=2, lines=[line("fp4-sm120", 8), line("int8-mma", 2, True, "head_dim 80")]),
    "fell back": payload(fell_back=10, lines=[line("exact", 10, True, "fp4 needs a Blackwell GPU")]),
    "not active": payload(calls=0),
    EMULATED: payload(lines=[line("fp4-emulated", 10)]),
}


@pytest.mark.parametrize("word", BADGES)
def test_each_outcome_has_its_word(screen, word):
    screen.node(LOW)
    screen.send("sage3.status", BADGES[word])
    box = screen.element(LOW, "status")
    assert box.locator(".sage3-badge").inner_text() == word
    for part in BADGES[word]["lines"]:
        assert not part["fell_back"] or part["reason"] in box.inner_text()
    screen.picture(f"badge-{word.split(':')[0].replace(' ', '-')}")


def test_seconds_saved_are_told_where_they_were_measured(screen):
    run = payload(lines=[line("fp4-sm120", 8), line("exact", 2)], seconds={"fp4-sm120": 1.0, "exact": 0.5})
    box = screen.element(LOW, "status")
    screen.send("sage3.status", run)
    assert "attention took 1.50 s" in box.inner_text()
    assert "saved" not in box.inner_text()
    screen.send("sage3.status", run | {"saved_seconds": 3.25})
    assert "attention took 1.50 s, 3.25 s saved" in box.inner_text()
    screen.send("sage3.status", run | {"saved_seconds": -0.25})
    assert "0.25 s lost" in box.inner_text()


def test_one_layer_and_one_step_are_counted_as_one(screen):
    box = screen.element(LOW, "status")
    for steps, text in ((1, "1 step"), (4, "4 steps")):
        screen.send("sage3.status", payload(steps=steps, step=steps, lines=[line("fp4-sm120", 8)]))
        assert box.locator(".sage3-quiet").first.inner_text() == text
    ask = "async count => (await import('/extensions/comfy-sage3/js/sage3_common.js')).layersText(count)"
    assert [screen.page.evaluate(ask, count) for count in (1, 6)] == ["1 layer", "6 layers"]


def test_live_status_can_be_turned_off(screen):
    box = screen.element(LOW, "status")
    running = payload(running=True, step=2, lines=[line("fp4-sm120", 4)])
    screen.send("sage3.status", payload(lines=[line("fp4-sm120", 8)]))
    screen.page.evaluate("() => app.extensionManager.setting.set('Sage3.LiveStatus', false)")
    screen.send("sage3.status", running)
    assert "step 2 of 4" not in box.inner_text()
    screen.page.evaluate("() => app.extensionManager.setting.set('Sage3.LiveStatus', true)")
    screen.send("sage3.status", running)
    assert "step 2 of 4" in box.inner_text()


def test_data_is_shown_as_text_never_as_markup(screen):
    markup = "<img src=nowhere onerror='window.sage3Hacked = true'>"
    screen.send("sage3.status", payload(fell_back=10, lines=[line(f"fp4-{markup}", 10, True, markup)]))
    assert markup in screen.element(LOW, "status").inner_text()
    assert screen.element(LOW, "status").locator("img").count() == 0
    assert not screen.page.evaluate("() => window.sage3Hacked")


def test_a_build_is_told_once(screen):
    page = screen.page
    screen.send("sage3.build", {"state": "building", "text": "Kernels are being built."})
    screen.send("sage3.build", {"state": "failed", "text": "No <b>compiler</b>."})
    page.get_by_text("No <b>compiler</b>.").wait_for()
    screen.picture("toast")
    screen.send("sage3.build", {"state": "failed", "text": "And again."})
    page.wait_for_timeout(2000)
    assert page.get_by_text("And again.").count() == 0
    assert page.get_by_text("Kernels are being built.").count() == 0  # it failed at once: one word is enough


def test_news_of_another_workflow_stay_off_a_node_of_the_same_id(screen):
    box = screen.element(LOW, "status")
    mine = screen.page.evaluate("() => (app.rootGraph ?? app.graph).id")
    screen.send("sage3.status", BADGES["active"] | {"workflow": mine})
    assert box.locator(".sage3-badge").inner_text() == "active"
    screen.send("sage3.status", BADGES["fell back"] | {"workflow": "another"})
    assert box.locator(".sage3-badge").inner_text() == "active"
    screen.send("sage3.status", BADGES["fell back"] | {"workflow": None})  # queued by a script, without a workflow
    assert box.locator(".sage3-badge").inner_text() == "fell back"


def test_a_reopened_workflow_shows_its_results_again(screen):
    page = screen.page
    page.evaluate("() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    page.wait_for_function("() => app.graph.nodes.length === 0")
    page.locator(".workflow-tab, [data-testid=workflow-tab], .p-togglebutton").first.wait_for()
    page.evaluate(
        """async () => {
            const { workflow } = app.extensionManager;
            await app.extensionManager.command.execute("Workspace.PreviousOpenedWorkflow");
        }"""
    )
    page.wait_for_function("() => document.querySelector('.sage3-compare .sage3-count')?.textContent", timeout=20_000)
    assert screen.element(LOW, "status").locator(".sage3-badge").inner_text() == EMULATED
    assert screen.element(LOW_REPORT, "report").locator("table").count() == 2


def test_the_node_is_found_in_the_search_box(screen):
    page = screen.page
    before = page.evaluate("() => app.graph.nodes.filter(node => node.type === 'Sage3Attention').length")
    page.evaluate("() => { app.canvas.ds.scale = 1; app.canvas.ds.offset = [3000, 3000]; app.canvas.setDirty(true, true); }")
    page.wait_for_timeout(300)
    box = page.get_by_placeholder("Add a node...")
    for _ in range(5):  # on a busy machine the two clicks may come too far apart to be one double click
        page.mouse.dblclick(700, 500)
        page.wait_for_timeout(1500)
        if box.is_visible():
            break
    box.fill("sageattention")  # one of its search aliases
    page.locator("#results-list").get_by_text("Sage3 Attention", exact=True).click()
    page.mouse.click(900, 600)  # where the new node is to lie
    page.wait_for_function(
        "before => app.graph.nodes.filter(node => node.type === 'Sage3Attention').length === before + 1", arg=before
    )
    waiting = page.locator(".sage3-status[data-state=waiting]")
    waiting.first.wait_for()
    assert "Nothing sampled" in waiting.first.inner_text()
    screen.picture("search")


def test_a_run_is_told_to_its_own_tab_though_another_is_in_front(screen):
    """Two workflows with the same ids: one is queued, the other brought to the front while it samples."""
    page = screen.page
    page.evaluate(
        """() => {
            window.sage3Later = [];
            const told = ({ detail }) => window.sage3Later.push([detail.node, detail.workflow, detail.running]);
            window.comfyAPI.api.api.addEventListener("sage3.status", told);
        }"""
    )

    def opened(seed, steps):
        made = workflow(seed)
        for node in made["nodes"]:
            if node["type"] == "KSampler":
                node["widgets_values"][2] = steps
        page.evaluate("made => app.loadGraphData(made)", made)
        return page.evaluate("() => (app.rootGraph ?? app.graph).id")

    seed = 31 if screen.renderer == "vue" else 32
    first = opened(seed, 10)
    page.wait_for_timeout(500)
    page.get_by_test_id("queue-button").click()
    page.wait_for_function("() => window.sage3Later.length", timeout=120_000)
    second = opened(seed + 10, 3)
    assert first != second
    over = "([node, flow]) => window.sage3Later.some(([n, w, running]) => n === node && w === flow && !running)"
    page.wait_for_function(over, arg=[LOW, first], timeout=240_000)
    for _ in range(100):  # the reports and the comparison come after the sampling
        queue = screen.client._json("/queue")
        if not queue["queue_running"] and not queue["queue_pending"]:
            break
        page.wait_for_timeout(300)
    page.wait_for_timeout(1000)
    assert screen.element(LOW, "status").get_attribute("data-state") == "waiting"
    assert "Not run yet" in screen.element(LOW_REPORT, "report").inner_text()
    screen.node(COMPARE)
    assert screen.element(COMPARE, "compare").locator(".sage3-count").text_content() == ""
    assert "Run the workflow to compare" in screen.element(COMPARE, "compare").inner_text()

    command = "() => app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')"
    page.evaluate(command)
    page.wait_for_function("id => (app.rootGraph ?? app.graph).id === id", arg=first)
    screen.node(COMPARE)
    page.wait_for_function("() => document.querySelector('.sage3-compare .sage3-count')?.textContent", timeout=20_000)
    assert screen.element(LOW, "status").locator(".sage3-badge").inner_text() == EMULATED
    assert screen.element(LOW_REPORT, "report").locator("table").count() == 2
    page.evaluate("() => app.extensionManager.command.execute('Workspace.NextOpenedWorkflow')")
    page.wait_for_function("id => (app.rootGraph ?? app.graph).id === id", arg=second)
    page.wait_for_timeout(1000)
    assert "Not run yet" in screen.element(LOW_REPORT, "report").inner_text()
    page.evaluate(command)
    page.wait_for_function("id => (app.rootGraph ?? app.graph).id === id", arg=first)


def test_the_console_has_no_errors_of_ours(screen):
    """Last, for all that was done before it."""
    assert [fault for fault in screen.faults if ours(fault)] == []


def test_the_page_in_chinese(client, browser):
    screen = open_page(client, browser, "classic", **{"Comfy.Locale": "zh"})
    page = screen.page
    page.evaluate(
        """() => {
            app.graph.clear();
            const node = window.LiteGraph.createNode("Sage3Attention");
            app.graph.add(node);
        }"""
    )
    box = page.locator(".sage3-status")
    box.wait_for()
    assert box.inner_text() == "打开此页面后尚未采样。"
    node = box.get_attribute("data-node")
    screen.send("sage3.status", BADGES["partly active"] | {"node": node})
    assert box.locator(".sage3-badge").inner_text() == "部分启用"
    assert [fault for fault in screen.faults if ours(fault)] == []
    page.close()
