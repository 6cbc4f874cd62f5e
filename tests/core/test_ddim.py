from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from hypothesis import given
from hypothesis import strategies as st

from saccade import ddim
from saccade.errors import InvalidInput
from saccade.schedule import CLEAN, Kind, NoiseSchedule, Spacing, pairs, timesteps

THEIR_NAME = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
POSSIBLE = [
    (kind, zero_snr, prediction)
    for kind in get_args(Kind)
    for zero_snr in (False, True)
    for prediction in get_args(ddim.Prediction)
    if not (zero_snr and prediction == "epsilon")
]


def theirs(kind: str, zero_snr: bool, prediction: str, spacing: str = "leading", offset: int = 0) -> DDIMScheduler:
    """diffusers' scheduler, its tables carried on in float64: in float32 it is off by up to 1.4e-5."""
    betas = {} if kind == "cosine" else dict(zip(("beta_start", "beta_end"), NoiseSchedule(kind).betas, strict=True))
    scheduler = DDIMScheduler(
        beta_schedule=THEIR_NAME[kind],
        prediction_type=prediction,
        timestep_spacing=spacing,
        steps_offset=offset,
        clip_sample=False,
        **betas,
    )
    table = scheduler.betas.double()
    table = rescale_zero_terminal_snr(table) if zero_snr else table
    scheduler.alphas_cumprod = torch.cumprod(1 - table, 0)
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def double(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).double()


def assert_close(ours: np.ndarray, expected: np.ndarray, relative: float) -> None:
    assert np.abs(ours - expected).max() <= relative * np.abs(expected).max()


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("kind", "zero_snr", "prediction"), POSSIBLE)
def test_one_step_is_diffusers(kind: Kind, zero_snr: bool, prediction: ddim.Prediction, eta: float) -> None:
    """A batch with a pair per sample against diffusers one sample at a time, first and last timestep among them."""
    scheduler = theirs(kind, zero_snr, prediction)
    for n in (4, 50):
        scheduler.set_timesteps(n)
        t = np.array([999, 998, 500, 251, 250, 19, 3, 0])
        t_prev = np.maximum(t - 1000 // n, CLEAN)
        z, output, noise = (normal(seed, len(t), 2, 3, 4) for seed in range(3))
        ours = ddim.step(NoiseSchedule(kind, 1000, zero_snr), prediction, z, output, t, t_prev, eta, noise)
        assert ours.dtype == np.float32
        # diffusers takes the root of a rounding error below zero where DDPM starts from pure noise: not a number.
        for i in range(zero_snr and eta == 1, len(t)):
            expected = scheduler.step(
                double(output[i]), int(t[i]), double(z[i]), eta, variance_noise=double(noise[i]) if eta else None
            ).prev_sample.numpy()
            assert_close(ours[i], expected, 1e-5)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("kind", get_args(Kind))
def test_ddpm_from_pure_noise_keeps_the_sample_alone(kind: Kind, prediction: ddim.Prediction) -> None:
    schedule, t, t_prev = NoiseSchedule(kind, 1000, True), np.array([999]), np.array([749])
    z, output, noise = (normal(seed, 1, 2, 3, 4) for seed in range(3))
    sample = output if prediction == "sample" else -output
    abar = schedule.alphas_cumprod[749]
    expected = math.sqrt(abar) * sample + math.sqrt(1 - abar) * noise
    assert_close(ddim.step(schedule, prediction, z, output, t, t_prev, 1.0, noise), expected, 1e-6)


def model(z: np.ndarray, t: int) -> np.ndarray:
    return np.tanh(0.7 * z + t / 1000 - 0.3)


def our_loop(schedule: NoiseSchedule, prediction: ddim.Prediction, z: np.ndarray, steps: np.ndarray) -> np.ndarray:
    for t, t_prev in pairs(steps):
        now, then = np.array([t]), np.array([t_prev])
        z = ddim.step(schedule, prediction, z, model(z, t), now, then)
    return z


@pytest.mark.parametrize(("kind", "zero_snr", "prediction"), POSSIBLE)
@pytest.mark.parametrize(
    ("spacing", "offset", "steps"),
    [("leading", 0, (1, 3, 7, 50)), ("leading", 1, (1, 7, 50)), ("trailing", 0, (1, 2, 10, 50))],
)
def test_loops_are_diffusers_where_it_steps_to_the_next_timestep(
    kind: Kind, zero_snr: bool, prediction: ddim.Prediction, spacing: Spacing, offset: int, steps: tuple[int, ...]
) -> None:
    """It does so with leading spacing always, and with trailing where n divides 1000; then its way ends clean too."""
    scheduler = theirs(kind, zero_snr, prediction, spacing, offset)
    for n in steps:
        scheduler.set_timesteps(n)
        z = normal(n, 1, 2, 3, 4)
        expected = double(z)
        for t in scheduler.timesteps:
            output = torch.from_numpy(model(expected.numpy(), int(t)))
            expected = scheduler.step(output, int(t), expected).prev_sample
        visited = timesteps(n, spacing, steps_offset=offset)
        ours = our_loop(NoiseSchedule(kind, 1000, zero_snr), prediction, z, visited)
        assert_close(ours, expected.numpy(), 1e-5)


def reference_loop(kind: str, zero_snr: bool, prediction: str, z: np.ndarray, steps: list[int]) -> np.ndarray:
    """DDIM in angles: with abar = cos(phi)^2, a step turns z from phi_t to phi_t_prev. float64, no saccade code."""
    angle = reference_angles(kind, zero_snr)
    z = z.astype(np.float64)
    for t, t_prev in zip(steps, [*steps[1:], None], strict=True):
        phi, target = angle[t], 0.0 if t_prev is None else angle[t_prev]
        output = model(z, t)
        if prediction == "v_prediction":
            z = math.cos(phi - target) * z - math.sin(phi - target) * output
        elif prediction == "epsilon":
            z = math.cos(target) * (z - math.sin(phi) * output) / math.cos(phi) + math.sin(target) * output
        else:
            z = math.cos(target) * output + math.sin(target) * (z - math.cos(phi) * output) / math.sin(phi)
    return z


def reference_angles(kind: str, zero_snr: bool) -> list[float]:
    if kind == "linear":
        betas = [0.0001 + (0.02 - 0.0001) * i / 999 for i in range(1000)]
    elif kind == "scaled_linear":
        betas = [(0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999) ** 2 for i in range(1000)]
    else:
        f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
        betas = [min(1 - f[i + 1] / f[i], 0.999) for i in range(1000)]
    roots, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        roots.append(math.sqrt(product))
    if zero_snr:
        first, last = roots[0], roots[-1]
        roots = [(root - last) * first / (first - last) for root in roots]
    return [math.acos(root) for root in roots]


@pytest.mark.parametrize(("kind", "zero_snr", "prediction"), POSSIBLE)
@pytest.mark.parametrize(("spacing", "n"), [("trailing", 3), ("trailing", 30), ("linspace", 2), ("linspace", 10)])
def test_other_loops_are_the_reference(
    kind: Kind, zero_snr: bool, prediction: ddim.Prediction, spacing: Spacing, n: int
) -> None:
    """Where diffusers leaves its own list of timesteps: linspace, and trailing with n that does not divide 1000."""
    z, steps = normal(n, 1, 2, 3, 4), timesteps(n, spacing)
    expected = reference_loop(kind, zero_snr, prediction, z, steps.tolist())
    assert_close(our_loop(NoiseSchedule(kind, 1000, zero_snr), prediction, z, steps), expected, 1e-5)


@pytest.mark.parametrize(("kind", "zero_snr", "prediction"), POSSIBLE)
@given(data=st.data())
def test_a_perfect_model_is_followed_exactly(
    kind: Kind, zero_snr: bool, prediction: ddim.Prediction, data: st.DataObject
) -> None:
    """From z_t made of z_0 and eps, the true output leads to the z_t_prev made of the same two."""
    schedule = NoiseSchedule(kind, 1000, zero_snr)
    # Past abar 1e-4, epsilon loses the sample in the float32 of z_t itself.
    last = 999 if prediction != "epsilon" else int(np.count_nonzero(schedule.alphas_cumprod > 1e-4)) - 1
    t = data.draw(st.integers(0, last))
    t_prev = data.draw(st.integers(CLEAN, t - 1))
    clean, eps = normal(t, 1, 2, 3, 4), normal(t + 1, 1, 2, 3, 4)

    def mixed(time: int) -> np.ndarray:
        abar = schedule.abar(np.array(time))
        return (np.sqrt(abar) * clean + np.sqrt(1 - abar) * eps).astype(np.float32)

    abar = float(schedule.abar(np.array(t)))
    outputs = {"epsilon": eps, "sample": clean, "v_prediction": math.sqrt(abar) * eps - math.sqrt(1 - abar) * clean}
    output = outputs[prediction].astype(np.float32)
    ours = ddim.step(schedule, prediction, mixed(t), output, np.array([t]), np.array([t_prev]))
    np.testing.assert_allclose(ours, mixed(t_prev), atol=1e-4)


def test_at_pure_noise_v_and_sample_are_exact() -> None:
    z, output, nothing = normal(0, 2, 2, 3, 4), normal(1, 2, 2, 3, 4), np.zeros(2)
    np.testing.assert_array_equal(ddim.to_sample(z, output, nothing, "v_prediction"), -output)
    np.testing.assert_array_equal(ddim.to_epsilon(z, output, nothing, "v_prediction"), z)
    np.testing.assert_array_equal(ddim.to_sample(z, output, nothing, "sample"), output)
    np.testing.assert_array_equal(ddim.to_epsilon(z, output, nothing, "sample"), z)
    schedule = NoiseSchedule("scaled_linear", zero_terminal_snr=True)
    last, clean = np.array([999, 999]), np.array([CLEAN, CLEAN])
    np.testing.assert_array_equal(ddim.step(schedule, "v_prediction", z, output, last, clean), -output)
    np.testing.assert_array_equal(ddim.step(schedule, "sample", z, output, last, clean), output)


def test_a_step_changes_neither_input_nor_neighbours() -> None:
    schedule, t, t_prev = NoiseSchedule("linear"), np.array([900, 30]), np.array([400, CLEAN])
    z, output = normal(0, 2, 2, 3, 4), normal(1, 2, 2, 3, 4)
    before = z.copy(), output.copy()
    both = ddim.step(schedule, "epsilon", z, output, t, t_prev)
    np.testing.assert_array_equal(z, before[0])
    np.testing.assert_array_equal(output, before[1])
    for i in range(2):
        alone = ddim.step(schedule, "epsilon", z[i : i + 1], output[i : i + 1], t[i : i + 1], t_prev[i : i + 1])
        np.testing.assert_array_equal(alone[0], both[i])


def test_epsilon_with_zero_terminal_snr_is_refused() -> None:
    z, t = normal(0, 1, 2, 3, 4), np.array([10])
    schedule = NoiseSchedule("cosine", zero_terminal_snr=True)
    with pytest.raises(InvalidInput, match="zero terminal SNR"):
        ddim.check(schedule, "epsilon")
    with pytest.raises(InvalidInput, match="zero terminal SNR"):
        ddim.step(schedule, "epsilon", z, z, t, t - 1)
    with pytest.raises(InvalidInput, match="abar is 0"):
        ddim.to_sample(z, z, np.zeros(1), "epsilon")
    ddim.check(schedule, "v_prediction")
    ddim.check(NoiseSchedule("cosine"), "epsilon")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"eta": 0.5}, "noise"),
        ({"eta": 0.5, "noise": normal(0, 1, 1, 1, 1)}, "noise"),
        ({"eta": 1.5, "noise": normal(0, 1, 2, 3, 4)}, "eta"),
        ({"eta": -0.1}, "eta"),
        ({"t": np.array([1000])}, "timestep"),
        ({"t": np.array([-1]), "t_prev": np.array([-2])}, "t"),
        ({"t_prev": np.array([500])}, "t"),
        ({"t_prev": np.array([-2])}, "timestep"),
        ({"t": np.array([500, 501])}, "t"),
        ({"output": normal(0, 1, 2, 3, 5)}, "output"),
        ({"prediction_type": "score"}, "prediction"),
    ],
)
def test_impossible_steps_are_refused(change: dict[str, object], param: str) -> None:
    possible = {
        "schedule": NoiseSchedule("linear"),
        "prediction_type": "epsilon",
        "z": normal(0, 1, 2, 3, 4),
        "output": normal(1, 1, 2, 3, 4),
        "t": np.array([500]),
        "t_prev": np.array([400]),
    }
    with pytest.raises(InvalidInput) as refusal:
        ddim.step(**(possible | change))  # type: ignore[arg-type]
    assert refusal.value.param == param


def test_a_clean_sample_has_no_noise_to_tell() -> None:
    z = normal(0, 1, 2, 3, 4)
    with pytest.raises(InvalidInput, match="abar is 1"):
        ddim.to_epsilon(z, z, np.ones(1), "sample")


def test_noise_depends_on_seed_and_member_alone() -> None:
    shape = (4, 8, 8)
    first = ddim.noise(7, 2, shape)
    np.random.seed(0)
    others = [ddim.noise(seed, member, shape) for seed in range(6, 9) for member in range(4)]
    np.testing.assert_array_equal(ddim.noise(7, 2, shape), first)
    assert sum(np.array_equal(first, other) for other in others) == 1
    assert first.dtype == np.float32
    assert first.shape == shape


def test_noise_of_large_seeds_does_not_repeat_that_of_members() -> None:
    for member in range(1, 4):
        assert not np.array_equal(ddim.noise(5, member, (8,)), ddim.noise(5 + (member << 32), 0, (8,)))
    assert not np.array_equal(ddim.noise(2**63 - 1, 0, (8,)), ddim.noise(2**63 - 2, 0, (8,)))


def test_noise_is_standard_normal_and_independent_between_members() -> None:
    draws = np.stack([ddim.noise(1, member, (50_000,)) for member in range(3)]).astype(np.float64)
    assert np.abs(draws.mean(1)).max() < 0.02
    assert np.abs(np.cov(draws) - np.eye(3)).max() < 0.03
    assert np.mean(np.abs(draws) < 1.959964) == pytest.approx(0.95, abs=0.003)


def test_noise_stays_what_it_was() -> None:
    """A seed is a promise: if NumPy ever changes its stream, answers change, and this says so."""
    np.testing.assert_allclose(ddim.noise(0, 0, (3,)), [-0.14932191, -1.3723161, 0.0078647472], rtol=1e-6)


@pytest.mark.parametrize(("seed", "member", "param"), [(-1, 0, "seed"), (0, -1, "member")])
def test_negative_seeds_and_members_are_refused(seed: int, member: int, param: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        ddim.noise(seed, member, (2,))
    assert refusal.value.param == param
