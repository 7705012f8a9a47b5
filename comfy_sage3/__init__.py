"""Low-bit attention for video models: one door (``attention``), a decision with a reason, a report.

    from comfy_sage3 import attention
    out = attention(q, k, v, precision="fp4")  # (batch, heads, tokens, head_dim)

Attention that trains in 8 bits is ``comfy_sage3.training``.
"""

from . import errors, training
from .attention import attention
from .precision import Precision
from .report import Report

__version__ = "0.1.0"

__all__ = ["Precision", "Report", "__version__", "attention", "errors", "training"]
