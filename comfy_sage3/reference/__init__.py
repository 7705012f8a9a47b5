"""The method in plain PyTorch: what every kernel is held against. Imports only torch."""

from .backward import int8_attention_backward
from .forward import (
    OUR_FP4,
    OUR_INT8,
    OUR_INT8_FAST,
    Fp4Options,
    Int8Options,
    exact_attention,
    fp4_attention,
    int8_attention,
)

__all__ = [
    "OUR_FP4",
    "OUR_INT8",
    "OUR_INT8_FAST",
    "Fp4Options",
    "Int8Options",
    "exact_attention",
    "fp4_attention",
    "int8_attention",
    "int8_attention_backward",
]
