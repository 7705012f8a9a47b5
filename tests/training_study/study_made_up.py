"""Results as arms write them, with numbers that are made up."""

import math
import random

from comfy_sage3.training_study import pace, settings
from comfy_sage3.training_study.settings import Arm

ALL = ("finetune", "pretrain-few", "pretrain-many")
SETTINGS = {s.name: s for s in settings.SETTINGS}
KERNEL = {"exact": "exact", "int8": "int8-sm90"}


def study(*, gap, seeds=4, names=ALL, noise=0.002, device="NVIDIA H200", broken=()):
    """Results by name. ``gap``: by setting and form, what is added to the loss; ``broken``: names of arms that broke off."""
    found = {}
    for name in names:
        setting = SETTINGS[name]
        for form in setting.forms:
            shift = gap.get((name, form), 0.0)
            for seed in range(seeds):
                arm = Arm(setting, form, seed)
                found[arm.name] = result(arm, shift, noise, device, arm.name in broken)
            found[pace.name_of(setting, form)] = {
                **head(setting, device), "form": form, "step_seconds": [0.02, 0.03 if form == "int8" else 0.04, 0.05],
                "peak_bytes": 2**30 if form == "int8" else 2**31, "calls": {"forward": {}, "backward": {}, "gradients": {}},
            }  # fmt: skip
    return found


def head(setting, device):
    return {
        "schema": 1, "setting": setting.to_json(), "command": "python -m comfy_sage3 train-study run", "device": device,
        "versions": {"torch": "2.11.0"},
    }  # fmt: skip


def result(arm, shift, noise, device, broken):
    own, steps = random.Random(arm.seed), arm.setting.steps  # the seed's own luck, which all forms share
    luck, rest = own.gauss(0, noise), random.Random(arm.name)
    end = steps // 3 if broken else steps
    base = 0.2 if arm.setting.start == "bundled" else 0.4

    def curve(step):
        return base + (1.0 if arm.setting.start == "scratch" else 0.2) * math.exp(-6 * step / steps) + luck

    looks = [
        {"step": s, "loss": curve(s) + shift * s / steps + rest.gauss(0, noise / 10)}
        for s in range(0, end + 1, max(1, steps // 10))
    ]
    last = None if broken else looks[-1]["loss"]
    kernel = KERNEL.get(arm.form, arm.form)
    made = {
        **head(arm.setting, device), "form": arm.form, "seed": arm.seed,
        "losses": [curve(s) + rest.gauss(0, 0.03) for s in range(end)], "held_out": looks,
        "final": {"own": last, "exact": last}, "diverged": end if broken else None, "non_finite_gradients": int(broken),
        "seconds": 9.0, "peak_bytes": 2**31,
        "calls": {
            "forward": {kernel: 6 * end}, "backward": {kernel: 6 * end},
            "gradients": {kernel: 6 * end} if arm.form == "int8" else {},
        },
    }  # fmt: skip
    if broken:
        made["losses"][-1] = None
    elif arm.setting.prompts:
        made["adherence"] = {"prompts": 100, "all": 0.9 + luck, "new": 0.95 + luck, "old": 0.9, "shape": 0.92}
    return made
