"""The bundled weights: loading, key names, the whole-clip VAE, and files that are not what was shipped."""

import shutil

import pytest
import torch

pytest.importorskip("diffusers", reason="the embedded engine needs diffusers")

from comfy_sage3.demo import fast_vae, load, native  # noqa: E402
from comfy_sage3.errors import WeightsError  # noqa: E402


def test_native_names_are_the_inverse_of_diffusers_own_conversion():
    from diffusers.loaders import single_file_utils as files

    for state, to_native, back in (
        (load.new_transformer().state_dict(), native.transformer_to_native, files.convert_wan_transformer_to_diffusers),
        (load.new_vae().state_dict(), native.vae_to_native, files.convert_wan_vae_to_diffusers),
    ):
        again = back(to_native(dict(state)))
        assert again.keys() == state.keys()
        assert all(again[k] is state[k] or torch.equal(again[k], state[k]) for k in state)


def test_the_whole_clip_vae_agrees_with_diffusers_chunked_one():
    vae = load.load_vae()
    video = torch.rand(1, 3, 9, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean, _ = fast_vae.encode(vae, video)
        reference = vae.encode(video).latent_dist.mean
        assert torch.allclose(mean, reference, atol=1e-4 * reference.abs().max())
        decoded = vae.decode(mean, return_dict=False)[0]
        assert torch.allclose(fast_vae.decode(vae, mean).clamp(-1, 1), decoded, atol=1e-3)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in (load.VAE_FILE, load.CARD_FILE):
        shutil.copy(load.weights_folder() / name, tmp_path / name)
    monkeypatch.setattr(load, "weights_folder", lambda: tmp_path)
    return tmp_path


def test_a_truncated_file_is_refused(folder):
    path = folder / load.VAE_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="bytes where"):
        load.read(path)


def test_one_flipped_bit_is_refused(folder):
    path = folder / load.VAE_FILE
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="SHA-256"):
        load.read(path)


def test_a_pickle_posing_as_safetensors_is_refused(folder):
    path = folder / load.VAE_FILE
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="pickle"):
        load.read(path)


def test_a_missing_file_is_named(folder):
    (folder / load.VAE_FILE).unlink()
    with pytest.raises(WeightsError, match="missing"):
        load.read(folder / load.VAE_FILE)
