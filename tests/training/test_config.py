"""Typed configurations: strict, explained, and whatever is wrong is one line that names it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from saccade.errors import InvalidInput
from training.config import Range, build, explained, help_of, load, within
from training.stages import STAGES
from training.stages.command import parser, stage_of


@dataclass(frozen=True)
class Inner:
    name: str = explained("what it is called", "a1")
    depth: int = explained("blocks", 4)


@dataclass(frozen=True)
class Row:
    path: str = explained("where")
    weight: float = explained("how much", 1.0)


@dataclass(frozen=True)
class Outer:
    rate: float = explained("how fast", 1e-3)
    kind: Literal["plain", "fancy"] = explained("which", "plain")
    sizes: tuple[tuple[int, int], ...] = explained("how large", ((8, 8),))
    shares: dict[str, float] = explained("of each", factory=dict)
    inner: Inner = explained("", factory=Inner)
    maybe: Inner | None = explained("or nothing", None)
    rows: tuple[Row, ...] = explained("from where", ())

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise InvalidInput("rate must not be below 0", param="rate")


def test_a_file_and_what_is_put_over_it(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('rate = 1\nsizes = [[16, 8]]\ninner = "b2"\n[[rows]]\npath = "x"\n')
    given = ["inner.depth=9", "kind=fancy", "shares.depth=2", "maybe.depth=1", "rate=2e-4"]
    made = load(Outer, file, given)
    assert made == Outer(2e-4, "fancy", ((16, 8),), {"depth": 2.0}, Inner("b2", 9), Inner(depth=1), (Row("x"),))


def test_what_json_holds_comes_back(tmp_path: Path) -> None:
    made = Outer(rows=(Row("x", 2.0),), maybe=Inner("c"), shares={"flow": 0.5})
    file = tmp_path / "run.json"
    file.write_text(json.dumps(asdict(made)))
    assert load(Outer, file) == made


def test_none_can_be_said(tmp_path: Path) -> None:
    assert load(Outer, None, ["maybe.depth=3", "maybe=none"]).maybe is None


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"rat": 1}, "rat is not known; did you mean rate"),
        ({"inner": {"dept": 1}}, r"inner\.dept is not known; did you mean depth"),
        ({"rate": "fast"}, "rate is 'fast', which is not a number"),
        ({"rate": float("nan")}, "finite"),
        ({"rate": 10**400}, "finite"),
        ({"rate": True}, "rate is True"),
        ({"kind": "fance"}, "one of plain, fancy; did you mean fancy"),
        ({"sizes": [[8]]}, r"sizes\[0\] is \[8\], which is not a list of 2"),
        ({"sizes": 8}, "a list"),
        ({"sizes": [[8, 8.5]]}, r"sizes\[0\]\[1\] is 8.5, which is not a whole number"),
        ({"shares": {"depth": "much"}}, r"shares\.depth"),
        ({"rows": [{}]}, r"rows\[0\]\.path must be given"),
        ({"rows": [3]}, r"rows\[0\] is 3, which is not a table"),
        ({"inner": 3}, "inner is 3, which is not a table"),
        ({"rate": -1}, "rate must not be below 0"),
    ],
)
def test_what_cannot_be_used_is_named(table: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        build(Outer, table)


@pytest.mark.parametrize(
    ("text", "named"),
    [("rate = ", "run.toml"), ("[inner]\ndepth = 'x'", r"run.toml: inner\.depth"), ("\x00", "run.toml")],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(InvalidInput, match=named):
        load(Outer, file)


@pytest.mark.parametrize("override", ["rate", "=3", "rate.x=1"])
def test_what_is_not_name_and_value_is_refused(override: str) -> None:
    with pytest.raises(InvalidInput):
        load(Outer, None, ["rate=1", override])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"none\.toml cannot be read"):
        load(Outer, tmp_path / "none.toml")


@dataclass(frozen=True)
class Around:
    inner: Inner = explained("", factory=lambda: Inner("c3", 12))


def test_a_table_lies_over_the_value_that_its_field_begins_with() -> None:
    assert build(Around, {"inner": {"depth": 5}}) == Around(Inner("c3", 5))
    assert load(Around, None, ["inner.name=d4"]) == Around(Inner("d4", 12))
    text = help_of(Around)
    assert 'inner.name (text) [default: "c3"]' in text
    assert "inner.depth (a whole number) [default: 12]" in text


@dataclass(frozen=True)
class Ranged:
    value: Any


@pytest.mark.parametrize(
    ("allowed", "fine", "wrong", "told"),
    [
        (Range(0, 1), (0, 0.5, 1, (0, 1)), (-0.1, 1.1, (0.5, 2), float("nan")), "from 0 to 1"),
        (Range(0, 1, below=True), (0, 0.9), (1, (0.5, 1)), "from 0 to below 1"),
        (Range(0, above=True), (1e-9, 10**400), (0, -1, float("inf")), "above 0"),
        (Range(1), (1, ((1, 2), (3, 4))), (0, ((1, 2), (3, 0)), -(10**400)), "at least 1"),
    ],
)
def test_ranges_hold_for_every_number_of_a_field(allowed: Range, fine: Any, wrong: Any, told: str) -> None:
    for value in fine:
        within(Ranged(value), allowed, "value")
    for value in wrong:
        with pytest.raises(InvalidInput, match=f"value must be {told}, not") as refused:
            within(Ranged(value), allowed, "value")
        assert refused.value.param == "value"


def test_help_has_every_field_with_its_default() -> None:
    text = help_of(Outer)
    assert "rate (a number) [default: 0.001]" in text
    assert "kind (plain|fancy)" in text
    assert "inner.depth (a whole number) [default: 4]" in text
    assert "rows[].path (text) [must be given]" in text
    assert "maybe (a table or none) [default: none]" in text


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_explains_every_field(name: str) -> None:
    from training.config import entries

    found = list(entries(stage_of(name).Config))
    assert not [entry.name for entry in found if not entry.help]
    text = parser(name).format_help()
    assert not [entry.name for entry in found if f"  {entry.name} (" not in text]
