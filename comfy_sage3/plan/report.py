"""A plan in a few plain lines."""

from __future__ import annotations

from ..precision import Precision
from .plan import MODELLED, LayerPlan


def report(plan: LayerPlan) -> str:
    """What the plan does, what it costs in error and gains in time, and how far these can be believed."""
    counts = plan.counts()
    total = sum(counts.values())
    worst, layer, sigma = plan.worst()
    budget = plan.budget
    named = f"layer {layer}" if layer else "the model"
    lines = [
        f"Plan for {plan.model}: {_number(len(plan.layers), 'layer')}, {_number(sum(plan.steps), 'step')}, "
        f"{len(plan.sigmas)} of them measured.",
        ", ".join(f"{p.value} in {n} of {total} layer steps ({n / total:.0%})" for p, n in counts.items()) + ".",
        f"Error: {plan.mean_error:.4f} in the mean (budget {budget.name}: {budget.error:g}), at most {worst:.4f} "
        f"({named} at sigma {sigma:.3g}; limit {budget.most:g}).",
    ]
    exact, planned = plan.total_seconds(Precision.EXACT), plan.total_seconds()
    uniform = [
        f"{p.value} everywhere {exact / plan.total_seconds(p):.2f} x at error {_mean(plan, p):.4f}"
        for p in plan.errors
        if plan.total_seconds(p) > 0
    ]
    lines.append(
        f"Attention: {_time(exact)} exact, {_time(planned)} planned, {plan.speedup:.2f} x; "
        + "; ".join(uniform)
        + f". No plan within the budget is faster than {exact / plan.bound if plan.bound else 1:.2f} x."
    )
    if plan.costs == MODELLED:
        names = " and ".join(p.value for p in plan.emulated)
        lines.append(
            f"Times are modelled for an {plan.device}, not measured: {names} has no kernel here and was emulated."
            if len(plan.emulated) == 1
            else f"Times are modelled for an {plan.device}, not measured: {names} have no kernel here and were emulated."
        )
    else:
        lines.append(f"Times are measured on this {plan.device}, kernel by kernel on the calls of this sampling.")
    if plan.layers == ("",):
        lines.append("The model does not say which layer calls, so the plan goes by steps only.")
    if "" in plan.layers and len(plan.layers) > 1:
        lines.append('Calls that the model gives no layer for are one row, "".')
    return "\n".join(lines)


def _mean(plan: LayerPlan, precision: Precision) -> float:
    """The mean error with ``precision`` in every cell that can have it."""
    table = plan.errors[precision]
    cells = [(steps, row[column]) for row in table for column, steps in enumerate(plan.steps) if row[column] is not None]
    total = sum(steps for steps, _ in cells)
    return sum(steps * (error or 0.0) for steps, error in cells) / total if total else 0.0


def _number(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
