"""Typed configurations from files and `name=value`, strict: what no field takes is an error that names the nearest.

A configuration is a frozen dataclass; its fields' help is in their metadata. Standard library alone.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from saccade.errors import InvalidInput

T = TypeVar("T")
LARGEST_FILE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of help: `name` with the tables it is in, what it may be, its default ('' where it has to be given)."""

    name: str
    kind: str
    default: str
    help: str


@dataclasses.dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`. `above`: not `low` itself; `below`: not `high` itself."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        if not self.low <= value <= self.high:
            return False
        return value != math.inf and not (self.above and value == self.low) and not (self.below and value == self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        return f"from {'above ' * self.above}{self.low:g} to {'below ' * self.below}{self.high:g}"


SHARE, BELOW_ONE = Range(0, 1), Range(0, 1, below=True)
NOT_NEGATIVE, POSITIVE, COUNT = Range(0), Range(0, above=True), Range(1)
EDGE = Range(1, 65536)
"""Of a picture, in pixels."""


def within(config: Any, allowed: Range, *names: str) -> None:
    """Raises InvalidInput for the first of a configuration's fields that has a number out of the range."""
    for name in names:
        for value in _numbers(getattr(config, name)):
            if value not in allowed:
                raise InvalidInput(f"{name} must be {allowed}, not {value}", param=name)


def _numbers(value: Any) -> Iterator[float]:
    """Those of lists in lists, one after another."""
    if not isinstance(value, Sequence):
        yield value
        return
    for one in value:
        yield from _numbers(one)


def explained(help: str, default: Any = dataclasses.MISSING, factory: Any = dataclasses.MISSING) -> Any:
    """A field with its line of help."""
    return dataclasses.field(default=default, default_factory=factory, metadata={"help": help})


def load(kind: type[T], file: Path | None, overrides: Sequence[str] = ()) -> T:
    """The configuration in a TOML or JSON file, with `table.name=value` put over it.

    Raises InvalidInput that names the file and the field for whatever cannot be used.
    """
    table = {} if file is None else read(file)
    for override in overrides:
        put(table, override)
    try:
        return build(kind, table)
    except InvalidInput as error:
        about = "" if file is None else f"{file}: "
        raise InvalidInput(f"{about}{error}", param=error.param) from error


def read(file: Path) -> dict[str, Any]:
    """A TOML or JSON file's table. Raises InvalidInput."""
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise InvalidInput(f"{file} is larger than any configuration", param="config")
        text = file.read_text("utf-8")
    except (OSError, UnicodeError) as error:
        raise InvalidInput(
            f"{file} cannot be read: {getattr(error, 'strerror', None) or error}", param="config"
        ) from error
    try:
        table = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{file}: {error}", param="config") from error
    if not isinstance(table, dict):
        raise InvalidInput(f"{file} does not hold a table", param="config")
    return table


def put(table: dict[str, Any], override: str) -> None:
    """`a.b=value` into the table; a value that is not TOML is text. Raises InvalidInput."""
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise InvalidInput(f"not name=value: {override!r}", param=override)
    *tables, last = name.strip().split(".")
    for key in tables:
        if isinstance(table.get(key), str):  # what may be said in one word is the name of a table's rest
            table[key] = {"name": table[key]}
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise InvalidInput(f"{name}: {key} is not a table", param=name)
    try:
        table[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = text.strip()


def build(kind: type[T], table: Mapping[str, Any], where: str = "", under: T | None = None) -> T:
    """The dataclass `kind` from a table as TOML or JSON hold it; what the table leaves out is as in `under`, else the
    field's default. Raises InvalidInput."""
    hints = get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in table:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
            raise InvalidInput(f"{where}{name} is not known{hint}", param=f"{where}{name}")
    missing = [name for name, f in known.items() if under is None and name not in table and _required(f)]
    if missing:
        told = ", ".join(f"{where}{name}" for name in missing)
        raise InvalidInput(f"{told} must be given", param=f"{where}{missing[0]}")
    given = {} if under is None else {name: getattr(under, name) for name in known}
    for name, value in table.items():
        given[name] = _convert(hints[name], value, f"{where}{name}", _default(known[name], under))
    try:
        return kind(**given)
    except InvalidInput as error:
        raise InvalidInput(f"{where.rstrip('.') + ': ' if where else ''}{error}", param=error.param) from error


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field[Any], under: Any = None) -> Any:
    """A field's value where none is given: that of `under`, else its own; None where it must be given."""
    if under is not None:
        return getattr(under, field.name)
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None


def _convert(hint: Any, value: Any, where: str, under: Any = None) -> Any:
    """A value as the type `hint`; a table lies over `under`, where that is of this type. Raises InvalidInput."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _one_of(inner, value, where, under)
    if origin is Literal:
        if value not in inner:
            near = difflib.get_close_matches(str(value), map(str, inner), 1)
            told = ", ".join(map(str, inner))
            raise _wrong(where, value, f"one of {told}" + (f"; did you mean {near[0]}?" if near else ""))
        return value
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if isinstance(value, str) and any(f.name == "name" for f in dataclasses.fields(hint)):
            value = {"name": value}
        if not isinstance(value, Mapping):
            raise _wrong(where, value, "a table")
        return build(hint, value, f"{where}.", under if isinstance(under, hint) else None)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _wrong(where, value, "a table")
        return {str(k): _convert(inner[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin is tuple:
        return _sequence(inner, value, where)
    return _plain(hint, value, where)


def _one_of(hints: tuple[Any, ...], value: Any, where: str, under: Any) -> Any:
    """`none` and `""` stand for None where that may be: TOML has no word for it."""
    if type(None) in hints and (value is None or value == "none"):
        return None
    error: InvalidInput | None = None
    for hint in (h for h in hints if h is not type(None)):
        try:
            return _convert(hint, value, where, under)
        except InvalidInput as wrong:
            error = error or wrong
    raise error or _wrong(where, value, "nothing")


def _sequence(hints: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise _wrong(where, value, "a list")
    if len(hints) == 2 and hints[1] is Ellipsis:
        return tuple(_convert(hints[0], entry, f"{where}[{i}]") for i, entry in enumerate(value))
    if len(hints) != len(value):
        raise _wrong(where, value, f"a list of {len(hints)}")
    return tuple(_convert(hint, v, f"{where}[{i}]") for i, (hint, v) in enumerate(zip(hints, value, strict=True)))


def _plain(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # a whole number of hundreds of digits
            number = math.inf
        if not math.isfinite(number):
            raise _wrong(where, value, "a finite number")
        return number
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, str):
        return value
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    raise _wrong(where, value, _told(hint))


def _wrong(where: str, value: Any, wanted: str) -> InvalidInput:
    return InvalidInput(f"{where} is {value!r}, which is not {wanted}", param=where)


def _told(hint: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    words = {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        Path: "a path",
        Any: "anything",
    }
    if hint in words:
        return words[hint]
    if origin in (Union, types.UnionType):
        return " or ".join("none" if h is type(None) else _told(h) for h in inner)
    if origin is Literal:
        return "|".join(map(str, inner))
    if origin is dict:
        return f"a table of {_told(inner[1])}"
    if origin is tuple:
        return f"a list: {_told(inner[0])}"
    return "a table"


def entries(kind: type[Any], where: str = "", under: Any = None) -> Iterator[Entry]:
    """Every field of a configuration and of the tables in it, in order; defaults are those of `under`, where given."""
    hints = get_type_hints(kind)
    for f in dataclasses.fields(kind):
        inner = _table(hints[f.name])
        rows = _rows(hints[f.name])
        if rows is not None:
            yield Entry(f"{where}{f.name}", "a list of tables", _shown(f, under), f.metadata.get("help", ""))
            yield from entries(rows, f"{where}{f.name}[].")
            continue
        if inner is not None and (f.default is not None or _default(f, under) is not None):
            yield from entries(inner, f"{where}{f.name}.", _default(f, under))
            continue
        if inner is not None:
            yield Entry(f"{where}{f.name}", "a table or none", "none", f.metadata.get("help", ""))
            yield from entries(inner, f"{where}{f.name}.")
            continue
        yield Entry(f"{where}{f.name}", _told(hints[f.name]), _shown(f, under), f.metadata.get("help", ""))


def _table(hint: Any) -> type[Any] | None:
    """The dataclass behind a hint, or None."""
    kinds = [h for h in (get_args(hint) or (hint,)) if dataclasses.is_dataclass(h)]
    is_list = get_origin(hint) in (tuple, dict)
    return kinds[0] if kinds and not is_list else None  # type: ignore[return-value]


def _rows(hint: Any) -> type[Any] | None:
    """The dataclass of which a hint wants a list, or None."""
    inner = get_args(hint)
    return inner[0] if get_origin(hint) is tuple and dataclasses.is_dataclass(inner[0]) else None


def _shown(field: dataclasses.Field[Any], under: Any = None) -> str:
    """A default in TOML's words."""
    if under is None and _required(field):
        return ""
    value = _default(field, under)
    if value is None:
        return "none"
    if isinstance(value, tuple):
        value = list(value)
    return json.dumps(value, default=lambda v: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else str(v))


def help_of(kind: type[Any]) -> str:
    """Every field with its default, as --help shows them."""
    lines = []
    for entry in entries(kind):
        default = f" [default: {entry.default}]" if entry.default else " [must be given]"
        lines.append(f"  {entry.name} ({entry.kind}){default}")
        if entry.help:
            lines.append(f"      {entry.help}")
    return "\n".join(lines)
