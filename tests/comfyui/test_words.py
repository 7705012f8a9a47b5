"""The front end's words: every one has its Chinese, and the settings are named in both languages."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "web" / "js").glob("*.js"))
TEXT = re.compile(r'\bt\("((?:[^"\\]|\\.)*)"')  # t("...")
FORBIDDEN = re.compile(
    r"innerHTML|insertAdjacentHTML|document\.write|\beval\(|\.prototype\b|https?://(?!www\.w3\.org/2000/svg)"
)


def said(language, name):
    return json.loads((ROOT / "locales" / language / f"{name}.json").read_text(encoding="utf-8"))


def test_every_text_of_the_scripts_is_translated_and_no_other():
    texts = [text for script in SCRIPTS for text in TEXT.findall(script.read_text(encoding="utf-8"))]
    assert len(texts) > 40
    assert set(texts) == set(said("zh", "main")["sage3"])


def test_translations_keep_their_places_for_values():
    for english, other in said("zh", "main")["sage3"].items():
        assert sorted(re.findall(r"\{\d\}", english)) == sorted(re.findall(r"\{\d\}", other)), english


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_setting_has_its_name(language):
    ids = {i for script in SCRIPTS for i in re.findall(r'\bid: "(Sage3\.\w+)"', script.read_text(encoding="utf-8"))}
    assert ids == {"Sage3.LiveStatus", "Sage3.Toasts"}
    assert {i.replace(".", "_") for i in ids} == set(said(language, "settings"))


def test_no_script_asks_another_host_or_puts_data_into_markup():
    for script in SCRIPTS:
        assert FORBIDDEN.findall(script.read_text(encoding="utf-8")) == [], script.name
