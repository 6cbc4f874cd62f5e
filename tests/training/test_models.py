"""The default model's networks against independent references: SciPy's DCT, arithmetic, simulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from torch import nn

from saccade.schedule import NoiseSchedule
from tests.training.conftest import TINY
from training.models.codec import BLOCK, KEPT, DCTCodec
from training.models.embed import RoutedPatchEmbed
from training.models.perceiver import TASKS, Config, Denoiser, Encoder, Matcher, expected_motion

LOWEST = [(0, 0), (0, 1), (1, 0), (0, 2), (1, 1), (2, 0), (0, 3), (1, 2), (2, 1), (3, 0)]  # (row, column) frequency


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_latents_are_the_lowest_coefficients_of_scipys_dct() -> None:
    pictures = noise(2, 4, 16, 24)
    latents = DCTCodec().encode(pictures)
    assert latents.shape == (2, sum(KEPT), 2, 3)
    blocks = pictures.numpy().reshape(2, 4, 2, BLOCK, 3, BLOCK)
    spectrum = dctn(blocks.astype(np.float64), axes=(3, 5), norm="ortho") / BLOCK
    expected = [spectrum[:, plane, :, u, :, v] for plane, kept in enumerate(KEPT) for u, v in LOWEST[:kept]]
    np.testing.assert_allclose(latents.numpy(), np.stack(expected, 1), atol=1e-5)


def test_the_first_coefficient_is_the_blocks_mean() -> None:
    pictures = noise(1, 4, 16, 24)
    latents = DCTCodec().encode(pictures)
    means = nn.functional.avg_pool2d(pictures, BLOCK)
    first = [sum(KEPT[:plane]) for plane in range(len(KEPT))]
    torch.testing.assert_close(latents[:, first], means, atol=1e-6, rtol=0)


def test_decoding_and_coding_again_changes_nothing() -> None:
    codec, latents = DCTCodec(), noise(2, sum(KEPT), 3, 5)
    torch.testing.assert_close(codec.encode(codec.decode(latents)), latents, atol=1e-5, rtol=0)


def test_smooth_maps_survive_the_codec() -> None:
    """A constant, a tilted plane and a bump, as depth and flow have them; PSNR on their range of 2."""
    y, x = np.mgrid[0:96, 0:128] / 96
    bump = 2 * np.exp(-((x - 0.6) ** 2 + (y - 0.4) ** 2) / 0.1) - 1
    pictures = torch.tensor(np.stack([np.full_like(x, 0.3), y + 0.5 * x - 0.8, bump, bump])).float()[None]
    codec = DCTCodec((1, 10, 10, 3))
    errors = codec.decode(codec.encode(pictures)) - pictures
    psnr = 20 * torch.log10(2 / errors.pow(2).mean((0, 2, 3)).sqrt())
    assert (psnr > torch.tensor([100, 65, 55, 45])).all()
    assert errors.abs().max() < 0.05


@pytest.fixture(scope="module")
def config() -> Config:
    return Config(latent_channels=26, latent_std=tuple(np.linspace(0.05, 1.5, 26).tolist()), **TINY)


@pytest.fixture(scope="module")
def alphas() -> torch.Tensor:
    return torch.tensor(NoiseSchedule("cosine", 1000, zero_terminal_snr=True).alphas_cumprod)


def shaken(module: nn.Module) -> nn.Module:
    """Random weights everywhere, also where training starts from zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


@pytest.fixture(scope="module")
def encoder(config: Config) -> nn.Module:
    torch.manual_seed(0)
    return shaken(Encoder(config))


@pytest.fixture(scope="module")
def denoiser(config: Config, alphas: torch.Tensor) -> nn.Module:
    torch.manual_seed(0)
    return shaken(Denoiser(config, alphas))


@torch.no_grad()
def test_a_mixed_batch_is_encoded_as_each_task_alone(encoder: Encoder) -> None:
    image, prompt = noise(5, 3, 48, 32).tanh(), noise(5, 3, 48, 32, seed=1).tanh()
    labels = torch.tensor([1, 0, 2, 1, 2])
    context, detail = encoder(image, prompt, labels)
    for label, task in enumerate(TASKS):
        rows = labels == label
        alone, fine, guess = encoder.of_task(image[rows], prompt[rows], task)
        torch.testing.assert_close(context[rows], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(detail[rows], fine, atol=1e-5, rtol=1e-5)
        assert (guess is not None) == (task == "flow")


@torch.no_grad()
def test_depth_looks_at_the_picture_alone_and_the_others_at_their_prompt(encoder: Encoder) -> None:
    image, prompt = noise(3, 3, 32, 32).tanh(), noise(3, 3, 32, 32, seed=1).tanh()
    labels = torch.arange(3)
    one, other = encoder(image, prompt, labels)[0], encoder(image, -prompt, labels)[0]
    changes = (one - other).abs().amax((1, 2, 3))
    assert changes[0] == 0
    assert (changes[1:] > 1e-3).all()


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 112), (96, 32), (64, 80)])
def test_any_multiple_of_16_in_any_aspect_goes_through(
    encoder: Encoder, denoiser: Denoiser, config: Config, height: int, width: int
) -> None:
    task = torch.arange(3)
    context, detail = encoder(noise(3, 3, height, width), noise(3, 3, height, width, seed=1), task)
    assert context.shape == (3, config.width, height // 16, width // 16)
    assert detail.shape == (3, config.detail_channels, height // 8, width // 8)
    latent = noise(3, 26, height // 8, width // 8)
    prediction = denoiser(latent, torch.tensor([0, 500, 999]), task, context, detail)
    assert prediction.shape == latent.shape
    assert prediction.isfinite().all()


@torch.no_grad()
def test_a_sample_does_not_know_its_neighbours(encoder: Encoder, denoiser: Denoiser) -> None:
    """Each with its own task and timestep, in one batch or alone: what batches of many requests rest on."""
    image = nn.functional.interpolate(noise(3, 3, 8, 12), scale_factor=4, mode="bicubic")
    prompt, latent = image.roll((1, 2), (2, 3)), noise(3, 26, 4, 6)  # something to track: else it amplifies rounding
    task, timestep = torch.tensor([2, 0, 1]), torch.tensor([999, 3, 400])
    together = denoiser(latent, timestep, task, *encoder(image, prompt, task))
    for row in range(3):
        one = slice(row, row + 1)
        alone = denoiser(latent[one], timestep[one], task[one], *encoder(image[one], prompt[one], task[one]))
        torch.testing.assert_close(together[one], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_every_task_has_its_own_input_convolution() -> None:
    embed = RoutedPatchEmbed(channels=5, width=7, patch=2, tasks=3)
    nn.init.normal_(embed.bias)
    x, task = noise(4, 5, 6, 8), torch.tensor([2, 0, 1, 2])
    for row, label in enumerate(task.tolist()):
        weight = embed.weight[label].T.reshape(7, 5, 2, 2)
        expected = nn.functional.conv2d(x[row], weight, embed.bias[label], stride=2).flatten(1).T
        torch.testing.assert_close(embed(x, task)[row], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_matcher_that_knows_its_cells_finds_where_they_went() -> None:
    matcher = Matcher(quarter=16, eighth=32, track=True)
    matcher.temperature.fill_(6.0)
    first = noise(1, 32, 6, 9)
    second = first.roll((1, 2), (2, 3))  # one cell down, two to the right
    guess, confidence = expected_motion(matcher.everywhere(first, second).exp(), 6, 9)
    inside = guess[0, :, :-1, :-2]
    torch.testing.assert_close(inside, torch.tensor([2.0, 1.0])[:, None, None].expand_as(inside), atol=0.05, rtol=0)
    assert (confidence > 0.9).all()


@torch.no_grad()
@pytest.mark.parametrize("centred", [True, False])
def test_a_fresh_denoiser_makes_the_best_linear_guess(config: Config, alphas: torch.Tensor, centred: bool) -> None:
    """On simulated Gaussian data around the encoder's estimate (or around none): no line through the data does better,
    and what it leaves over has the gain's size."""
    fresh = Denoiser(replace(config, centred=centred), alphas)
    rng = np.random.default_rng(0)
    around = 0.7 if centred else 0.0
    x, eps = rng.normal(size=(2, 26, 20_000))
    x = x * np.array(config.latent_std)[:, None] + around
    context, detail = noise(1, config.width, 2, 2), noise(1, config.detail_channels, 4, 4)
    detail[:, config.detail :] = 0.7
    task = torch.tensor([1])

    def answer(value: float, t: int) -> np.ndarray:
        latent = torch.full((1, 26, 4, 4), value)
        return fresh(latent, torch.tensor([t]), task, context, detail)[0, :, 0, :1].double().numpy()

    for t in (0, 250, 700, 950, 999):
        a, b = np.sqrt(alphas[t].item()), np.sqrt(1 - alphas[t].item())
        z, v = a * x + b * eps, a * eps - b * x
        offset, slope = answer(0.0, t), answer(1.0, t) - answer(0.0, t)
        at = z - z.mean(1, keepdims=True)
        best = (v * at).mean(1, keepdims=True) / (at * at).mean(1, keepdims=True)
        left = ((v - offset - slope * z) ** 2).mean(1)
        least = ((v - v.mean(1, keepdims=True) - best * at) ** 2).mean(1)
        assert (left < 1.002 * least).all()
        gain = fresh.linear_part(torch.tensor([t]), task)[1].flatten()
        np.testing.assert_allclose(gain.numpy(), np.sqrt(left), rtol=0.03)


@torch.no_grad()
def test_doubt_follows_the_errors_of_its_task_where_the_truth_is_known(config: Config, alphas: torch.Tensor) -> None:
    fresh = Denoiser(config, alphas)
    before = fresh.doubt.clone()
    weight = torch.zeros(2, 3, 3)
    weight[:, :2] = 1.5
    error = torch.where(weight[:, None] > 0, 0.2, 100.0).expand(2, 26, 3, 3)
    for _ in range(2000):
        fresh.learn_doubt(error, weight, torch.full((2,), TASKS.index("flow")))
    torch.testing.assert_close(fresh.doubt[1], torch.full((26,), 0.04), atol=1e-4, rtol=1e-3)
    assert torch.equal(fresh.doubt[[0, 2]], before[[0, 2]])


@torch.no_grad()
def test_a_fresh_fusion_changes_nothing_yet(config: Config) -> None:
    """So that a run may begin with the weights of a network that had none."""
    torch.manual_seed(0)
    without = shaken(Encoder(replace(config, fuse=False)))
    with_one = Encoder(config)
    missing = with_one.load_state_dict(without.state_dict(), strict=False).missing_keys
    assert missing
    assert all(key.startswith("fusion.") for key in missing)
    pictures = noise(3, 3, 32, 48).tanh(), noise(3, 3, 32, 48, seed=1).tanh()
    for mine, theirs in zip(with_one(*pictures, torch.arange(3)), without(*pictures, torch.arange(3)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
