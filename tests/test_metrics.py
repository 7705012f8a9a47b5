"""Metrics against formulae written another way, and against values known beforehand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from comfy_sage3.errors import InputError
from comfy_sage3.metrics import (
    SSIM_CONVENTION,
    attention_error,
    flicker,
    motion_energy,
    psnr,
    ssim,
    worst_frame,
)


def videos(seed=0, shape=(3, 24, 30, 3), noise=0.1):
    rng = np.random.default_rng(seed)
    a = rng.random(shape)
    return a, np.clip(a + noise * rng.standard_normal(shape), 0, 1)


def test_attention_error_on_a_case_done_by_hand():
    error = attention_error(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1.0, 0.0, 2.0]))
    assert error["cosine"] == pytest.approx(1 / 5)
    assert error["relative_l1"] == pytest.approx(4 / 3)
    assert error["rmse"] == pytest.approx((8 / 3) ** 0.5)
    assert error["max_abs"] == 2.0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.sampled_from([torch.float32, torch.bfloat16]))
def test_attention_error_agrees_with_torch(seed, size, dtype):
    generator = torch.Generator().manual_seed(seed)
    out, ref = (torch.randn(2, size, generator=generator).to(dtype) for _ in range(2))
    error = attention_error(out, ref)
    o, r = out.double().flatten(), ref.double().flatten()
    assert error["cosine"] == pytest.approx(F.cosine_similarity(o, r, dim=0).item(), abs=1e-9)
    assert error["rmse"] == pytest.approx(F.mse_loss(o, r).item() ** 0.5)
    assert error["relative_l1"] == pytest.approx((F.l1_loss(o, r) / r.abs().mean()).item())
    assert error["max_abs"] == torch.dist(o, r, p=float("inf")).item()


def test_attention_error_at_the_edges():
    zero, one = torch.zeros(4), torch.ones(4)
    assert attention_error(one, one) == {"cosine": 1.0, "relative_l1": 0.0, "rmse": 0.0, "max_abs": 0.0}
    assert attention_error(zero, zero)["cosine"] == 1.0
    assert attention_error(zero, one) == {"cosine": 0.0, "relative_l1": 1.0, "rmse": 1.0, "max_abs": 1.0}
    assert attention_error(one, zero)["relative_l1"] == float("inf")
    assert all(np.isnan(x) for x in attention_error(one * torch.nan, one).values())
    with pytest.raises(InputError, match="compare equal shapes"):
        attention_error(one, torch.ones(3))
    with pytest.raises(InputError, match="empty"):
        attention_error(one[:0], one[:0])


def test_psnr_is_ten_log_ten_of_the_mean_squared_error():
    a, b = videos()
    expected = [-10 * np.log10(((x - y) ** 2).mean()) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(a, b), expected, rtol=1e-12)


def test_psnr_of_known_differences():
    a = np.zeros((3, 16, 16, 3), np.uint8)
    b = a.copy()
    b[1] = 255
    b[2] = 51  # a fifth of the range: 20 log10(5) dB
    np.testing.assert_allclose(psnr(a, b), [np.inf, 0.0, 20 * np.log10(5)], atol=1e-9)


def gaussian_ssim(x, y):
    """SSIM written independently: an explicit 11x11 Gaussian by convolution over the valid region."""
    i = torch.arange(11, dtype=torch.float64) - 5
    g = torch.exp(-(i**2) / (2 * 1.5**2))
    window = (g[:, None] * g / g.sum() ** 2)[None, None]
    x, y = (torch.from_numpy(t).permute(2, 0, 1)[:, None] for t in (x, y))

    def mean(t):
        return F.conv2d(t, window)

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return (((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean().item()


def test_ssim_is_the_gaussian_11_by_11_convention():
    a, b = videos(noise=0.2)
    expected = [gaussian_ssim(x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(ssim(a, b), expected, atol=1e-9)
    assert "11x11, sigma 1.5, population covariance" in SSIM_CONVENTION


def test_ssim_of_equal_videos_is_one_and_of_tiny_frames_is_refused():
    a, _ = videos()
    np.testing.assert_allclose(ssim(a, a), 1.0)
    with pytest.raises(InputError, match="at least 11x11"):
        ssim(a[:, :10], a[:, :10])


def test_worst_frame_is_the_lowest_and_the_first_of_equals():
    assert worst_frame(np.array([30.0, np.inf, 20.0, 20.0])) == 2
    assert worst_frame([np.inf, np.inf]) == 0
    with pytest.raises(InputError, match="no frames"):
        worst_frame([])


def test_motion_and_flicker_of_known_videos():
    steady = np.linspace(0, 0.4, 5)[:, None, None, None] * np.ones((1, 4, 4, 3))
    assert motion_energy(steady) == pytest.approx(0.1)
    assert flicker(steady) == pytest.approx(0.0, abs=1e-12)
    blinking = np.zeros((6, 4, 4, 3), np.uint8)
    blinking[1::2] = 255
    assert motion_energy(blinking) == 1.0
    assert flicker(blinking) == 2.0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 7))
def test_motion_and_flicker_agree_with_their_sums(seed, frames):
    a, _ = videos(seed, (frames, 3, 4, 3))
    motion = sum(np.abs(a[t + 1] - a[t]).mean() for t in range(frames - 1)) / (frames - 1)
    bend = sum(np.abs(a[t + 2] - 2 * a[t + 1] + a[t]).mean() for t in range(frames - 2)) / (frames - 2)
    assert motion_energy(a) == pytest.approx(motion)
    assert flicker(a) == pytest.approx(bend)


def test_uint8_float_arrays_and_tensors_are_one_video():
    a, b = (np.round(x * 255).astype(np.uint8) for x in videos())
    for x, y in [(a / 255.0, b / 255.0), (torch.from_numpy(a), torch.from_numpy(b)), (a, b / 255.0)]:
        np.testing.assert_allclose(psnr(x, y), psnr(a, b), rtol=1e-9)
        np.testing.assert_allclose(ssim(x, y), ssim(a, b), rtol=1e-9)
    half = torch.from_numpy(a / 255.0).half().requires_grad_()
    assert motion_energy(half) == pytest.approx(motion_energy(a), rel=1e-3)


def test_the_caller_s_video_is_left_alone():
    a, b = videos()
    before = a.copy()
    psnr(a, b), ssim(a, b), motion_energy(a), flicker(a)
    assert np.array_equal(a, before)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((4, 8, 8)), "frames, height, width, 3"),
        (np.zeros((4, 8, 8, 4)), "frames, height, width, 3"),
        (np.zeros((0, 8, 8, 3)), "frames, height, width, 3"),
        (np.zeros((4, 8, 8, 3), np.int64), "give uint8, or float"),
        (np.full((4, 8, 8, 3), 1.5), "into \\[0, 1\\]"),
        (np.full((4, 8, 8, 3), -0.1), "into \\[0, 1\\]"),
        (np.full((4, 8, 8, 3), np.nan), "into \\[0, 1\\]"),
        (np.zeros((2, 8, 8, 3)), "Flicker needs 3 frames and this video has 2"),
    ],
)
def test_what_is_no_video_is_refused(video, message):
    with pytest.raises(InputError, match=message):
        flicker(video)


def test_videos_of_two_shapes_are_refused():
    with pytest.raises(InputError, match="compare equal shapes"):
        psnr(np.zeros((2, 16, 16, 3)), np.zeros((3, 16, 16, 3)))


def test_psnr_and_ssim_are_those_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    a, b = videos(shape=(2, 40, 52, 3))
    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    structural = [metrics.structural_similarity(x, y, channel_axis=-1, **how) for x, y in zip(a, b, strict=True)]
    noise = [metrics.peak_signal_noise_ratio(x, y, data_range=1.0) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(ssim(a, b), structural, atol=1e-9)
    np.testing.assert_allclose(psnr(a, b), noise, rtol=1e-12)
