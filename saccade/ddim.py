"""The DDIM step (2010.02502), pure, on a batch with a timestep per sample; and the noise that it starts from."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from saccade.errors import InvalidInput
from saccade.schedule import Float64, NoiseSchedule

Prediction = Literal["epsilon", "v_prediction", "sample"]
Float32 = NDArray[np.float32]
Floats = NDArray[np.float32] | NDArray[np.float64]
Timesteps = NDArray[np.int64]


def check(schedule: NoiseSchedule, prediction_type: Prediction) -> None:
    """Raises InvalidInput for epsilon prediction with zero terminal SNR: pure noise says nothing of the picture."""
    if prediction_type == "epsilon" and schedule.zero_terminal_snr:
        raise InvalidInput(
            "epsilon prediction cannot start from zero terminal SNR (it divides by zero at the last timestep); "
            "use v_prediction or sample, or a schedule without zero_terminal_snr",
            param="prediction",
        )


def to_sample(z: Floats, prediction: Floats, abar: Float64, kind: Prediction) -> Float64:
    """The clean sample z_0 that a prediction implies, [B, ...] float64; the bracket "predicted x_0" of eq. 12.

    z, prediction: [B, ...]. abar: [B], 0 allowed for v_prediction (2202.00512 appendix D) and sample.
    Raises InvalidInput for epsilon at abar 0 and for an unknown kind.
    """
    signal, noise = _levels(abar, z.ndim)
    if kind == "sample":
        return prediction.astype(np.float64)
    if kind == "v_prediction":
        return signal * z - noise * prediction
    _expect_epsilon(kind)
    if not np.all(abar):
        raise InvalidInput("epsilon says nothing of the sample where abar is 0", param="prediction")
    return (z - noise * prediction) / signal


def to_epsilon(z: Floats, prediction: Floats, abar: Float64, kind: Prediction) -> Float64:
    """The noise that a prediction implies, [B, ...] float64; eps_theta of eq. 12.

    z, prediction: [B, ...]. abar: [B], below 1 for sample.
    Raises InvalidInput for sample at abar 1 and for an unknown kind.
    """
    signal, noise = _levels(abar, z.ndim)
    if kind == "v_prediction":
        return signal * prediction + noise * z
    if kind == "sample":
        if np.any(abar == 1):
            raise InvalidInput("a clean sample says nothing of the noise where abar is 1", param="prediction")
        return (z - signal * prediction) / noise
    _expect_epsilon(kind)
    return prediction.astype(np.float64)


def step(
    schedule: NoiseSchedule,
    prediction_type: Prediction,
    z: Float32,
    output: Float32,
    t: Timesteps,
    t_prev: Timesteps,
    eta: float = 0.0,
    noise: Float32 | None = None,
) -> Float32:
    """z_t -> z_t_prev, [B, C, h, w] float32, by 2010.02502 eq. 12 with sigma of eq. 16; float64 inside.

    z, output (what the model predicts), noise: [B, C, h, w] float32. t, t_prev: [B] int64, a pair for each sample,
    -1 <= t_prev < t < T; t_prev = -1 is the clean sample. eta: 0 (DDIM, deterministic) .. 1 (DDPM); above 0 it needs
    `noise`.
    Raises InvalidInput for timesteps or eta out of range, missing noise, shapes that differ, and what `check` refuses.
    """
    check(schedule, prediction_type)
    _check_step(z, output, t, t_prev)
    abar, abar_prev = schedule.abar(t), schedule.abar(t_prev)
    sigma = _sigma(abar, abar_prev, eta)
    sample = to_sample(z, output, abar, prediction_type)
    epsilon = to_epsilon(z, output, abar, prediction_type)
    direction = np.sqrt(np.maximum(1 - abar_prev - sigma**2, 0))
    result = _column(np.sqrt(abar_prev), z.ndim) * sample + _column(direction, z.ndim) * epsilon
    if eta > 0:
        result += _column(sigma, z.ndim) * _check_noise(noise, z)
    return result.astype(np.float32)


def noise(seed: int, member: int, shape: tuple[int, ...]) -> Float32:
    """Standard normal noise, `shape` float32, a function of (seed, member) alone: not of batch, position or call order.

    A longer shape continues a shorter one's stream. Raises InvalidInput for a negative seed or member.
    """
    if seed < 0 or member < 0:
        raise InvalidInput("seed and member must be 0 or more", param="seed" if seed < 0 else "member")
    # A spawn key, not the list [seed, member]: of lists, (5, 1) and (5 + 2**32, 0) are the same 32-bit words.
    source = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(member,)))
    return np.random.Generator(source).standard_normal(shape, dtype=np.float32)


def _sigma(abar: Float64, abar_prev: Float64, eta: float) -> Float64:
    """Eq. 16, [B]."""
    if not 0 <= eta <= 1:
        raise InvalidInput("eta must be 0 to 1", param="eta")
    return eta * np.sqrt((1 - abar_prev) / (1 - abar)) * np.sqrt(1 - abar / abar_prev)


def _levels(abar: Float64, ndim: int) -> tuple[Float64, Float64]:
    return _column(np.sqrt(abar), ndim), _column(np.sqrt(1 - abar), ndim)


def _column(values: Float64, ndim: int) -> Float64:
    """[B] -> [B, 1, ...], to multiply a batch with."""
    return values.reshape(-1, *(1,) * (ndim - 1))


def _expect_epsilon(kind: str) -> None:
    if kind != "epsilon":
        raise InvalidInput(f"prediction must be epsilon, v_prediction or sample, not {kind}", param="prediction")


def _check_step(z: Float32, output: Float32, t: Timesteps, t_prev: Timesteps) -> None:
    if output.shape != z.shape:
        raise InvalidInput(f"the prediction's shape {output.shape} is not the latent's {z.shape}", param="output")
    if not t.shape == t_prev.shape == z.shape[:1]:
        raise InvalidInput(f"a batch of {len(z)} needs as many t and t_prev", param="t")
    if np.any((t < 0) | (t_prev >= t)):
        raise InvalidInput("a step goes from t >= 0 down to t_prev < t", param="t")


def _check_noise(noise: Float32 | None, z: Float32) -> Float32:
    if noise is None:
        raise InvalidInput("eta above 0 needs noise", param="noise")
    if noise.shape != z.shape:
        raise InvalidInput(f"the noise's shape {noise.shape} is not the latent's {z.shape}", param="noise")
    return noise
