"""Tables of errors: a label and three numbers a row, as the numerics command prints them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of a table: errors against exact attention, averaged over the seeds."""

    label: str
    cosine: float
    relative_l1: float
    rmse: float


@dataclass(frozen=True)
class Table:
    """A titled list of rows. ``key`` names it in the JSON file."""

    key: str
    title: str
    rows: tuple[Row, ...]


def average(label: str, errors: list[dict[str, float]]) -> Row:
    """A row of the means of ``metrics.attention_error``'s numbers."""
    names = ("cosine", "relative_l1", "rmse")
    return Row(label, *(sum(e[name] for e in errors) / len(errors) for name in names))


def markdown(table: Table) -> str:
    """The table as docs/numerics.md shows it."""
    lines = [f"| {table.title} | cosine | relative L1 | RMSE |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {r.label} | {r.cosine:.2%} | {r.relative_l1:.4f} | {r.rmse:.3g} |" for r in table.rows]
    return "\n".join(lines)
