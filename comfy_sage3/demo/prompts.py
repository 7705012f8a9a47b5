"""The bundled model's language: a fixed vocabulary, parsed into a scene, embedded by a seeded hash.

There is no text encoder. A scene has eleven slots (five for each of two objects, and the background); the
embedding of a slot is a vector of +1 and -1 drawn from SHAKE-256 of its name and value, so every machine and
every version computes the same one and no encoder weights are shipped. Wan's cross-attention sees them as eleven
text tokens of 4096 features.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..errors import InputError

SIZES = ("small", "large")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
SHAPES = ("circle", "square", "triangle", "diamond")
MOTIONS = ("left", "right", "up", "down", "still")
SPEEDS = ("slowly", "quickly")
BACKGROUNDS = ("black", "grey", "navy")

MAX_OBJECTS = 2
TEXT_DIM = 4096  # what Wan 2.1 expects of its text encoder
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": SIZES,
    "colour": COLOURS,
    "shape": SHAPES,
    "motion": MOTIONS,
    "speed": SPEEDS,
}
TOKENS = MAX_OBJECTS * len(ATTRIBUTES) + 1

SYNONYMS = {
    **{"big": "large", "huge": "large", "little": "small", "tiny": "small"},
    **{"gray": "grey", "violet": "purple", "disc": "circle", "ball": "circle", "box": "square"},
    **{"leftwards": "left", "rightwards": "right", "upwards": "up", "downwards": "down", "upward": "up"},
    **{"downward": "down", "rising": "up", "falling": "down", "static": "still", "motionless": "still"},
    **{"slow": "slowly", "fast": "quickly", "quick": "quickly"},
}
FILLERS = frozenset(
    [*("a", "an", "the", "on", "in", "of", "to", "at", "with", "is", "are", "that", "which", "background", "video")]
    + [*("moving", "moves", "move", "going", "standing", "stands")]
)
VOCABULARY = tuple(sorted({*SIZES, *COLOURS, *SHAPES, *MOTIONS, *SPEEDS, *BACKGROUNDS}))
_ATTRIBUTE_OF = {word: name for name, words in ATTRIBUTES.items() for word in words}
MAX_PROMPT_CHARACTERS = 500


@dataclass(frozen=True)
class Object:
    """One moving shape; None leaves the choice to the model."""

    size: str | None = None
    colour: str | None = None
    shape: str | None = None
    motion: str | None = None
    speed: str | None = None


@dataclass(frozen=True)
class Scene:
    """Up to two objects on a background; ``objects`` is empty only for the unconditional prompt."""

    objects: tuple[Object, ...] = ()
    background: str | None = None


def parse(text: str) -> Scene:
    """The scene a prompt describes, such as "a small red circle moving left slowly on a black background".

    "and" begins a second object. Raises InputError naming an unknown word and its nearest neighbours, an
    attribute given twice, or a third object.
    """
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise InputError(f"The prompt has {len(text)} characters: shorten it to {MAX_PROMPT_CHARACTERS} or fewer.")
    objects: list[dict[str, str]] = [{}]
    background: str | None = None
    for raw in re.findall(r"[^\s,.;:!]+", text.lower()):
        word = SYNONYMS.get(raw, raw)
        if word in FILLERS:
            continue
        if word == "and":
            objects.append({})
        elif word in BACKGROUNDS:
            if background not in (None, word):
                raise InputError(f"The prompt names two backgrounds, {background} and {word}: keep one of them.")
            background = word
        elif word in _ATTRIBUTE_OF:
            name, known = _ATTRIBUTE_OF[word], objects[-1]
            if known.get(name, word) != word:
                raise InputError(
                    f"One object has two values for {name}, {known[name]} and {word}: "
                    "keep one, or join two objects with 'and'."
                )
            known[name] = word
        else:
            near = difflib.get_close_matches(raw, [*VOCABULARY, *SYNONYMS], n=3, cutoff=0.7)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known words are {', '.join(VOCABULARY)}."
            raise InputError(f"The bundled model does not know the word {raw[:40]!r}: {hint}")
    found = tuple(Object(**o) for o in objects if o)
    if len(found) > MAX_OBJECTS:
        raise InputError(f"The prompt describes {len(found)} objects: the bundled model draws {MAX_OBJECTS} at most.")
    if background and not found:
        found = (Object(),)
    return Scene(found, background)


def describe(scene: Scene) -> str:
    """The scene as a prompt that ``parse`` reads back."""
    parts = []
    for o in scene.objects:
        motion = {None: None, "still": "standing still"}.get(o.motion, f"moving {o.motion}")
        parts.append(" ".join(w for w in ("a", o.size, o.colour, o.shape, motion, o.speed) if w))
    text = " and ".join(parts)
    return f"{text} on a {scene.background} background" if scene.background else text


def slots(scene: Scene) -> list[str]:
    """The eleven slot strings of a scene, in token order: "1.colour=red", "2.shape=none", "background=any", ..."""
    if not scene.objects:
        return [f"{name}=null" for name in _SLOT_NAMES]
    values = []
    for i in range(MAX_OBJECTS):
        for f in fields(Object):
            value = getattr(scene.objects[i], f.name) or "any" if i < len(scene.objects) else "none"
            values.append(value)
    values.append(scene.background or "any")
    return [f"{name}={value}" for name, value in zip(_SLOT_NAMES, values, strict=True)]


def embed(scene: Scene | str) -> Tensor:
    """The text embedding of a scene or prompt, float32 (TOKENS, TEXT_DIM); "" is the unconditional one."""
    if isinstance(scene, str):
        scene = parse(scene)
    return torch.stack([slot_vector(s) for s in slots(scene)])


def slot_vector(slot: str) -> Tensor:
    """+1 and -1 from SHAKE-256 of ``slot``, float32 (TEXT_DIM,)."""
    digest = hashlib.shake_256(f"comfy_sage3 demo 1: {slot}".encode()).digest(TEXT_DIM // 8)
    packed = torch.tensor(list(digest), dtype=torch.uint8)
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten().float() * 2 - 1


_SLOT_NAMES = [f"{i + 1}.{name}" for i in range(MAX_OBJECTS) for name in ATTRIBUTES] + ["background"]
