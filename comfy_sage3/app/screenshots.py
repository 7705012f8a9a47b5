"""``python -m comfy_sage3.app.screenshots``: the README's pictures of the app, taken of the recorded comparison.

Needs Playwright and a Chromium (SAGE3_CHROMIUM, one on PATH, or Playwright's own).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..errors import InputError, Sage3Error
from .launch import check_gradio, private_folder, start
from .services import Services

OUT = "docs/images"
SHOTS = (  # name, theme, width, height, what is done before
    ("app", "light", 1280, 980, "split"),
    ("app-difference", "dark", 1280, 980, "difference"),
    ("app-narrow", "light", 390, 980, "split"),
)


def take(out: Path) -> list[Path]:
    """Write every picture to ``out``. Raises InputError where Playwright or a Chromium is missing."""
    check_gradio()
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        raise InputError(
            "The screenshots need Playwright: pip install playwright, then playwright install chromium."
        ) from None
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as runs, private_folder(), sync_playwright() as playwright:
        page, address = start(Services(Path(runs) / "none"), host="127.0.0.1", port=0)
        try:
            path = os.environ.get("SAGE3_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            made = [_take(browser, address, out, *shot) for shot in SHOTS]
            browser.close()
        except Error as error:
            raise InputError(
                f"The browser failed ({str(error).splitlines()[0][:200]}): set SAGE3_CHROMIUM to one."
            ) from None
        finally:
            page.close(verbose=False)
    return made


def _take(browser: Any, address: str, out: Path, name: str, theme: str, width: int, height: int, mode: str) -> Path:
    view = browser.new_page(viewport={"width": width, "height": height}, reduced_motion="reduce")
    view.goto(f"{address}?__theme={theme}")
    view.wait_for_function("() => document.querySelector('.s3-numbers')?.textContent && document.fonts.status === 'loaded'")
    view.click(f"[data-mode={mode}]")
    view.get_by_role("button", name="Worst frame").click()
    view.mouse.move(0, 0)
    view.evaluate("() => { document.activeElement.blur(); scrollTo(0, 0); }")
    view.wait_for_timeout(500)
    path = out / f"{name}.png"
    view.screenshot(path=path)
    view.close()
    return path


def main(argv: list[str] | None = None) -> int:
    """0, or 2 with one sentence."""
    parser = argparse.ArgumentParser(prog="python -m comfy_sage3.app.screenshots", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(OUT), help=f"folder for the pictures (default: {OUT})")
    try:
        for path in take(parser.parse_args(argv).out):
            print(path)
    except Sage3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
