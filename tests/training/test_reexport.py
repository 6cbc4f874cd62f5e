"""A model of the repository, exported again from the weights in its own graphs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper

from saccade.card import Card
from saccade.errors import ModelError
from saccade.repository import Repository
from training import reexport
from training.export import describe
from training.servable import Servable

SHIPPED = Path(reexport.__file__).parents[1] / "model_repository"


def test_what_is_exported_has_the_graphs_weights_and_the_cards_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the exporter's minutes; `test_export` has the exporter."""
    given: list[Servable] = []

    def export(servable: Servable, facts: Mapping[str, Any], repository: Path) -> Card:
        given.append(servable)
        return describe(servable, facts, {})

    monkeypatch.setattr(reexport, "export", export)
    repository = Repository(SHIPPED)
    card = repository.card(repository.default())
    assert reexport.reexport(SHIPPED) == card.model_copy(update={"digests": {}})
    weights = given[0].encoder.state_dict()
    graph = onnx.load(repository.graph(card.encoder)).graph
    named = {value.name: torch.from_numpy(numpy_helper.to_array(value).copy()) for value in graph.initializer}
    shared = weights.keys() & named.keys()
    assert len(shared) > 50
    assert all(torch.equal(weights[name].ravel(), named[name].ravel()) for name in shared)


def test_a_folder_without_models_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="model"):
        reexport.reexport(tmp_path)
