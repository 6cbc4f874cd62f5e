"""What ships: the default model is whole and says what it is; the documents' links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from saccade.formats import read_flo, read_mask
from saccade.local import Local
from saccade.metrics import epe, iou
from saccade.repository import Repository

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])


@pytest.fixture(scope="module")
def repository() -> Repository:
    return Repository(ROOT / "model_repository")


def test_the_default_models_card_says_what_people_ask(repository: Repository) -> None:
    card = repository.card(repository.default())
    assert set(card.tasks) == {"depth", "flow", "amodal"}
    assert card.licence
    assert card.training.data
    assert card.training.device
    assert card.training.samples > 10_000
    assert {point.task for point in card.quality} == set(card.tasks)


def test_the_default_model_is_the_one_that_its_card_describes(repository: Repository) -> None:
    repository.verify(repository.card(repository.default()))


def test_the_default_model_fits_its_budget() -> None:
    files = [file for file in (ROOT / "model_repository").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 32_000_000


@pytest.fixture(scope="module")
def local() -> Local:
    with Local(ROOT / "model_repository") as opened:
        yield opened


def test_depth_of_the_example_is_a_depth_map(local: Local) -> None:
    depth = local.depth(EXAMPLES / "photo.jpg").prediction
    assert (depth.min(), depth.max()) == (0, 1)
    assert depth[: len(depth) // 4].mean() > depth[-len(depth) // 4 :].mean()  # the table's far end is at the top


def test_flow_of_the_example_is_better_than_none(local: Local) -> None:
    truth = read_flo((EXAMPLES / "frame_flow.flo").read_bytes())
    flow = local.flow(EXAMPLES / "frame_1.png", EXAMPLES / "frame_2.png").prediction
    seen = np.isfinite(truth).all(-1)
    assert epe(flow, truth, seen) < epe(np.zeros_like(truth), truth, seen)


def test_the_example_object_is_made_whole(local: Local) -> None:
    visible = read_mask((EXAMPLES / "occluded_mask.png").read_bytes())
    whole = local.amodal(EXAMPLES / "occluded.jpg", EXAMPLES / "occluded_mask.png").prediction
    assert (whole & visible).sum() == visible.sum()
    assert iou(whole, visible) > 0.6


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing
