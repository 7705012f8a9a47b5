"""The page: one head, one tab a subject."""

from __future__ import annotations

import importlib
import importlib.util

import gradio as gr

from . import compare_tab
from .services import Services

TITLE = "comfy_sage3: can you trust 4-bit attention?"
INTRODUCTION = (
    "# Sage3: 4-bit attention against exact attention\n"
    "One prompt, one seed, two kinds of arithmetic: look, measure, and decide for your own prompts."
)
OTHERS = (("Study", "study_tab"), ("Kernels", "kernels_tab"), ("History", "history_tab"))


def build(services: Services) -> gr.Blocks:
    """The whole page; not launched."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Tabs():
            with gr.Tab("Compare", id="compare"):
                compare_tab.build(services)
            for name, module in OTHERS:
                if importlib.util.find_spec(f"{__package__}.{module}") is None:
                    continue
                with gr.Tab(name, id=name.lower()):
                    importlib.import_module(f".{module}", __package__).build(services)
    return page
