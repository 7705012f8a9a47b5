"""The app in a real browser: first sight, runs, stops, every way to look, keys, votes, dark and narrow pages."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from .conftest import MARKED, SHIFT
from .test_api import wait_for


class Seen:
    """What a page did besides what it shows."""

    def __init__(self, page):
        self.errors, self.elsewhere = [], []
        page.on("console", lambda m: m.type == "error" and self.errors.append(m.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda r: self._asked(r.url))

    def _asked(self, url):
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob") and parts.hostname != "127.0.0.1":
            self.elsewhere.append(url)


def opened(browser, address, query="", width=1280, height=900):
    page = browser.new_page(viewport={"width": width, "height": height}, reduced_motion="reduce")
    page.seen = Seen(page)
    page.goto(address + query)
    page.wait_for_function("() => document.querySelector('.s3-player canvas')?.width > 10", timeout=60_000)
    page.wait_for_function("() => document.querySelector('.s3-numbers')?.textContent")
    return page


@pytest.fixture
def page(browser, app):
    made = opened(browser, app[0])
    yield made
    assert made.seen.errors == []
    assert made.seen.elsewhere == []
    made.close()


@pytest.fixture
def compared(page):
    """A comparison of frames that are known: grey, side B redder on the right half of frame MARKED."""
    compare(page)
    return page


def compare(page, steps=2, size="32x32", frames=5, b=None):
    fill(page, "#steps input[type=number]", steps)
    choose(page, "Size", size)
    choose(page, "Frames", str(frames))
    if b:
        choose(page, "Side B", b)
    before = page.locator("#verdict").inner_text()
    page.click("#run")
    page.wait_for_function(
        "before => document.querySelector('#verdict').innerText !== before || "
        "document.querySelector('.s3-doing')?.textContent === 'done'",
        arg=before,
        timeout=60_000,
    )
    page.wait_for_function(f"() => document.querySelector('.s3-count')?.textContent.endsWith('/ {frames}')", timeout=30_000)
    page.wait_for_function("() => !document.querySelector('#run').disabled")


def fill(page, selector, value):
    page.fill(selector, str(value))
    page.press(selector, "Tab")


def choose(page, label, value):
    box = page.get_by_label(label, exact=True).first
    if label == "Size":
        box.fill(value)  # any size may be typed
        box.press("Enter")
        return
    box.click()
    option = page.get_by_role("option", name=value, exact=False).first
    option.click()


def pixel(page, x, y):
    """The canvas's colour at a share of its width and height."""
    return page.evaluate(
        """([x, y]) => {
            const canvas = document.querySelector('[data-testid=player]');
            const at = [Math.floor(x * canvas.width), Math.floor(y * canvas.height)];
            return [...canvas.getContext('2d').getImageData(...at, 1, 1).data].slice(0, 3);
        }""",
        [x, y],
    )


def test_the_first_sight_is_a_comparison_and_a_prompt(browser, launch):
    page = opened(browser, launch()[0])
    assert "4-bit attention" in page.locator(".s3-verdict").inner_text()
    assert "Emulated: quality is real, speed is not" in page.locator("#verdict").inner_text()
    assert "circle" in page.locator("#prompt textarea").input_value()
    assert page.locator(".s3-count").inner_text() == "1 / 17"
    assert len({tuple(pixel(page, x / 10, 0.5)) for x in range(1, 10)}) > 1  # a picture, not one colour
    numbers = page.locator("#numbers").inner_text()
    for row in ("sampling, end to end", "peak GPU memory", "cosine similarity", "PSNR", "motion energy", "noise floor"):
        assert row in numbers
    assert "as fast as A" not in numbers
    assert page.seen.errors == []
    assert page.seen.elsewhere == []
    page.close()


def test_a_run_shows_both_sides_while_it_goes_on_and_then_its_result(browser, launch):
    address, services = launch(pause=0.25)
    page = opened(browser, address)
    fill(page, "#steps input[type=number]", 6)
    choose(page, "Size", "64x64")
    page.click("#run")
    page.wait_for_function("() => /step [1-6] of 6/.test(document.querySelector('#progress')?.innerText)", timeout=30_000)
    assert page.locator("#run").is_disabled()
    shown = page.locator("#progress").inner_text()
    assert "A (exact)" in shown
    assert "B (fp4)" in shown
    page.wait_for_function("() => document.querySelectorAll('.s3-preview:not([hidden])').length === 2", timeout=30_000)
    page.wait_for_function("() => document.querySelector('#verdict').innerText.includes('fake engine')", timeout=60_000)
    assert page.locator(".s3-doing").inner_text() == "done"
    assert page.locator(".s3-preview").first.is_hidden()  # what is over takes a line
    page.wait_for_function("() => !document.querySelector('#run').disabled")
    assert len(list(services.out.iterdir())) == 1
    assert page.seen.errors == []
    page.close()


def test_stop_ends_a_run_between_steps_and_says_so(browser, launch):
    address, services = launch(pause=0.3)
    page = opened(browser, address)
    page.click("#run")
    page.wait_for_function("() => /step \\d+ of 20/.test(document.querySelector('#progress')?.innerText)", timeout=30_000)
    page.click("#stop")
    page.wait_for_function("() => document.querySelector('.s3-doing')?.textContent.startsWith('Stopped')", timeout=10_000)
    page.wait_for_function("() => !document.querySelector('#run').disabled")
    assert not services.out.exists() or not list(services.out.iterdir())
    assert services.gpu.acquire(timeout=5)
    services.gpu.release()
    page.close()


def test_a_closed_tab_ends_its_run(browser, launch):
    address, services = launch(pause=0.3)
    page = opened(browser, address)
    page.click("#run")
    page.wait_for_function("() => /step \\d+ of 20/.test(document.querySelector('#progress')?.innerText)", timeout=30_000)
    page.close()
    assert services.gpu.acquire(timeout=20)
    services.gpu.release()
    wait_for(lambda: not services.out.exists() or not list(services.out.iterdir()))


def test_every_way_to_look_shows_the_right_pixels(compared):
    page, grey = compared, [40 + 10 * MARKED] * 3
    red = [grey[0] + SHIFT, grey[1], grey[2]]
    page.get_by_role("button", name="Worst frame").click()
    assert page.locator(".s3-count").inner_text() == f"{MARKED + 1} / 5"
    assert "PSNR" in page.locator(".s3-numbers").inner_text()

    assert pixel(page, 0.25, 0.3) == grey  # split: A left of the line, B right of it
    assert pixel(page, 0.75, 0.3) == red
    box = page.locator("[data-testid=player]").bounding_box()
    page.mouse.click(box["x"] + 0.9 * box["width"], box["y"] + box["height"] / 2)
    assert pixel(page, 0.75, 0.3) == grey  # the line was moved to the right

    page.click("[data-mode=side]")
    assert pixel(page, 0.4, 0.3) == grey
    assert pixel(page, 0.6, 0.3) == grey  # B's left half is A's
    assert pixel(page, 0.9, 0.3) == red
    assert page.locator(".s3-left").inner_text() == "A: exact"
    assert page.locator(".s3-right").inner_text() == "B: fp4 (emulated)"

    page.click("[data-mode=difference]")
    assert pixel(page, 0.25, 0.3) == [0, 0, 0]
    assert pixel(page, 0.75, 0.3) == [8 * SHIFT, 0, 0]
    page.get_by_label("How many times the difference is amplified").select_option("32")
    assert pixel(page, 0.75, 0.3) == [32 * SHIFT, 0, 0]
    assert "8.0+" in page.locator(".s3-scale").inner_text()

    page.click("[data-mode=blink]")
    seen = set()
    for _ in range(40):
        label, colour = page.evaluate(  # in one go: it may change sides between two questions
            """() => {
                const canvas = document.querySelector('[data-testid=player]');
                const at = [Math.floor(0.75 * canvas.width), Math.floor(0.3 * canvas.height)];
                const found = canvas.getContext('2d').getImageData(...at, 1, 1).data;
                return [document.querySelector('.s3-left').textContent, [...found].slice(0, 3)];
            }"""
        )
        seen.add((label, tuple(colour)))
        page.wait_for_timeout(60)
    assert seen == {("A: exact", tuple(grey)), ("B: fp4 (emulated)", tuple(red))}


def test_frames_by_slider_by_keys_and_by_the_curve(compared):
    page = compared
    page.get_by_label("Frame", exact=True).fill("3")
    assert page.locator(".s3-count").inner_text() == "4 / 5"
    assert pixel(page, 0.25, 0.3) == [70] * 3
    page.locator("[data-testid=player]").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator(".s3-count").inner_text() == "3 / 5"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator(".s3-count").inner_text() == "1 / 5"  # round again
    page.keyboard.press("Shift+ArrowRight")
    assert page.locator(".s3-count").inner_text() == "1 / 5"
    page.keyboard.press(" ")
    assert page.locator(".s3-play").get_attribute("aria-label") == "Pause"
    page.wait_for_function("() => document.querySelector('.s3-count').textContent !== '1 / 5'")
    page.keyboard.press(" ")
    assert page.locator(".s3-play").get_attribute("aria-label") == "Play"
    page.keyboard.press("3")
    assert page.locator("[data-mode=blink]").get_attribute("aria-pressed") == "true"
    box = page.locator(".s3-curve").bounding_box()
    page.mouse.click(box["x"] + 0.3 * box["width"], box["y"] + 20)  # beside the worst frame
    assert page.locator(".s3-count").inner_text() == f"{MARKED + 1} / 5"


def test_the_loupe_shows_one_spot_of_both(compared):
    page = compared
    page.get_by_role("button", name="Worst frame").click()
    before = pixel(page, 0.05, 0.05)
    page.get_by_role("button", name="Loupe").click()
    box = page.locator("[data-testid=player]").bounding_box()
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.8 * box["height"])
    assert page.get_by_role("button", name="Loupe").get_attribute("aria-pressed") == "true"
    colours = page.evaluate(
        """() => {
            const canvas = document.querySelector('[data-testid=player]');
            const data = canvas.getContext('2d').getImageData(0, 0, canvas.width / 2, canvas.height / 2).data;
            const found = new Set();
            for (let i = 0; i < data.length; i += 4) found.add(`${data[i]} ${data[i + 1]}`);
            return [...found];
        }"""
    )
    grey = 40 + 10 * MARKED
    assert before == [grey] * 3
    assert f"{grey + SHIFT} {grey}" in colours  # B's red, far from where it is in the picture
    assert "255 255" in colours  # the loupe's frame


def test_a_still_is_shown_without_loss_in_a_slider_and_without_a_scrubber(page):
    compare(page, frames=1)
    images = page.locator("#still img")
    page.wait_for_function("() => document.querySelectorAll('#still img').length >= 2")
    assert all(src.endswith(".png") for src in images.evaluate_all("all => all.map(x => x.src)"))
    found = images.last.evaluate(
        """async (image) => {
            await image.decode();
            const canvas = document.createElement('canvas');
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            canvas.getContext('2d').drawImage(image, 0, 0);
            return [...canvas.getContext('2d').getImageData(canvas.width - 2, 2, 1, 1).data].slice(0, 3);
        }"""
    )
    assert found in ([40, 40, 40], [40 + SHIFT, 40, 40])
    assert page.get_by_label("Frame", exact=True).is_hidden()
    assert page.locator(".s3-keys").inner_text().startswith("On the picture: ← → moves the line, 1 to 4")
    assert "drew nearly the same picture as" in page.locator(".s3-verdict").inner_text()
    assert "video" not in page.locator("#verdict").inner_text()


def test_a_blind_vote_hides_the_sides_counts_and_reveals(compared, app):
    page = compared
    page.get_by_role("button", name="Blind test").click()
    page.click("#blind-start")
    page.wait_for_function("() => document.querySelector('.s3-left').textContent === 'First'")
    assert page.locator(".s3-right").inner_text() == "Second"
    page.get_by_role("button", name="Worst frame").click()
    second_is_b = pixel(page, 0.75, 0.3) != [40 + 10 * MARKED] * 3
    page.get_by_role("button", name="The first is A" if second_is_b else "The second is A").click()
    page.get_by_text("Your vote is kept").wait_for()
    page.get_by_role("button", name="Reveal", exact=True).click()
    page.get_by_text(re.compile("^Right: the")).wait_for()
    assert page.locator(".s3-left").inner_text() == ("First was A: exact" if second_is_b else "First was B: fp4 (emulated)")
    assert "found A" in page.locator("#tally").inner_text()
    assert "exact binomial test" in page.locator("#tally").inner_text()
    page.get_by_role("button", name="End the test").click()
    page.wait_for_function("() => document.querySelector('.s3-left').textContent === 'A: exact'")


def test_words_of_the_vocabulary_complete_the_prompt(page):
    page.fill("#prompt textarea", "a large re")
    words = page.locator("#words button")
    page.wait_for_function("() => document.querySelector('#words button')?.textContent === 'red'")
    words.first.click()
    assert page.locator("#prompt textarea").input_value() == "a large red "
    assert words.all_inner_texts() == ["circle", "square", "triangle", "diamond", "and"]
    page.fill("#prompt textarea", "a ${alert(1)} <img src=x onerror=alert(1)>")
    page.click("#run")
    page.wait_for_function(
        "() => document.querySelector('#progress')?.innerText.includes('does not know the word')", timeout=20_000
    )
    assert page.locator("#progress img[src=x]").count() == 0


def test_next_seed_counts_up(page):
    page.click("#next-seed")
    page.wait_for_function("() => document.querySelector('#seed input').value === '2'")


def test_a_full_queue_is_told_on_the_page(browser, launch):
    from comfy_sage3.app.services import Limits

    address, _ = launch(pause=0.3, limits=Limits(queue=1))
    pages = [opened(browser, address) for _ in range(3)]
    for page in pages:
        page.click("#run")
        page.wait_for_timeout(1500)
    pages[-1].get_by_text("The queue is full, with 1 waiting: try again in a few minutes.").wait_for(timeout=10_000)
    assert "waiting for its turn" in pages[1].locator("#progress").inner_text()
    assert pages[-1].locator(".s3-progress").is_hidden()
    assert pages[-1].locator("#run").is_enabled()
    pages[1].click("#stop")  # while it waits: it ends when its turn comes
    pages[0].click("#stop")
    pages[1].wait_for_function(
        "() => document.querySelector('.s3-doing')?.textContent.startsWith('Stopped')", timeout=30_000
    )
    for page in pages:
        page.close()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_theme_and_no_width_overflows_or_hides_words(browser, app, width, theme):
    page = opened(browser, app[0], f"?__theme={theme}", width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate(
        """() => {
            for (let part = document.querySelector('.s3-verdict'); part; part = part.parentElement) {
                const colour = getComputedStyle(part).backgroundColor;
                if (!/, 0\\)$/.test(colour)) return colour;
            }
            return 'rgb(255, 255, 255)';
        }"""
    )
    ink = page.evaluate("getComputedStyle(document.querySelector('.s3-verdict')).color")
    assert abs(brightness(background) - brightness(ink)) > 120
    assert (brightness(background) < 100) == (theme == "dark")
    assert page.seen.errors == []
    assert page.seen.elsewhere == []
    page.close()


def enable(page):
    """Every button as it looks when it can be pressed."""
    page.evaluate("() => document.querySelectorAll('button[disabled]').forEach((button) => (button.disabled = false))")


def contrast(one, other):
    """Of two CSS colours, as WCAG has it."""

    def luminance(colour):
        parts = [float(x) / 255 for x in re.findall(r"[\d.]+", colour)[:3]]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_buttons_that_can_be_pressed_are_read_well_also_under_the_mouse(browser, app, theme):
    page = opened(browser, app[0], f"?__theme={theme}")
    buttons = {"Compare": ["#run", "#stop", "#next-seed"], "Study": ["#study-make", "#study-stop"], "Kernels": ["#examine"]}
    for tab, selectors in buttons.items():
        page.get_by_role("tab", name=tab).click()
        for selector in selectors:
            button = page.locator(selector)
            enable(page)
            button.scroll_into_view_if_needed()
            for point in (lambda: page.mouse.move(0, 0), button.hover):
                point()
                page.wait_for_timeout(400)  # colours change slowly
                ink, ground = button.evaluate("b => [getComputedStyle(b).color, getComputedStyle(b).backgroundColor]")
                assert contrast(ink, ground) >= 4.5, (tab, selector, ink, ground)
    page.close()


def brightness(colour):
    return sum(float(x) for x in re.findall(r"[\d.]+", colour)[:3]) / 3


def find_axe():
    """axe.min.js from AXE_PATH, a node_modules above, or npm's global folder; skips where there is none."""
    given = os.environ.get("AXE_PATH")
    places = [Path(given)] if given else []
    places += [folder / "node_modules/axe-core/axe.min.js" for folder in (Path.cwd(), *Path(__file__).parents)]
    if shutil.which("npm"):
        root = subprocess.run(["npm", "root", "-g"], capture_output=True, text=True, timeout=60).stdout.strip()
        places.append(Path(root) / "axe-core/axe.min.js")
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        pytest.skip("axe-core is not here: npm install axe-core, or set AXE_PATH to its axe.min.js")
    return found.read_text("utf-8")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_has_no_serious_finding(browser, app, theme):
    axe = find_axe()
    page = opened(browser, app[0], f"?__theme={theme}")
    page.get_by_role("button", name="Blind test").click()
    enable(page)
    page.wait_for_timeout(1000)
    page.evaluate(axe)
    found = page.evaluate("async () => (await axe.run(document, {resultTypes: ['violations']})).violations")
    serious = [
        f"{v['id']}: {v['help']}: " + json.dumps([n["html"][:150] for n in v["nodes"]][:4])
        for v in found
        if v["impact"] in ("serious", "critical")
    ]
    assert serious == []
    page.close()


def test_the_bundled_model_runs_from_the_page_at_the_smallest_size(browser, launch):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from comfy_sage3.app.services import open_engine

    address, services = launch(open_engine=open_engine)
    page = opened(browser, address)
    fill(page, "#steps input[type=number]", 2)
    choose(page, "Size", "64x64")  # with 17 frames 80 tokens, so that self-attention is not too short for 4 bits
    page.click("#run")
    page.wait_for_function("() => document.querySelector('#verdict').innerText.includes('64 × 64')", timeout=240_000)
    assert "fp4-emulated" in page.locator("#numbers").inner_text()
    assert len(list(services.out.iterdir())) == 1
    assert page.seen.errors == []
    page.close()
