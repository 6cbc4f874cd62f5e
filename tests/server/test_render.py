"""What `saccade.render` refuses, for those who call it without a server."""

from __future__ import annotations

import numpy as np
import pytest

from saccade import render
from saccade.errors import InvalidInput
from saccade.pipeline import Answer, Resolved

OPTIONS = Resolved(1, 1, "mean", 0, "trailing", 64, True, False)
FLAT = Answer("depth", np.zeros((4, 6), np.float32), np.zeros((4, 6), np.float32), None, OPTIONS, "toy", "")
MASK = Answer("amodal", np.eye(4, dtype=np.bool_), None, None, OPTIONS, "toy", "")


@pytest.mark.parametrize(
    ("answer", "format", "style", "param"),
    [
        (FLAT, "flo", "data", "format"),
        (FLAT, "png", "object", "render"),
        (FLAT, "npy", "color", "render"),
        (FLAT, "png", "data", "output_uncertainty"),
        (MASK, "png", "object", "render"),
    ],
)
def test_refusals_name_the_option(answer: Answer, format: render.Format, style: render.Render, param: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        render.encode(answer, format, style)
    assert refused.value.param == param


def test_an_uncertainty_of_zero_stays_zero() -> None:
    document = render.document(FLAT)
    assert document["uncertainty"]["scale"] > 0
    assert document["completed"] is None


def test_a_mask_without_its_picture_is_shown_on_grey() -> None:
    assert render.encode(MASK, "png", "color").media_type == "image/png"


def test_every_format_has_a_media_type_and_a_task() -> None:
    assert set(render.MEDIA_TYPES) == {kind for kinds in render.FORMATS_OF_SEVERAL.values() for kind in kinds}
