"""What is trained: settings (data, size, batch, steps), each with several forms of attention and several seeds.

An arm is one setting, one form and one seed. Arms of one setting and seed start from the same weights and see the same
clips, noise levels and noise in the same order, whatever their attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..demo.sizes import CPU_SIZE, GPU_SIZE, Size
from ..errors import InputError

EXACT, AGAIN, INT8, REFERENCE, UNSMOOTHED = "exact", "exact-again", "int8", "int8-reference", "int8-unsmoothed"
FORMS = {
    EXACT: "exact attention, PyTorch's fastest kernel",
    AGAIN: "exact attention by another of PyTorch's kernels: how far rounding alone carries two runs apart",
    INT8: '8-bit attention, forward and backward, as `precision="int8"` runs it',
    REFERENCE: "the same method in plain PyTorch",
    UNSMOOTHED: "the same in plain PyTorch, without K smoothing",
}


@dataclass(frozen=True)
class Setting:
    """Everything of a run but its attention and its seed.

    start: "bundled" weights or "scratch". data: "shapes", as the bundled model was trained on, or "cross": half of the
    objects have a shape that it never saw. size: as ``Size.parse`` reads it. warmup in steps; decay: the share of the steps
    over which the rate falls to nothing. rank: of low-rank adapters, which then are all that is trained (0: everything is).
    clips are encoded once and drawn from; held_out more are for the held-out loss; prompts are drawn and scored at the end.
    seeds 0: the setting is timed only.
    """

    name: str
    title: str
    start: str
    data: str
    size: str
    batch: int
    steps: int
    rate: float
    warmup: int
    decay: float
    clips: int
    forms: tuple[str, ...]
    seeds: int
    held_out: int = 256
    prompts: int = 0
    qk_norm: bool = True
    rank: int = 0

    @property
    def shape(self) -> Size:
        """The size in pixels and frames."""
        return Size.parse(self.size)

    @property
    def tokens(self) -> int:
        """Self-attention tokens that one step sees."""
        return self.batch * self.shape.tokens

    def to_json(self) -> dict[str, Any]:
        """What makes two results the same experiment: neither how many seeds nor which forms ran beside them."""
        made = asdict(self)
        del made["seeds"], made["forms"]
        return made

    @classmethod
    def from_json(cls, made: dict[str, Any]) -> Setting:
        """The setting of a result, without forms and seeds."""
        return cls(**made, forms=(), seeds=0)


@dataclass(frozen=True)
class Arm:
    """One run."""

    setting: Setting
    form: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.setting.name}.{self.form}.seed{self.seed}"


CPU, GPU = str(CPU_SIZE), str(GPU_SIZE)
_FINETUNE = Setting(
    "finetune", "Fine-tuning on a new shape", "bundled", "cross", CPU, batch=32, steps=300, rate=3e-4, warmup=30, decay=0.4,
    clips=1024, forms=(EXACT, AGAIN, INT8, REFERENCE, UNSMOOTHED), seeds=5, prompts=100,
)  # fmt: skip
_PRETRAIN = Setting(
    "pretrain-few", "Pretraining, few tokens a step", "scratch", "shapes", CPU, batch=8, steps=300, rate=1e-3, warmup=50,
    decay=0.4, clips=2048, forms=(EXACT, INT8), seeds=4,
)  # fmt: skip
_MANY = replace(_PRETRAIN, name="pretrain-many", title="Pretraining, many tokens a step", batch=128)


def _without_norm(setting: Setting) -> Setting:
    return replace(setting, name=f"{setting.name}-no-norm", title=f"{setting.title}, no QK norm", qk_norm=False)


SETTINGS: tuple[Setting, ...] = (
    replace(_FINETUNE, name="before", title="The bundled model as it is", steps=0, forms=(EXACT,), seeds=1),
    _FINETUNE, _PRETRAIN, _MANY, _without_norm(_PRETRAIN), _without_norm(_MANY),
    replace(
        _FINETUNE, name="lora", title="Low-rank adapters at 8,100 tokens", size=GPU, batch=4, rank=16, clips=8, held_out=4,
        forms=(EXACT, INT8), seeds=0, prompts=0,
    ),
)  # fmt: skip


def miniature(settings: Iterable[Setting] = SETTINGS) -> tuple[Setting, ...]:
    """Settings a CPU runs in minutes: they show that the study works, and say nothing about attention."""
    return tuple(
        replace(
            s, size="32x32x5", steps=min(s.steps, 8), warmup=2, clips=24, held_out=8, seeds=min(s.seeds, 3),
            batch=8 if s.name.startswith("pretrain-many") else 2, prompts=min(s.prompts, 2),
        )
        for s in settings
    )  # fmt: skip


def chosen(settings: Sequence[Setting], only: Sequence[str], forms: Sequence[str], seeds: int | None) -> list[Setting]:
    """The settings named (all for none), with these forms of theirs (all for none) and at most ``seeds`` seeds.

    Raises InputError for an unknown name.
    """
    known = [s.name for s in settings]
    for kind, asked, there in (("setting", only, known), ("form", forms, list(FORMS))):
        unknown = [name for name in asked if name not in there]
        if unknown:
            raise InputError(f"There is no {kind} {unknown[0]!r}: give some of {', '.join(there)}.")
    if seeds is not None and seeds < 1:
        raise InputError(f"{seeds} seeds are too few: give 1 or more.")
    found = [s for s in settings if not only or s.name in only]
    if forms:
        found = [replace(s, forms=tuple(f for f in s.forms if f in forms)) for s in found]
    if seeds is not None:
        found = [replace(s, seeds=min(s.seeds, seeds)) for s in found]
    return [s for s in found if s.forms]


def arms(settings: Sequence[Setting]) -> list[Arm]:
    """Every arm, all of seed 0 first: a run that is cut short has compared like with like."""
    last = max((s.seeds for s in settings), default=0)
    return [Arm(s, form, seed) for seed in range(last) for s in settings if seed < s.seeds for form in s.forms]
