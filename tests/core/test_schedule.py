from __future__ import annotations

import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from saccade.errors import InvalidInput
from saccade.schedule import CLEAN, Kind, NoiseSchedule, Spacing, pairs, timesteps

THEIR_NAME = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
KINDS, SPACINGS = get_args(Kind), get_args(Spacing)


def theirs(kind: str, **options: object) -> DDIMScheduler:
    betas = {} if kind == "cosine" else dict(zip(("beta_start", "beta_end"), NoiseSchedule(kind).betas, strict=True))
    return DDIMScheduler(beta_schedule=THEIR_NAME[kind], **(betas | options))


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_alphas_cumprod_is_diffusers_within_its_float32(kind: Kind, zero_snr: bool) -> None:
    ours = NoiseSchedule(kind, zero_terminal_snr=zero_snr).alphas_cumprod
    other = theirs(kind, rescale_betas_zero_snr=zero_snr).alphas_cumprod.numpy()
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, other, rtol=1e-4, atol=2e-7)


def test_linear_follows_its_definition() -> None:
    betas = [0.1 + 0.2 * i / 3 for i in range(4)]
    expected = [np.prod([1 - b for b in betas[: i + 1]]) for i in range(4)]
    np.testing.assert_allclose(NoiseSchedule("linear", 4, False, 0.1, 0.3).alphas_cumprod, expected, rtol=1e-14)


def test_cosine_follows_equation_17_until_the_beta_cap() -> None:
    steps = np.arange(1, 1000)
    f = np.cos((np.append(0, steps) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    abar = NoiseSchedule("cosine").alphas_cumprod
    np.testing.assert_allclose(abar[:-1], f[1:] / f[0], rtol=1e-10)
    assert abar[-1] / abar[-2] == pytest.approx(0.001)


@given(kind=st.sampled_from(["linear", "scaled_linear", "cosine"]), total=st.integers(2, 1200), zero_snr=st.booleans())
def test_every_schedule_falls_from_near_one(kind: Kind, total: int, zero_snr: bool) -> None:
    plain = NoiseSchedule(kind, total).alphas_cumprod
    abar = NoiseSchedule(kind, total, zero_snr).alphas_cumprod
    assert abar.shape == (total,)
    assert np.all(np.diff(abar) < 0)
    assert abar[0] == pytest.approx(plain[0])
    assert abar[0] < 1
    assert (abar[-1] == 0) == zero_snr


def test_equal_schedules_share_one_read_only_array() -> None:
    abar = NoiseSchedule("cosine").alphas_cumprod
    assert NoiseSchedule("cosine").alphas_cumprod is abar
    assert NoiseSchedule("cosine", zero_terminal_snr=True).alphas_cumprod is not abar
    with pytest.raises(ValueError, match="read-only"):
        abar[0] = 0


def test_abar_of_a_mixed_batch_knows_the_clean_end() -> None:
    schedule = NoiseSchedule("linear")
    levels = schedule.abar(np.array([999, CLEAN, 0]))
    assert levels.tolist() == [schedule.alphas_cumprod[999], 1.0, schedule.alphas_cumprod[0]]
    for outside in (-2, 1000):
        with pytest.raises(InvalidInput):
            schedule.abar(np.array([5, outside]))


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        (("quadratic",), "schedule"),
        (("linear", 1), "timesteps"),
        (("linear", 1000, False, 0.0, 0.02), "beta_start"),
        (("linear", 1000, False, 0.03, 0.02), "beta_start"),
        (("scaled_linear", 1000, False, None, 1.0), "beta_start"),
        (("cosine", 1000, False, 0.1, None), "beta_start"),
        (("cosine", 1000, False, None, 0.1), "beta_start"),
    ],
)
def test_impossible_schedules_are_refused(arguments: tuple[object, ...], param: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        NoiseSchedule(*arguments)  # type: ignore[arg-type]
    assert refusal.value.param == param


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_diffusers(spacing: Spacing) -> None:
    """Every n; where rounding in diffusers' arange adds an (n+1)-th entry of -1, all before it."""
    other, longer = DDIMScheduler(timestep_spacing=spacing), []
    for n in range(1, 1001):
        other.set_timesteps(n)
        expected = other.timesteps.numpy()
        if len(expected) > n:
            longer.append(n)
            assert expected[n:].tolist() == [-1]
        np.testing.assert_array_equal(timesteps(n, spacing), expected[:n], err_msg=str(n))
    assert spacing == "trailing" or not longer


def test_the_offset_is_diffusers_and_moves_leading_only() -> None:
    other = DDIMScheduler(timestep_spacing="leading", steps_offset=1)
    for n in (1, 7, 50, 999 // 2):
        other.set_timesteps(n)
        np.testing.assert_array_equal(timesteps(n, "leading", steps_offset=1), other.timesteps.numpy())
    for spacing in ("linspace", "trailing"):
        np.testing.assert_array_equal(timesteps(9, spacing, steps_offset=1), timesteps(9, spacing))


def test_known_timesteps() -> None:
    assert timesteps(1, "trailing").tolist() == [999]
    assert timesteps(4, "trailing").tolist() == [999, 749, 499, 249]
    assert timesteps(4, "leading").tolist() == [750, 500, 250, 0]
    assert timesteps(4, "linspace").tolist() == [999, 666, 333, 0]


@given(st.data())
def test_timesteps_fall_strictly_inside_the_schedule(data: st.DataObject) -> None:
    total = data.draw(st.integers(2, 2000))
    n = data.draw(st.integers(1, total))
    steps = timesteps(n, data.draw(st.sampled_from(SPACINGS)), total)
    assert steps.dtype == np.int64
    assert steps.shape == (n,)
    assert np.all(np.diff(steps) < 0)
    assert steps[-1] >= 0
    assert steps[0] < total


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ((0, "trailing"), "steps"),
        ((1001, "leading"), "steps"),
        ((11, "linspace", 10), "steps"),
        ((5, "even"), "spacing"),
    ],
)
def test_impossible_timesteps_are_refused(arguments: tuple[int, Spacing], param: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        timesteps(*arguments)
    assert refusal.value.param == param


@pytest.mark.parametrize(("n", "offset"), [(1000, 1), (5, -1)])
def test_an_offset_out_of_the_schedule_is_refused(n: int, offset: int) -> None:
    with pytest.raises(InvalidInput) as refusal:
        timesteps(n, "leading", steps_offset=offset)
    assert refusal.value.param == "steps_offset"


@given(n=st.integers(1, 60), spacing=st.sampled_from(["leading", "linspace", "trailing"]))
def test_pairs_chain_down_to_the_clean_sample(n: int, spacing: Spacing) -> None:
    steps = timesteps(n, spacing)
    chain = pairs(steps)
    assert [t for t, _ in chain] == steps.tolist()
    assert [t for _, t in chain] == [*steps[1:].tolist(), CLEAN]
    assert all(type(t) is int for pair in chain for t in pair)


def test_only_numpy_is_needed() -> None:
    """The four modules of the mathematics run where nothing but NumPy is installed."""
    blocked = ["torch", "scipy", "pydantic", "PIL", "diffusers"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked}));"
        "import saccade.schedule, saccade.ddim, saccade.ensemble, saccade.metrics"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
