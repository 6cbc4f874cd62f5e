"""Requests and answers of the protocol: JSON, with the binary tensor extension.

https://github.com/kserve/open-inference-protocol and Triton's extension_binary_data.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from server import problems
from server.problems import Problem

LENGTH_HEADER = "Inference-Header-Content-Length"
DATATYPES = {"FP32": "float32", "INT64": "int64"}
MAX_TENSORS = 16
MOST_UNPACKED_TO_ONE = 1032
"""Deflate makes no more of a byte."""
MAX_JSON_BYTES = 8 << 20
MAX_JSON_OBJECTS = 8 * MAX_TENSORS
MAX_JSON_NUMBERS = 1 << 20
Arrays = Mapping[str, NDArray[Any]]
Name = Annotated[StrictStr, Field(min_length=1, max_length=256)]


def refused(told: str) -> Problem:
    return Problem(problems.MALFORMED, told)


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class InputTensor(_Part):
    name: Name
    datatype: StrictStr = Field(max_length=16)
    shape: list[Annotated[StrictInt, Field(ge=1, le=1 << 31)]] = Field(min_length=1, max_length=8)
    parameters: dict[str, Any] = Field(default_factory=dict)
    data: list[Any] | None = None


class OutputTensor(_Part):
    name: Name
    parameters: dict[str, Any] = Field(default_factory=dict)


class _Request(_Part):
    id: Annotated[StrictStr, Field(max_length=256)] = ""
    inputs: list[InputTensor] = Field(max_length=MAX_TENSORS)
    outputs: list[OutputTensor] = Field(default_factory=list, max_length=MAX_TENSORS)
    parameters: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """A request that is well formed. `datatypes` and `inputs` by name, in shapes as they were sent.

    `outputs`: name -> whether in binary, of those that were asked for; where none was, `binary` holds for all.
    """

    id: str
    datatypes: Mapping[str, str]
    inputs: Arrays
    outputs: Mapping[str, bool]
    binary: bool


def read(body: bytes, length: str | None, encoding: str, most_bytes: int) -> Call:
    """Body and its headers (`LENGTH_HEADER`, Content-Encoding) -> the call. Raises Problem 400, 413 or 415."""
    body = _unpacked(body, encoding.strip().lower(), most_bytes)
    size = len(body) if length is None else _number(length)
    if size > len(body):
        raise refused(f"{LENGTH_HEADER} is {size}, and the body has {len(body)} bytes.")
    request = _parsed(body[:size])
    _only_what_is_offered(request)
    inputs = _inputs(request.inputs, memoryview(body)[size:], length is not None)
    binary = _flag(request.parameters, "binary_data_output", False)
    outputs = {one.name: _flag(one.parameters, "binary_data", binary) for one in request.outputs}
    if len(outputs) < len(request.outputs):
        raise refused("An output is asked for twice.")
    return Call(request.id, {one.name: one.datatype for one in request.inputs}, inputs, outputs, binary)


def height(body: bytes, encoding: str, most_bytes: int) -> int:
    """Bytes that `read` may take: what an encoded body may unpack to, or the body's length."""
    plain = encoding.strip().lower() in ("", "identity")
    return len(body) if plain else min(most_bytes, MOST_UNPACKED_TO_ONE * len(body))


def _unpacked(body: bytes, encoding: str, most_bytes: int) -> bytes:
    """What gzip and deflate (which is zlib) hold, of at most `most_bytes`."""
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        raise Problem(problems.UNSUPPORTED, "Content-Encoding must be gzip, deflate or identity.")
    stream = zlib.decompressobj(zlib.MAX_WBITS | 32)
    try:
        whole = stream.decompress(body, most_bytes + 1)
    except zlib.error as error:
        raise refused(f"The body is not the {encoding} that its Content-Encoding says.") from error
    if len(whole) > most_bytes:
        raise Problem(problems.TOO_LARGE, f"Unpacked, the body has more than {most_bytes} bytes. Send less.")
    if not stream.eof:
        raise refused(f"The body stops before its {encoding} ends.")
    return whole


def _number(length: str) -> int:
    if not (length.isascii() and length.isdigit() and len(length) < 16):
        raise refused(f"{LENGTH_HEADER} must be the number of bytes that the JSON takes.")
    return int(length)


def _parsed(text: bytes) -> _Request:
    """Numbers are bounded by the bytes, objects are counted: none may grow a hundredfold in memory."""
    if len(text) > MAX_JSON_BYTES:
        told = f"The JSON has more than {MAX_JSON_BYTES} bytes. Send tensors as binary data, outside the JSON."
        raise Problem(problems.TOO_LARGE, told)
    if text.count(b"{") > MAX_JSON_OBJECTS:
        raise refused(f"The JSON has more than {MAX_JSON_OBJECTS} objects, which no inference request needs.")
    try:
        return _Request.model_validate(json.loads(text, parse_constant=_no_constant))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise refused(f"{'.'.join(map(str, first['loc'])) or 'The request'}: {first['msg']}.") from error
    except (ValueError, RecursionError) as error:
        raise refused("The body is not valid JSON.") from error


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _only_what_is_offered(request: _Request) -> None:
    parts: list[_Request | InputTensor | OutputTensor] = [request, *request.inputs, *request.outputs]
    for parameters in (part.parameters for part in parts):
        found = [key for key in parameters if key.startswith("shared_memory") or key == "classification"]
        if found or parameters.get("sequence_id"):
            raise refused(f"{(found or ['sequence_id'])[0]} is not offered here.")


def _flag(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise refused(f"{name} must be true or false.")
    return value


def _inputs(given: Sequence[InputTensor], raw: memoryview, has_raw: bool) -> dict[str, NDArray[Any]]:
    """Every input's numbers, from its `data` or from its share of the bytes behind the JSON."""
    inputs: dict[str, NDArray[Any]] = {}
    for one in given:
        if one.name in inputs:
            raise refused(f"input {one.name!r} is given twice.")
        if one.datatype not in DATATYPES:
            raise refused(f"input {one.name!r} is of datatype {one.datatype!r}: use {' or '.join(DATATYPES)}.")
        size = one.parameters.get("binary_data_size")
        if size is None:
            inputs[one.name] = _from_json(one)
        elif not has_raw:
            raise refused(f"input {one.name!r} has a binary_data_size, but the header {LENGTH_HEADER} is missing.")
        else:
            inputs[one.name], raw = _from_bytes(one, size, raw)
    if len(raw):
        raise refused(f"{len(raw)} bytes of the body belong to no input.")
    return inputs


def _from_bytes(tensor: InputTensor, size: object, raw: memoryview) -> tuple[NDArray[Any], memoryview]:
    """The tensor, in memory of its own, and the bytes behind it."""
    dtype = np.dtype(DATATYPES[tensor.datatype]).newbyteorder("<")
    needed = prod(tensor.shape) * dtype.itemsize
    if type(size) is not int or size != needed:
        told = f"shape {tensor.shape} of {tensor.datatype} takes {needed}"
        raise refused(f"input {tensor.name!r} has a binary_data_size of {size!r}, and {told} bytes.")
    if size > len(raw):
        raise refused(f"input {tensor.name!r} takes {size} bytes, and {len(raw)} are left of the body.")
    return np.frombuffer(raw[:size], dtype).astype(dtype.newbyteorder("=")).reshape(tensor.shape), raw[size:]


def _from_json(tensor: InputTensor) -> NDArray[Any]:
    """`data`, flat or nested as the shape says."""
    if tensor.data is None:
        raise refused(f"input {tensor.name!r} has neither data nor a binary_data_size.")
    numbers = _flat(tensor.data, tensor.shape)
    kinds = set(map(type, numbers))
    if not kinds <= ({int, float} if tensor.datatype == "FP32" else {int}):
        raise refused(f"the data of input {tensor.name!r} must be numbers, and whole ones for INT64.")
    if len(numbers) != prod(tensor.shape):
        raise refused(f"input {tensor.name!r} has {len(numbers)} numbers, not {prod(tensor.shape)}.")
    try:
        with np.errstate(over="ignore"):  # too much for FP32 is infinite, and refused for that
            return np.array(numbers, DATATYPES[tensor.datatype]).reshape(tensor.shape)
    except (OverflowError, ValueError) as error:
        raise refused(f"the data of input {tensor.name!r} are too large for {tensor.datatype}.") from error


def _flat(data: list[Any], shape: Sequence[int]) -> list[Any]:
    """Nested lists as one, if they are nested as the shape says; else what is left, which are no numbers."""
    for size in shape[1:]:
        if not all(type(row) is list and len(row) == size for row in data):
            break
        data = list(chain.from_iterable(data))
    return data


def write(call: Call, model: str, version: str, results: Arrays) -> tuple[bytes, dict[str, str], str]:
    """The answer's body, its headers and its media type. Raises Problem 400 for too many numbers as JSON."""
    wanted = call.outputs or dict.fromkeys(results, call.binary)
    outputs, raw = [], []
    for name, binary in wanted.items():
        value = results[name]
        told: dict[str, Any] = {"name": name, "datatype": _datatype(value), "shape": list(value.shape)}
        if binary:
            raw.append(np.ascontiguousarray(value, value.dtype.newbyteorder("<")).tobytes())
            told["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            told["data"] = _numbers(name, value)
        outputs.append(told)
    head: dict[str, Any] = {"id": call.id} if call.id else {}
    text = json.dumps(head | {"model_name": model, "model_version": version, "outputs": outputs}).encode()
    if not raw:
        return text, {}, "application/json"
    return b"".join([text, *raw]), {LENGTH_HEADER: str(len(text))}, "application/octet-stream"


def _numbers(name: str, value: NDArray[Any]) -> list[float]:
    if value.size > MAX_JSON_NUMBERS:
        told = f"output {name!r} has {value.size} numbers, too many for JSON"
        raise refused(f"{told}: ask for it with binary_data, or for binary_data_output.")
    numbers: list[float] = value.ravel().tolist()
    return numbers


def _datatype(value: NDArray[Any]) -> str:
    return next(there for there, here in DATATYPES.items() if here == value.dtype.name)
