"""What a visitor may send: everything is checked on the server, whatever the page allows."""

import math

import pytest

from comfy_sage3.app import form
from comfy_sage3.app.services import EMBEDDED, Limits, Services
from comfy_sage3.errors import InputError
from comfy_sage3.precision import Precision

GOOD = ("a red circle", "", 1, 4, 3.0, "64x64", 5)
NAMES = ("prompt", "negative", "seed", "steps", "cfg", "size", "frames")


def test_a_good_form_becomes_a_request():
    request = form.request("a red circle", "a blue square", 7.0, 4, 3, "64 x 48", 5.0)
    assert (request.prompt, request.negative, request.seed, request.steps, request.cfg) == (
        "a red circle",
        "a blue square",
        7,
        4,
        3,
    )
    assert str(request.size) == "64x48x5"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("seed", math.nan, "seed"),
        ("seed", math.inf, "seed"),
        ("seed", -1, "seed"),
        ("seed", 2**80, "seed"),
        ("seed", 10**400, "seed"),
        ("seed", 1.5, "whole number"),
        ("seed", True, "seed"),
        ("seed", None, "seed"),
        ("seed", "1; import os", "seed"),
        ("steps", 0, "steps"),
        ("steps", 10**9, "steps"),
        ("steps", [3], "steps"),
        ("cfg", math.nan, "guidance"),
        ("cfg", 1e308, "guidance"),
        ("size", "99999x99999", "multiple of 16|1280"),
        ("size", "64x64x64", "size"),
        ("size", "0x0", "width"),
        ("size", "../../etc/passwd", "size"),
        ("size", {"a": 1}, "size"),
        ("frames", 4, "frames"),
        ("frames", 10**7 + 1, "frames"),
        ("frames", math.nan, "frames"),
        ("prompt", "x" * 100_000, "500"),
        ("prompt", "a red circle\x00", "NUL"),
        ("prompt", ["a"], "text"),
        ("negative", "y" * 501, "500"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence_that_names_it(name, value, says):
    given = dict(zip(NAMES, GOOD, strict=True)) | {name: value}
    with pytest.raises(InputError, match=says) as refused:
        form.request(**given)
    assert len(str(refused.value)) < 200
    assert "\n" not in str(refused.value)


def test_sides_by_precision_by_file_and_by_name_on_the_server(tmp_path):
    assert form.side("A", "int8", None, "", server=False).precision is Precision.INT8
    assert form.side("B", "plan", None, "mine", server=True).saved == "mine"
    with pytest.raises(InputError, match="upload"):
        form.side("A", "plan", None, "", server=False)
    with pytest.raises(InputError, match="saved on the server"):
        form.side("A", "plan", None, " ", server=True)
    wrong = tmp_path / "plan.json"
    wrong.write_text("{}")
    with pytest.raises(InputError, match="not a precision plan"):
        form.side("A", "plan", str(wrong), "", server=False)
    with pytest.raises(InputError, match="Unknown precision"):
        form.side("A", "<script>", None, "", server=False)


@pytest.mark.parametrize("value", [0, 6, math.nan, 10**6])
def test_timed_runs_are_bounded(value):
    with pytest.raises(InputError, match="timed runs"):
        form.repeats(value, Limits())


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "127.0.0.1:8188", "http://", "http://user:pw@host", "http://host/?q=1", "gopher://x", None]
)
def test_what_is_no_servers_address_is_refused(url, tmp_path):
    with pytest.raises(InputError, match="address"):
        form.address("server", url, Services(tmp_path))


def test_a_public_app_calls_no_address_but_its_own(tmp_path):
    services = Services(tmp_path, engine="http://127.0.0.1:8188", mask_errors=True)
    assert form.address("server", "http://127.0.0.1:8188/", services) == "http://127.0.0.1:8188"
    assert form.address(EMBEDDED, "", services) == EMBEDDED
    with pytest.raises(InputError, match="started with"):
        form.address("server", "http://10.0.0.1:80", services)


def test_the_packs_workflows_are_offered_but_for_those_that_draw_both_sides():
    found = form.workflows()
    assert "flux_dev_text_to_image" in found
    assert "wan2.2_14b_text_to_video" in found
    assert "text_to_video_ab" not in found
    assert form.workflow("flux_dev_text_to_image", None).attention == ("53",)
    assert form.workflow(form.BUNDLED_GRAPH, None) is None
    with pytest.raises(InputError, match="no workflow"):
        form.workflow("../../../etc/passwd", None)
