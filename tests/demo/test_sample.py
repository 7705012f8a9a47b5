"""Sampling with the bundled model's recipe, held against a model whose answer is known."""

import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comfy_sage3.demo.prompts import TEXT_DIM, TOKENS, embed
from comfy_sage3.demo.sample import decode, initial_noise, integrate, sample, schedule, velocity
from comfy_sage3.demo.sizes import CPU_SIZE, GPU_SIZE, Size
from comfy_sage3.errors import InputError

SIZE = Size(32, 16, 5)
PROMPT = "a red circle"


class KnownModel(torch.nn.Module):
    """Writes down its calls. Its velocity is the mean of the text plus ``slope`` times the latents."""

    def __init__(self, slope: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=dtype))
        self.slope = slope
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def forward(self, x, time, states, return_dict):
        assert return_dict is False
        self.calls.append((x.clone(), time.clone(), states.clone()))
        return (states.mean((1, 2)).view(-1, 1, 1, 1, 1) + self.slope * x,)


class KnownVae(torch.nn.Module):
    """Decodes to its own input, of which the first three channels are the colours; ``seen`` is that input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = types.SimpleNamespace(latents_mean=list(range(16)), latents_std=[2.0] * 16)

    def decode(self, z, return_dict):
        self.seen = z
        return (z[:, :3],)


def test_schedule_values_by_hand():
    assert schedule(1, 3.0) == [1.0, 0.0]
    assert schedule(4, 1.0) == [1.0, 0.75, 0.5, 0.25, 0.0]
    # 3 s / (1 + 2 s) at s = 3/4, 1/2, 1/4
    assert schedule(4, 3.0) == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    # 7 s / (1 + 6 s)
    assert schedule(2, 7.0) == pytest.approx([1.0, 3.5 / 4, 0.0])


@given(st.integers(1, 100), st.floats(0.1, 20))
def test_a_schedule_falls_from_one_to_zero(steps, shift):
    sigmas = schedule(steps, shift)
    assert len(sigmas) == steps + 1
    assert sigmas[0] == pytest.approx(1.0)
    assert sigmas[-1] == 0.0
    assert sigmas == sorted(set(sigmas), reverse=True)


@given(st.integers(2, 50), st.floats(1.01, 20))
def test_a_larger_shift_stays_longer_at_high_noise(steps, shift):
    assert all(a > b for a, b in zip(schedule(steps, shift)[1:-1], schedule(steps, 1.0)[1:-1], strict=True))


@given(st.integers(0, 2**63 - 1))
def test_noise_depends_on_the_seed_and_on_nothing_else(seed):
    torch.manual_seed(0)
    first = initial_noise(SIZE, seed)
    before = torch.random.get_rng_state()
    assert torch.equal(initial_noise(SIZE, seed), first)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first.shape == (1, *SIZE.latent_shape)
    assert first.dtype == torch.float32
    assert not torch.equal(initial_noise(SIZE, (seed + 1) % 2**63), first)


def test_noise_is_standard_normal_and_the_same_on_every_machine():
    noise = initial_noise(CPU_SIZE, 1)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert noise.flatten()[:4].tolist() == pytest.approx([-1.5255959, -0.7502318, -0.6539809, -1.6094848], abs=1e-6)


@pytest.mark.parametrize(("cfg", "calls"), [(1.0, 1), (1.5, 2), (3.0, 2)])
def test_guidance_takes_a_second_call_only_where_it_changes_anything(cfg, calls):
    model = KnownModel()
    sample(model, PROMPT, size=SIZE, seed=1, steps=3, cfg=cfg)
    assert len(model.calls) == 3 * calls
    for i, (x, _, states) in enumerate(model.calls):
        assert states.shape == (1, TOKENS, TEXT_DIM)
        assert torch.equal(states[0], embed(PROMPT if i % calls == 0 else ""))
        assert x.shape == (1, *SIZE.latent_shape)


def test_guidance_moves_away_from_the_unconditional_answer():
    text, none = embed(PROMPT).mean().item(), embed("").mean().item()
    x = torch.zeros(2, *SIZE.latent_shape)
    found = velocity(KnownModel(), x, 0.5, [PROMPT, ""], 3.0)
    assert found[0].flatten()[0].item() == pytest.approx(none + 3 * (text - none), abs=1e-6)
    assert found[1].flatten()[0].item() == pytest.approx(none, abs=1e-6)


def test_euler_steps_and_times_by_hand():
    model = KnownModel(slope=1.0)
    noise = initial_noise(SIZE, 1)
    done = []
    out = integrate(model, noise, [PROMPT], steps=4, cfg=1.0, shift=3.0, on_step=lambda *x: done.append(x))
    x, text = noise.clone(), embed(PROMPT).mean()
    for now, after in ((1.0, 0.9), (0.9, 0.75), (0.75, 0.5), (0.5, 0.0)):
        x = x + (after - now) * (text + x)
    assert torch.allclose(out, x, atol=1e-5)
    assert [t.item() for _, t, _ in model.calls] == pytest.approx([1000, 900, 750, 500])
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert torch.equal(noise, initial_noise(SIZE, 1))


@pytest.mark.parametrize("size", [CPU_SIZE, GPU_SIZE])
def test_the_shift_is_the_sizes_own_unless_it_is_given(size):
    own, given_ = KnownModel(), KnownModel()
    sample(own, PROMPT, size=size, seed=1, steps=2, cfg=1.0)
    sample(given_, PROMPT, size=size, seed=1, steps=2, cfg=1.0, shift=1.0)
    assert own.calls[1][1].item() == pytest.approx(1000 * schedule(2, size.shift)[1])
    assert given_.calls[1][1].item() == pytest.approx(500)


def test_a_batch_is_its_members():
    noise = torch.cat([initial_noise(SIZE, 1), initial_noise(SIZE, 2)])
    prompts = [PROMPT, "a large blue square on a navy background"]
    both = integrate(KnownModel(slope=0.5), noise, prompts, steps=3)
    for i, prompt in enumerate(prompts):
        alone = integrate(KnownModel(slope=0.5), noise[i : i + 1], [prompt], steps=3)
        assert torch.allclose(both[i : i + 1], alone, atol=1e-6)


def test_latents_stay_float32_where_the_model_is_half_precision():
    model = KnownModel(dtype=torch.bfloat16)
    out = sample(model, PROMPT, size=SIZE, seed=1, steps=1)
    assert out.dtype == torch.float32
    assert {x.dtype for call in model.calls for x in (call[0], call[2])} == {torch.bfloat16}


def test_an_unknown_word_is_refused_before_any_work():
    model = KnownModel()
    with pytest.raises(InputError, match="does not know the word 'unicorn'"):
        integrate(model, initial_noise(SIZE, 1), [PROMPT, "a red unicorn"])
    assert model.calls == []


def test_on_step_may_cancel():
    model = KnownModel()

    def cancel(done, steps):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(model, PROMPT, size=SIZE, seed=1, steps=9, cfg=1.0, on_step=cancel)
    assert len(model.calls) == 2


def test_decoding_undoes_the_normalisation_and_clamps():
    vae = KnownVae()
    latents = torch.tensor([-5.0, 0.0, 5.0, -1.0]).expand(1, 16, 2, 3, 4).contiguous()
    video = decode(vae, latents)
    assert torch.equal(vae.seen, latents * 2 + torch.arange(16.0).view(1, -1, 1, 1, 1))
    assert video.shape == (3, 2, 3, 4)
    assert video.dtype == torch.float32
    assert (video.min(), video.max()) == (-1.0, 1.0)
    assert torch.equal(video, vae.seen[0, :3].clamp(-1, 1))


def test_nothing_here_keeps_a_graph():
    out = sample(KnownModel(), PROMPT, size=SIZE, seed=1, steps=1)
    assert not out.requires_grad
    assert not decode(KnownVae(), out).requires_grad
