"""docs/comfyui.md says what the code does: widgets, badges, templates, thresholds, links."""

import json
import re
from pathlib import Path

import pytest

from comfy_sage3.kernels import devices
from comfy_sage3.precision import MIN_TOKENS, Precision

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs/comfyui.md").read_text(encoding="utf-8")


def section(title):
    return GUIDE.split(f"## {title}\n")[1].split("\n## ")[0]


def test_every_widget_is_explained():
    inputs = set(json.loads((ROOT / "locales/en/nodeDefs.json").read_text(encoding="utf-8"))["Sage3Attention"]["inputs"])
    first_cells = " ".join(re.findall(r"^\| (`[^|]*) \|", section("What each widget does"), re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", first_cells)) == inputs - {"model"}
    for precision in Precision:
        assert f"`{precision.value}`" in section("What each widget does")


def test_badges_are_those_that_the_node_shows():
    shown = {
        re.sub(":.*", "", word) for word in re.findall(r'word: t\("([^"]+)"\)', (ROOT / "web/js/sage3_run.js").read_text())
    }
    told = set(re.findall(r"^\| \*\*([^*]+)\*\* \|", section("Five minutes"), re.MULTILINE))
    assert told == shown - {"waiting"}


def test_templates_are_there_and_all_are_named():
    told = set(re.findall(r"`(\w[\w.]*)`", "".join(re.findall(r"^\| (`.*?) \|", section("Five minutes"), re.MULTILINE))))
    assert told == {p.stem for p in (ROOT / "workflows").glob("*.json")}


@pytest.mark.parametrize(
    "text",
    [
        f"4 bits from {devices.FP4_AUTO_FROM_KEYS} keys, 8 bits from {devices.INT8_AUTO_FROM_KEYS}",
        f"by `auto` from {devices.INT8_AUTO_FROM_KEYS_ON_HOPPER} keys",
        f"*fewer than {MIN_TOKENS} tokens*",
        "not yet run on a Blackwell one",
    ],
)
def test_numbers_are_those_of_the_code(text):
    assert text in GUIDE


def test_every_gpu_that_has_a_kernel_is_in_the_table():
    table = section("Which GPU gets what")
    for kernel in devices.KERNELS:
        if kernel.compiled:
            assert f"`{kernel.name}`" in table or f"`{kernel.precision}`" in table
        for major, minor in kernel.capabilities:
            assert f"sm_{major}{minor}" in table or (7, 5) <= (major, minor) <= (8, 9)  # "sm_75 to sm_89"


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)", GUIDE):
        assert (ROOT / "docs" / target).exists(), target
    assert "](docs/comfyui.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
