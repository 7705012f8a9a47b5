"""Train the bundled model on one GPU, in slices with checkpoints: first the VAE, then the transformer.

    python -m comfy_sage3 train-demo vae --budget 480 --slice 480 --out runs/demo
    python -m comfy_sage3 train-demo transformer --budget 560 --slice 560 --out runs/demo
    python -m comfy_sage3 train-demo score --out runs/demo

A stage goes on from its checkpoint; where that is gone it goes on from the exported weights in ``--out``, with the
schedule and the training curve they stand at, so a larger ``--budget`` trains the shipped weights further.

The data is drawn on the fly (shapes.py). The contract is ComfyUI's for Wan 2.1: flow matching, v = noise - x0,
timestep = sigma * 1000, latents with Wan 2.1's per-channel mean and deviation (folded into the VAE's last encoder
and first decoder layer, so stock loaders need to know nothing).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from . import fast_vae, load, native
from .prompts import ATTRIBUTES, BACKGROUNDS, MAX_OBJECTS, MOTIONS, TOKENS, describe, slot_vector
from .sample import initial_noise, integrate, latent_statistics
from .score import accuracy, adherence, shares
from .shapes import Labels, held_out, held_out_scenes, random_labels, render, render_labels
from .sizes import CPU_SIZE, GPU_SIZE, Size

SMALL_SIZE = Size(width=64, height=64, frames=9)  # 48 tokens: most of the learning happens here, cheaply
# Clips, frames, window in pixels. A causal decoder drifts past the longest clip it has seen (to 23 dB within eight
# frames, measured), so the last phase shows it the GPU size's 33 frames; width alone does no harm.
VAE_BATCHES = {"small": (48, 9, 64), "large": (8, 17, 128), "long": (16, 33, 64)}
VAE_LAST_PHASE = ("long", "small", "long", "large")
LATENT_SETS = {SMALL_SIZE: (8_000, 512), CPU_SIZE: (8_000, 128), GPU_SIZE: (700, 6)}  # clips encoded, batch
SCORED = {SMALL_SIZE: (200, 100), CPU_SIZE: (200, 50), GPU_SIZE: (200, 8)}  # held-out prompts, batch

RECONSTRUCTED = {SMALL_SIZE: 64, CPU_SIZE: 64, GPU_SIZE: 8}  # clips through the VAE and back
FOLDED = {SMALL_SIZE: 2048, CPU_SIZE: 512, GPU_SIZE: 8}  # clips whose latents are measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``train-demo``."""
    parser.add_argument("stage", choices=["vae", "transformer", "score"])
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and results")
    parser.add_argument("--budget", type=float, default=480, help="seconds of training in all (sets the schedule)")
    parser.add_argument("--slice", type=float, default=480, help="seconds of training in this call, then checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")


def run(args: argparse.Namespace) -> int:
    """Run one stage. Raises InputError when a stage's input is missing."""
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    {"vae": train_vae, "transformer": train_transformer, "score": score}[args.stage](args)
    return 0


def bf16(device: str | torch.device) -> torch.autocast:
    """Mixed precision on a GPU; full precision on a CPU, where bf16 convolutions are very slow."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")


def fastest_attention() -> AbstractContextManager[Any]:
    """cuDNN's attention first: on Hopper its backward takes 0.6 of FlashAttention-2's time at 8,100 tokens."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


class Trainer:
    """AdamW with warm-up, a constant rate and a linear decay over the last part of a time budget; EMA; checkpoints."""

    warmup = 200  # steps

    def __init__(self, name: str, module: Any, args: argparse.Namespace, rate: float, decay: float) -> None:
        self.path = args.out / f"{name}.checkpoint.safetensors"
        self.module, self.budget, self.slice, self.rate, self.decay = module, args.budget, args.slice, rate, decay
        self.parameters = {k: p for k, p in module.named_parameters() if p.requires_grad}
        self.ema = {k: p.detach().clone() for k, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), rate, betas=(0.9, 0.95), weight_decay=0.01, fused=args.device != "cpu"
        )
        self.step, self.offset, self.before = 0, 0, 0.0
        self.curve: list[dict[str, Any]] = []
        if self.path.exists():
            self._resume()
        self.start = time.monotonic()

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, over all slices."""
        return (self.before + time.monotonic() - self.start) / self.budget

    def steps(self) -> Iterator[int]:
        """Step numbers until this slice or the budget ends; writes the checkpoint at the end.

        The clock starts here: loading and encoding are not training, however slow the machine.
        """
        self.start = time.monotonic()
        while time.monotonic() - self.start < self.slice and self.progress < 1:
            yield self.step
        self._save()

    def descend(self, loss: Tensor) -> Tensor:
        """One optimizer and EMA step. Returns the norm of the gradient before it was clipped, on the device."""
        warm = min(1, (self.step + 1) / self.warmup)
        rate = self.rate * warm * max(0.01, min(1, (1 - self.progress) / self.decay))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.step += 1
        keep = min(0.999, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.parameters.values()], 1 - keep)
        return norm

    def update(self, loss: Tensor, log: dict[str, float] | None = None) -> None:
        """One step; the loss is logged every 100."""
        self.descend(loss)
        if self.step % 100 == 0 or self.step < 3:
            seconds = self.progress * self.budget
            row = {"step": self.step + self.offset, "seconds": round(seconds, 1), "loss": round(loss.item(), 5)}
            row |= log or {}
            self.curve.append(row)
            if self.step % 500 == 0 or self.step < 3:
                print(self.path.name.split(".")[0], row, flush=True)

    def _save(self) -> None:
        from safetensors.torch import save_file

        if not self.step:
            return  # too short a slice: nothing was learnt, and Adam has no moments yet
        tensors = {f"model.{k}": p.detach() for k, p in self.parameters.items()}
        tensors |= {f"ema.{k}": p for k, p in self.ema.items()}
        for k, p in self.parameters.items():
            tensors |= {f"{n}.{k}": t for n, t in self.optimizer.state[p].items() if t.ndim}
        state = {"step": self.step, "offset": self.offset, "seconds": self.progress * self.budget, "curve": self.curve}
        save_file({k: t.contiguous() for k, t in tensors.items()}, self.path, {"state": json.dumps(state)})

    def _resume(self) -> None:
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file, torch.no_grad():
            state = json.loads(file.metadata()["state"])
            for k, p in self.parameters.items():
                p.copy_(file.get_tensor(f"model.{k}"))
                self.ema[k].copy_(file.get_tensor(f"ema.{k}"))
                moments = {n: file.get_tensor(f"{n}.{k}").to(p) for n in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[p] = {"step": torch.tensor(float(state["step"]), device=p.device), **moments}
        self.step, self.offset = state["step"], state["offset"]
        self.before, self.curve = state["seconds"], state["curve"]

    def go_on_from(self, state: dict[str, Tensor], curve: list[dict[str, Any]]) -> None:
        """Continue from exported weights when the checkpoint is gone: same schedule and curve, fresh moments."""
        with torch.no_grad():
            for k, p in self.parameters.items():
                p.copy_(state[k])
                self.ema[k].copy_(state[k])
        self.curve, self.before = curve, curve[-1]["seconds"]
        self.offset = curve[-1]["step"]

    def continue_export(self, args: argparse.Namespace, name: str, converter: str) -> list[dict[str, Any]]:
        """Where there is no checkpoint but an export, go on from that; returns what earlier slices were fed."""
        entry = _entry(args, name)
        if entry is None:
            return []
        if not self.step:
            fresh = load.new_vae() if name == load.VAE_FILE else load.new_transformer()
            self.go_on_from(_exported(args, name, fresh, converter).state_dict(), entry["curve"])
        return list(entry["slices"])

    def finished(self) -> dict[str, Tensor]:
        """The averaged weights."""
        return {k: p.detach() for k, p in self.ema.items()}


def export(args: argparse.Namespace, name: str, state: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write a weight file in fp16 under Wan's own key names, and its entry in weights.json."""
    from safetensors.torch import save_file

    halves = {k: t.half().contiguous().cpu() for k, t in state.items()}
    if not all(bool(t.isfinite().all()) for t in halves.values()):
        raise InputError(f"{name} does not fit fp16: train again with a lower rate.")
    save_file(halves, args.out / name)
    data = (args.out / name).read_bytes()
    card_path = args.out / load.CARD_FILE
    card = json.loads(card_path.read_text(encoding="utf-8")) if card_path.exists() else {"files": {}}
    card["made_on"] = {"device": device_name(args.device), "torch": torch.__version__, "python": platform.python_version()}
    card["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **about}
    card_path.write_text(json.dumps(card, indent=1), encoding="utf-8")


def device_name(device: str) -> str:
    """The GPU's name, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"


# The VAE ------------------------------------------------------------------------------------------------------------


def train_vae(args: argparse.Namespace) -> None:
    """Reconstruction with weight on edges, a light KL, latent noise so that the decoder forgives."""
    vae = load.new_vae().to(args.device)
    trainer = Trainer("vae", vae, args, rate=2e-3, decay=0.5)
    slices = trainer.continue_export(args, load.VAE_FILE, "convert_wan_vae_to_diffusers")
    begun = trainer.step + trainer.offset
    centre, spread = latent_statistics(vae, torch.empty(0, device=args.device))
    generator = torch.Generator(args.device).manual_seed(begun)
    host = torch.Generator().manual_seed(begun)

    def objective(video: Tensor, noise: Tensor, blur: Tensor) -> tuple[Tensor, Tensor]:
        with bf16(args.device):
            mean, log_variance = fast_vae.encode(vae, video)
            mean, log_variance = (mean - centre) / spread, log_variance - 2 * spread.log()
            latents = mean + torch.exp(0.5 * log_variance) * noise[0] + 0.2 * blur * noise[1]
            output = fast_vae.decode(vae, latents * spread + centre).float()
        edges = (video - F.avg_pool3d(video, (1, 5, 5), 1, (0, 2, 2))).abs().amax(1, keepdim=True)
        error = output - video
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = (error.abs() * (1 + 4 * edges)).mean() + error.square().mean() + 2e-4 * divergence
        return loss, error.square().mean()

    small = objective if args.no_compile else torch.compile(objective, dynamic=False)
    for step in trainer.steps():
        kind = VAE_LAST_PHASE[step % 4] if trainer.progress > 0.6 else "small"
        batch, frames, window = VAE_BATCHES[kind]
        canvases = [c for c in (64, 64, 96, 128, 128, 256, 480) if c >= window]
        canvas = canvases[int(torch.randint(len(canvases), (), generator=host))]
        labels = random_labels(batch, generator)
        video = render_labels(labels, frames, canvas, canvas, generator, window=window)
        shape = (2, batch, 16, (frames - 1) // 4 + 1, window // 8, window // 8)
        noise = torch.randn(shape, generator=generator, device=args.device)
        blur = torch.rand(batch, 1, 1, 1, 1, generator=generator, device=args.device)
        loss, squared = (small if kind == "small" else objective)(video, noise, blur)
        log = {"psnr": round(10 * math.log10(4 / squared.item()), 2)} if trainer.step % 100 == 99 else None
        trainer.update(loss, log)

    vae.load_state_dict(trainer.finished())
    fold_statistics(vae, args.device)
    slices.append({"steps": trainer.step + trainer.offset - begun, "batches": VAE_BATCHES})
    about = {"parameters": sum(p.numel() for p in vae.parameters()), "curve": trainer.curve, "slices": slices}
    about["reconstruction"] = {str(size): reconstruction(vae, size, n, args.device) for size, n in RECONSTRUCTED.items()}
    print(json.dumps(about["reconstruction"]), flush=True)
    export(args, load.VAE_FILE, native.vae_to_native(vae.state_dict()), about)


@torch.no_grad()
def encoded(vae: Any, labels: Labels, size: Size, generator: torch.Generator) -> Tensor:
    """Latents (B, 16, T', H/8, W/8) of freshly drawn clips, in slices that fit in memory."""
    pixels = size.width * size.height * size.frames
    chunk = max(1, 40_000_000 // pixels)
    parts = []
    for i in range(0, len(labels), chunk):
        rows = slice(i, i + chunk)
        part = Labels(labels.objects[rows], labels.present[rows], labels.background[rows])
        video = render_labels(part, size.frames, size.height, size.width, generator)
        with bf16(video.device):
            parts.append(fast_vae.encode(vae, video)[0])
    return torch.cat(parts)


@torch.no_grad()
def fold_statistics(vae: Any, device: str) -> None:
    """Scale and shift the latents so that (z - mean) / std with Wan 2.1's constants is standard, changing no pixel."""
    generator = torch.Generator(device).manual_seed(1)
    z = torch.cat(
        [
            encoded(vae, random_labels(n, generator), size, generator).transpose(0, 1).flatten(1)
            for size, n in FOLDED.items()
        ],
        1,
    ).double()
    mean, std = (t.flatten().double() for t in latent_statistics(vae, z))
    gain = std / z.std(1)
    shift = mean - gain * z.mean(1)
    # Encoder: mean' = gain * mean + shift, log_variance' = log_variance + 2 log gain. Decoder: z = (z' - shift) / gain.
    both = torch.cat([gain, torch.ones_like(gain)])
    weight = vae.quant_conv.weight.double() * both.view(-1, 1, 1, 1, 1)
    bias = vae.quant_conv.bias.double() * both + torch.cat([shift, 2 * gain.log()])
    vae.quant_conv.weight.copy_(weight)
    vae.quant_conv.bias.copy_(bias)
    inner = vae.post_quant_conv.weight.double()
    vae.post_quant_conv.bias.copy_(vae.post_quant_conv.bias.double() - inner[:, :, 0, 0, 0] @ (shift / gain))
    vae.post_quant_conv.weight.copy_(inner / gain.view(1, -1, 1, 1, 1))


@torch.no_grad()
def reconstruction(vae: Any, size: Size, count: int, device: str) -> dict[str, float]:
    """PSNR in dB and the scorer's verdict on held-out clips after a round trip through the VAE."""
    scenes = held_out_scenes(count, seed=11)
    video = render(scenes, size.frames, size.width, seed=12).to(device)
    parts = []
    for clip in video.split(max(1, 40_000_000 // video[0].numel())):
        with bf16(clip.device):
            parts.append(fast_vae.decode(vae, fast_vae.encode(vae, clip)[0]).float().clamp(-1, 1))
    output = torch.cat(parts)
    psnr = 10 * math.log10(4 / (output - video).square().mean().item())
    return {"psnr": round(psnr, 2), **{k: round(v, 4) for k, v in accuracy(output, scenes).items()}}


# The transformer ----------------------------------------------------------------------------------------------------


class TextTable:
    """Slot embeddings as one table on the device, so that a batch of labels becomes text tokens by a gather."""

    SPECIAL = ("null", "none", "any")

    def __init__(self, device: str) -> None:
        names = [(f"{i + 1}.{name}", words) for i in range(MAX_OBJECTS) for name, words in ATTRIBUTES.items()]
        rows, width = [*names, ("background", BACKGROUNDS)], len(self.SPECIAL) + max(map(len, ATTRIBUTES.values()))
        table = torch.zeros(TOKENS, width, slot_vector("").numel())
        for i, (name, words) in enumerate(rows):
            for j, value in enumerate((*self.SPECIAL, *words)):
                table[i, j] = slot_vector(f"{name}={value}")
        self.table = table.to(device)

    def tokens(self, labels: Labels, generator: torch.Generator, *, drop_all: float, drop: float) -> Tensor:
        """(B, 11, 4096) for a batch of labels; prompts are emptied, attributes left open, with these chances."""
        null, none, unnamed = range(3)
        batch, device = len(labels), generator.device
        objects = labels.objects + len(self.SPECIAL)
        still = labels.objects[..., 3] == MOTIONS.index("still")
        objects[..., 4] = torch.where(still, unnamed, objects[..., 4])
        index = torch.cat([objects.flatten(1), labels.background[:, None] + len(self.SPECIAL)], 1)
        index = torch.where(torch.rand(index.shape, generator=generator, device=device) < drop, unnamed, index)
        absent = ~labels.present.repeat_interleave(len(ATTRIBUTES), 1)
        index[:, :-1] = torch.where(absent, none, index[:, :-1])
        empty = torch.rand(batch, 1, generator=generator, device=device) < drop_all
        index = torch.where(empty, null, index)
        return self.table[torch.arange(TOKENS, device=device), index]


class LatentSet:
    """Clips of one size, encoded once, drawn at random. ``latents`` are normalised, fp16 (clips, 16, T', H/8, W/8)."""

    def __init__(self, labels: Labels, latents: Tensor, batch: int) -> None:
        self.labels, self.latents, self.batch = labels, latents, batch

    @classmethod
    def fresh(cls, vae: Any, size: Size, count: int, batch: int, generator: torch.Generator) -> LatentSet:
        """``count`` new clips without any combination that is held out."""
        labels = random_labels(int(count * 1.25) + 8, generator)
        keep = (~held_out(labels)).nonzero().flatten()[:count]
        labels = Labels(labels.objects[keep], labels.present[keep], labels.background[keep])
        return cls(labels, normalised(vae, labels, size, generator), batch)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Labels]:
        """(batch, 16, T', H/8, W/8) in float32, and the labels."""
        rows = torch.randint(len(self.labels), (self.batch,), generator=generator, device=generator.device)
        labels = Labels(self.labels.objects[rows], self.labels.present[rows], self.labels.background[rows])
        return self.latents[rows].float(), labels


def normalised(vae: Any, labels: Labels, size: Size, generator: torch.Generator) -> Tensor:
    """Latents of freshly drawn clips as the transformer sees them, fp16 (B, 16, T', H/8, W/8)."""
    latents = encoded(vae, labels, size, generator)
    mean, std = latent_statistics(vae, latents)
    return ((latents - mean) / std).half()


def flow_loss(model: Any, clean: Tensor, states: Tensor, shift: float, generator: torch.Generator) -> Tensor:
    """The training loss of one batch at random noise levels: see ``velocity_loss``."""
    level = torch.sigmoid(torch.randn(len(clean), generator=generator, device=clean.device))
    noise = torch.randn(clean.shape, generator=generator, device=clean.device)
    return velocity_loss(model, clean, noise, shift * level / (1 + (shift - 1) * level), states)


def velocity_loss(model: Any, clean: Tensor, noise: Tensor, sigma: Tensor, states: Tensor) -> Tensor:
    """Mean squared error of the predicted velocity (noise - clean), with one noise level ``sigma`` (B,) a clip."""
    with bf16(clean.device), fastest_attention():
        noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
        predicted = model(noisy, sigma * 1000, states, return_dict=False)[0]
    return F.mse_loss(predicted.float(), noise - clean)


def train_transformer(args: argparse.Namespace) -> None:
    """Rectified flow on encoded clips: small ones first, then the CPU size, then the GPU size mixed in."""
    vae = _exported(args, load.VAE_FILE, load.new_vae(), "convert_wan_vae_to_diffusers")
    model = load.new_transformer().to(args.device)
    trainer = Trainer("transformer", model, args, rate=1e-3, decay=0.4)
    slices = trainer.continue_export(args, load.TRANSFORMER_FILE, "convert_wan_transformer_to_diffusers")
    begun_at = trainer.step + trainer.offset
    generator = torch.Generator(args.device).manual_seed(2 + begun_at)  # every slice sees clips of its own
    begun = time.monotonic()
    sets = {size: LatentSet.fresh(vae, size, n, batch, generator) for size, (n, batch) in LATENT_SETS.items()}
    del vae
    print(f"encoded {sum(n for n, _ in LATENT_SETS.values())} clips in {time.monotonic() - begun:.0f} s", flush=True)

    text = TextTable(args.device)
    forward = model if args.no_compile else torch.compile(model, dynamic=False)
    for step in trainer.steps():
        size = _phase(trainer.progress, step)
        clean, labels = sets[size].draw(generator)
        states = text.tokens(labels, generator, drop_all=0.1, drop=0.05)
        # The last phase has few small clips: not worth compiling for them again after a resume.
        run_model = model if size == SMALL_SIZE and trainer.progress > 0.6 else forward
        trainer.update(flow_loss(run_model, clean, states, size.shift, generator), {"tokens": size.tokens})

    seen = {str(size): {"clips": n, "batch": b} for size, (n, b) in LATENT_SETS.items()}
    slices.append({"steps": trainer.step + trainer.offset - begun_at, "seen": seen})
    about = {"parameters": sum(p.numel() for p in model.parameters()), "curve": trainer.curve, "slices": slices}
    export(args, load.TRANSFORMER_FILE, native.transformer_to_native(trainer.finished()), about)


def _phase(progress: float, step: int) -> Size:
    if progress < 0.3:
        return SMALL_SIZE
    if progress < 0.6:
        return SMALL_SIZE if step % 4 == 0 else CPU_SIZE
    return (GPU_SIZE, GPU_SIZE, CPU_SIZE, GPU_SIZE, GPU_SIZE, GPU_SIZE, CPU_SIZE, SMALL_SIZE)[step % 8]


# Scores -------------------------------------------------------------------------------------------------------------


def score(args: argparse.Namespace) -> None:
    """Held-out prompts through the exported files: adherence at every size, with the scorer's own accuracy beside it."""
    vae = _exported(args, load.VAE_FILE, load.new_vae(), "convert_wan_vae_to_diffusers")
    model = _exported(args, load.TRANSFORMER_FILE, load.new_transformer(), "convert_wan_transformer_to_diffusers")
    scores: dict[str, Any] = {}
    for size, (count, batch) in SCORED.items():
        scenes = held_out_scenes(count, seed=21)
        prompts = [describe(s) for s in scenes]
        verdicts: list[dict[str, bool | None]] = []
        begun = time.monotonic()
        for i in range(0, count, batch):
            rows = slice(i, i + batch)
            noise = torch.cat([initial_noise(size, 1000 + j) for j in range(count)[rows]])
            with bf16(args.device), torch.inference_mode():
                latents = integrate(model, noise, prompts[rows], shift=size.shift)
                mean, std = latent_statistics(vae, latents)
                video = fast_vae.decode(vae, latents * std + mean).float().clamp(-1, 1)
            verdicts += [adherence(v, s) for v, s in zip(video, scenes[rows], strict=True)]
            if i == 0:
                contact_sheet(video[:12], args.out / f"samples-{size}.png")
        truth = [
            adherence(render([s], size.frames, size.width, seed=22 + j)[0].to(args.device), s) for j, s in enumerate(scenes)
        ]
        result = {"prompts": count, "shift": size.shift, "model": shares(verdicts), "scorer_on_truth": shares(truth)}
        scores[str(size)] = result
        print(f"{size} {time.monotonic() - begun:.0f} s", json.dumps(result), flush=True)
    card_path = args.out / load.CARD_FILE
    card = json.loads(card_path.read_text(encoding="utf-8"))
    card["scores"] = {"steps": 20, "cfg": 3.0, "seed": 1000, "held_out": True, "sizes": scores}
    card_path.write_text(json.dumps(card, indent=1), encoding="utf-8")


def contact_sheet(videos: Tensor, path: Path) -> None:
    """One row per video, four frames each, as a PNG."""
    from PIL import Image

    rows = videos[:, :, torch.linspace(0, videos.shape[2] - 1, 4).long()]
    sheet = ((rows + 1) * 127.5).round().byte().permute(0, 3, 2, 4, 1).flatten(0, 1).flatten(1, 2)
    Image.fromarray(sheet.cpu().numpy()).save(path)


def _entry(args: argparse.Namespace, name: str) -> dict[str, Any] | None:
    """What weights.json in ``--out`` says of an exported file; None where there is no export."""
    path = args.out / load.CARD_FILE
    if not path.exists() or not (args.out / name).exists():
        return None
    return json.loads(path.read_text(encoding="utf-8"))["files"].get(name)


def _exported(args: argparse.Namespace, name: str, module: Any, converter: str) -> Any:
    from safetensors.torch import load_file

    path = args.out / name
    if not path.exists():
        raise InputError(f"{path} is not there yet: run the stage that makes it first.")
    state = getattr(load._single_file(), converter)(load_file(path))
    return load._filled(module, state, args.device, torch.float32)
