"""The ComfyUI node pack: its nodes, the attention hook behind them, and the status they show.

Only this folder imports ComfyUI, and only ComfyUI imports this folder.
"""

from __future__ import annotations

from typing import Any


def extension() -> Any:
    """The V3 extension with the pack's nodes; also makes the bundled weights visible to the stock loaders."""
    from comfy_api.latest import ComfyExtension, io

    from . import compare_node, nodes, plan_node, routes, training_node

    class Sage3Extension(ComfyExtension):
        async def get_node_list(self) -> list[type[io.ComfyNode]]:
            return [
                nodes.Sage3Attention,
                nodes.Sage3Report,
                nodes.Sage3DemoPrompt,
                compare_node.Sage3Compare,
                plan_node.Sage3PrecisionPlan,
                plan_node.Sage3LoadPlan,
                training_node.Sage3TrainingAttention,
            ]

    nodes.register_weights()
    routes.register()
    return Sage3Extension()
