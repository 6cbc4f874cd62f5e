"""Noise of many resolutions, and what is made of it: noisy latents, targets, weights of timesteps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from saccade import ddim
from saccade.errors import InvalidInput
from saccade.schedule import NoiseSchedule
from training.noise import NoiseConfig, draw
from training.objectives import Diffusion, DiffusionConfig, Uncertainty


def drawn(strength: float, annealed: bool, t: int, seed: int = 0, batch: int = 64) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    timesteps = torch.full((batch,), t)
    return draw((batch, 2, 32, 32), timesteps, 1000, NoiseConfig(strength, annealed), generator).numpy()


def neighbours(noise: np.ndarray) -> float:
    """Correlation of horizontal neighbours."""
    return float((noise[..., 1:] * noise[..., :-1]).mean() / np.square(noise).mean())


def test_plain_noise_is_white_and_the_generators_own() -> None:
    expected = torch.randn((64, 2, 32, 32), generator=torch.Generator().manual_seed(0)).numpy()
    np.testing.assert_array_equal(drawn(0, True, 500), expected)


def test_coarse_octaves_make_neighbours_alike_and_keep_the_variance() -> None:
    noise = drawn(0.9, False, 0)
    assert np.square(noise).mean() == pytest.approx(1, abs=1e-4)
    assert abs(noise.mean()) < 0.1
    assert neighbours(noise) > 0.3 > 0.03 > abs(neighbours(drawn(0, False, 0)))


def test_annealed_noise_is_plain_at_no_noise_and_full_at_the_end() -> None:
    early, late = neighbours(drawn(0.9, True, 0)), neighbours(drawn(0.9, True, 999))
    middle = neighbours(drawn(0.9, True, 500))
    assert abs(early) < 0.02 < middle < late
    assert late == pytest.approx(neighbours(drawn(0.9, False, 999)), abs=0.02)


def test_noise_depends_on_its_seed_alone() -> None:
    np.testing.assert_array_equal(drawn(0.9, True, 700, 3), drawn(0.9, True, 700, 3))
    assert not np.array_equal(drawn(0.9, True, 700, 3), drawn(0.9, True, 700, 4))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_a_right_answer_is_the_clean_latent_to_the_sampler(schedule: Any, prediction: Any) -> None:
    """The sampler of `saccade.ddim` undoes what training did."""
    config = DiffusionConfig(schedule=schedule, zero_terminal_snr=False, prediction=prediction)
    diffusion, draw_ = Diffusion(config), torch.Generator().manual_seed(0)
    clean, noise = torch.randn((2, 8, 3, 4, 4), generator=draw_).double()
    t = torch.arange(0, 800, 100)
    noisy, answer = diffusion.noisy(clean, noise, t), diffusion.target(clean, noise, t)
    abar = NoiseSchedule(schedule).abar(t.numpy())
    found = ddim.to_sample(noisy.numpy(), answer.numpy(), abar, prediction)
    np.testing.assert_allclose(found, clean.numpy(), atol=1e-5)


def test_min_snr_weighs_the_same_error_of_the_sample_alike_however_it_is_put() -> None:
    """2303.09556: the weight of the sample's squared error is min(snr, gamma); noise's error is snr times that, ..."""
    t = torch.tensor([5, 200, 500, 900])
    abar = NoiseSchedule("cosine").abar(t.numpy())
    snr = abar / (1 - abar)
    per_sample_error = {"sample": 1.0, "epsilon": snr, "v_prediction": snr + 1}
    for prediction, factor in per_sample_error.items():
        config = DiffusionConfig(zero_terminal_snr=False, prediction=prediction, weighting="min_snr", gamma=5.0)
        weight = Diffusion(config).weight(t).numpy()
        np.testing.assert_allclose(weight * factor, np.minimum(snr, 5), rtol=1e-4)


def test_min_snr_is_finite_at_pure_noise() -> None:
    weight = Diffusion(DiffusionConfig(weighting="min_snr")).weight(torch.arange(1000))
    assert torch.isfinite(weight).all()
    assert (weight >= 0).all()


def test_uncertainty_learns_the_logarithm_of_each_timesteps_loss() -> None:
    """Its best value is where all timesteps weigh alike: exp(u) = loss (2312.02696)."""
    torch.manual_seed(0)
    doubt = Uncertainty(1000)
    optimizer = torch.optim.Adam(doubt.parameters(), lr=0.02)
    diffusion = Diffusion(DiffusionConfig(weighting="uncertainty"))
    for _ in range(600):
        t = torch.randint(1000, (256,))
        wanted = torch.zeros(256, 1, 2, 2)
        predicted = torch.where(t < 500, 0.5, 2.0)[:, None, None, None].expand(-1, 1, 2, 2)
        loss, rows = diffusion.loss(predicted, wanted, t, doubt=doubt(t))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learned = doubt(torch.tensor([100, 300, 700, 900])).exp()
    torch.testing.assert_close(learned, torch.tensor([0.25, 0.25, 4.0, 4.0]), rtol=0.25, atol=0)
    assert rows.requires_grad is False


def test_cells_without_truth_do_not_count() -> None:
    diffusion = Diffusion(DiffusionConfig())
    predicted, wanted = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    predicted[:, :, 0] = 7
    predicted[:, :, 1] = 1
    known = torch.ones(2, 4, 4)
    known[:, 0] = 0
    loss, rows = diffusion.loss(predicted, wanted, torch.tensor([1, 2]), known=known)
    assert float(loss) == pytest.approx(1 / 3)
    np.testing.assert_allclose(rows, [1 / 3, 1 / 3], rtol=1e-6)


def test_timesteps_are_all_drawn_and_lean_where_they_should() -> None:
    generator = torch.Generator().manual_seed(0)
    even = Diffusion(DiffusionConfig()).timesteps(1000, generator)
    assert len(even.unique()) > 600
    assert even.float().mean() == pytest.approx(499.5, abs=2)
    late = Diffusion(DiffusionConfig(shift=3.0)).timesteps(1000, generator)
    assert late.float().mean() > 600
    assert (late.min(), late.max()) >= (0, 990)


def test_noise_prediction_of_pure_noise_is_refused() -> None:
    with pytest.raises(InvalidInput, match="zero terminal SNR"):
        DiffusionConfig(prediction="epsilon")


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_strength_beyond_all_noise_is_refused(strength: float) -> None:
    with pytest.raises(InvalidInput, match="strength must be from 0 to 1"):
        NoiseConfig(strength)


@pytest.mark.parametrize("change", [{"shift": 0.0}, {"shift": 1e-9}, {"shift": float("nan")}, {"gamma": 0.0}])
def test_draws_and_weights_that_cannot_be_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput) as refused:
        DiffusionConfig(**change)
    assert refused.value.param == next(iter(change))
