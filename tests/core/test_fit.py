from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from saccade.fit import Fit, context_box, resize


@given(
    height=st.integers(1, 600),
    width=st.integers(1, 600),
    resolution=st.integers(0, 500),
    multiple=st.sampled_from([1, 8, 16]),
)
def test_a_plan_keeps_the_proportions_and_pads_to_the_multiple(
    height: int, width: int, resolution: int, multiple: int
) -> None:
    fit = Fit.plan((height, width), resolution, multiple)
    longer = resolution or max(height, width)
    assert max(fit.size) == longer
    assert min(fit.size) == max(1, round(min(height, width) * longer / max(height, width)))
    for edge, padded in zip(fit.size, fit.padded, strict=True):
        assert padded % multiple == 0
        assert 0 <= padded - edge < multiple


def test_the_padding_repeats_the_last_row_and_column() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    fit = Fit.plan((20, 30), 0, 16)
    planes = fit.picture(picture)
    assert planes.shape == (3, 32, 32)
    np.testing.assert_allclose(fit.content(planes), picture.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(planes[:, 20:], np.repeat(planes[:, 19:20], 12, axis=1))
    np.testing.assert_array_equal(planes[:, :, 30:], np.repeat(planes[:, :, 29:30], 2, axis=2))


def test_a_mask_is_soft_where_a_pixel_is_partly_covered() -> None:
    mask = np.zeros((64, 64), bool)
    mask[:, :31] = True
    planes = Fit.plan((64, 64), 16, 16).mask(mask)
    assert planes.shape == (3, 16, 16)
    assert planes.min() == -1
    assert planes.max() == 1
    assert (planes.mean() + 1) / 2 == pytest.approx(31 / 64, abs=0.01)


def test_a_map_of_a_box_goes_back_to_its_place() -> None:
    fit = Fit.plan((40, 60), 0, 16, box=(5, 10, 20, 30))
    plane = np.random.default_rng(0).random((20, 30), np.float32)
    restored = fit.restore(plane)
    assert restored.shape == (40, 60)
    np.testing.assert_array_equal(restored[5:25, 10:40], plane)
    assert np.count_nonzero(restored) == np.count_nonzero(plane)


@pytest.mark.parametrize("size", [(7, 9), (80, 100), (13, 90), (20, 30)])
def test_resizing_is_torchs_antialiased_bilinear(size: tuple[int, int]) -> None:
    plane = np.random.default_rng(0).random((20, 30), np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(plane)[None, None], size, mode="bilinear", align_corners=False, antialias=True
    )[0, 0]
    np.testing.assert_allclose(resize(plane, size), expected.numpy(), atol=1e-5)


@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.tuples(st.integers(0, 90), st.integers(0, 90)))
def test_enlarging_is_pillows_bilinear(small: tuple[int, int], more: tuple[int, int]) -> None:
    plane = np.random.default_rng(0).normal(0, 1, small).astype(np.float32)
    height, width = small[0] + more[0], small[1] + more[1]
    expected = Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(resize(plane, (height, width)), np.asarray(expected), atol=1e-6)


@given(st.data())
def test_the_context_holds_the_mask_and_stays_in_the_picture(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom, right = data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width))
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    y, x, h, w = context_box(mask, 0.75)
    margin = round(0.75 * max(bottom - top, right - left))
    assert (y, x) == (max(0, top - margin), max(0, left - margin))
    assert (y + h, x + w) == (min(height, bottom + margin), min(width, right + margin))


@pytest.mark.parametrize("source", [(3000, 4000), (17, 5000), (40, 60), (256, 256)])
@pytest.mark.parametrize("box", [None, (0, 0, 2, 2), (3, 4, 10, 12), (15, 58, 2, 2)])
def test_a_shrunk_view_is_of_the_same_part(source: tuple[int, int], box: tuple[int, int, int, int] | None) -> None:
    fit = Fit.plan(source, 64, 16, box)
    small = fit.shrunk(256)
    assert max(small.source) == min(256, max(source))
    assert (small.size, small.padded) == (fit.size, fit.padded)
    top, left, height, width = small.box
    assert min(height, width) >= 1
    assert top + height <= small.source[0]
    assert left + width <= small.source[1]
    assert small.restore(np.zeros(fit.size, np.float32)).shape == small.source
    factor = min(1.0, 256 / max(source))
    assert np.allclose(small.box, np.multiply(fit.box, factor), atol=1.01)
