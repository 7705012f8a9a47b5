"""Which layer of a model a call comes from, as far as ComfyUI says, and lists of layers as a user types them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError

EXAMPLE = '"0, 1, 28-29" or "double 0-2, single 37"'
_ITEM = re.compile(r"(?:([a-z]+)\s+)?(\d+)(?:\s*-\s*(\d+))?")
_MOST = 10_000


@dataclass(frozen=True)
class Layer:
    """A block of a model: its kind ("double", "single", "input", ...; "" where there is one kind) and its number."""

    kind: str
    index: int

    def __str__(self) -> str:
        return f"layer {self.key}"

    @property
    def key(self) -> str:
        """Its name in reports and plans: "3", or "double 3" where a model has kinds."""
        return f"{self.kind} {self.index}" if self.kind else str(self.index)

    @classmethod
    def of(cls, options: Any) -> Layer | None:
        """From a call's ``transformer_options``; None where the model does not say (all models before ComfyUI 0.5).

        A UNet's ``block`` comes first: its ``block_index`` counts inside the block.
        """
        if not isinstance(options, Mapping):
            return None
        block = options.get("block")
        if isinstance(block, (tuple, list)) and len(block) == 2 and isinstance(block[1], int):
            return cls(str(block[0]), block[1])
        index, kind = options.get("block_index"), options.get("block_type")
        return cls(kind if isinstance(kind, str) else "", index) if isinstance(index, int) else None


@dataclass(frozen=True)
class LayerList:
    """Layers as a user lists them: numbers and ranges, of every kind or of the kind named before them."""

    ranges: tuple[tuple[str, int, int], ...] = ()  # kind ("": every), first, last

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, Layer) and any(
            first <= layer.index <= last and kind in ("", layer.kind) for kind, first, last in self.ranges
        )

    def __bool__(self) -> bool:
        return bool(self.ranges)

    @classmethod
    def parse(cls, text: str) -> LayerList:
        """Read "0, 1, 28-29". Raises InputError, naming what cannot be read."""
        ranges = []
        for item in filter(None, (part.strip().lower() for part in re.split(r"[,;\n]", text))):
            match = _ITEM.fullmatch(item)
            if match is None:
                raise InputError(f"{item!r} is not a layer or a range of layers: write them like {EXAMPLE}.")
            first, last = int(match[2]), int(match[3] or match[2])
            if first > last or last > _MOST:
                raise InputError(f"{item!r} is not a range of layers: write it like 28-29.")
            ranges.append((match[1] or "", first, last))
        return cls(tuple(ranges))


NO_LAYERS = LayerList()
