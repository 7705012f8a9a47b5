"""Which layer calls, and the lists of layers that users type."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_sage3.comfyui.layers import Layer, LayerList
from comfy_sage3.errors import InputError


@pytest.mark.parametrize(
    ("options", "layer", "text"),
    [
        ({"block_index": 3, "block_type": "double"}, Layer("double", 3), "layer double 3"),
        ({"block_index": 0}, Layer("", 0), "layer 0"),
        ({"block": ("input", 4), "block_index": 1}, Layer("input", 4), "layer input 4"),
        ({"block_type": "double"}, None, None),
        ({"block_index": "7"}, None, None),
        ({}, None, None),
        (None, None, None),
    ],
)
def test_a_layer_is_read_from_what_the_model_says(options, layer, text):
    assert Layer.of(options) == layer
    assert layer is None or str(layer) == text


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("0, 1, 28-29", [Layer("", 0), Layer("double", 1), Layer("", 28)], [Layer("", 2), Layer("", 30), None]),
        ("double 0-2, single 37", [Layer("double", 2), Layer("single", 37)], [Layer("single", 2), Layer("double", 37)]),
        (" Double 0 - 2 ;\n5 ", [Layer("double", 1), Layer("single", 5)], [Layer("single", 1)]),
        ("", [], [Layer("", 0)]),
    ],
)
def test_lists_of_layers(text, inside, outside):
    layers = LayerList.parse(text)
    assert bool(layers) == bool(inside)
    assert all(layer in layers for layer in inside)
    assert not any(layer in layers for layer in outside)


@pytest.mark.parametrize("text", ["one", "3-", "5-2", "-1", "double", "0x3", "1 2", "99999999999"])
def test_what_is_no_list_is_named(text):
    with pytest.raises(InputError, match="write (it|them) like"):
        LayerList.parse(text)


@given(st.lists(st.tuples(st.sampled_from(["", "double", "single"]), st.integers(0, 60), st.integers(0, 9)), max_size=6))
def test_a_list_holds_what_was_written(items):
    text = ", ".join(f"{kind} {first}-{first + more}".strip() for kind, first, more in items)
    layers = LayerList.parse(text)
    for kind in ("double", "single"):
        for index in range(75):
            wanted = any(k in ("", kind) and first <= index <= first + more for k, first, more in items)
            assert (Layer(kind, index) in layers) == wanted
