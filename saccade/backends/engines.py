"""What multiplies the matrices: ONNX Runtime or OpenVINO behind a small protocol. Each is imported when asked for."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from saccade.backends import bf16
from saccade.backends.graphs import Feeds, Port, Ports
from saccade.errors import ModelError

log = logging.getLogger(__name__)

# OpenVINO fills its tables of NumPy types at their first use, in C++ statics that let go of Python's lock meanwhile: a
# second thread that comes to them then waits for the first, and the first for it.
_READING = threading.Lock()

ENGINES = ("openvino", "onnxruntime")
PRECISIONS = ("fp32", "bf16")
PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
ATTEMPTS = 3
"""Of a run beside which others fail."""


Shapes = Mapping[str, tuple[int, ...]]


class Engine(Ports, Protocol):
    """A compiled graph. `run` may be called from any thread; it lets the others run meanwhile."""

    def specialise(self, shapes: Shapes) -> Shapes:
        """Compile once more for inputs of just these shapes, if that pays, and run them so from now on: faster, and
        rounded otherwise. The shapes of all outputs then. Not while the graph runs."""
        ...

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Every input by name -> every output by name, in arrays of their own."""
        ...


def choose(engine: str, precision: str) -> tuple[str, str]:
    """Resolve 'auto': OpenVINO where installed, else ONNX Runtime; bf16 where engine and processor have it, else fp32.

    Raises ModelError for an engine that is not installed and for a precision that it does not have.
    """
    if engine not in ("auto", *ENGINES):
        raise ModelError(f"no such engine: {engine!r}; use auto, {', '.join(ENGINES)}")
    if precision not in ("auto", *PRECISIONS):
        raise ModelError(f"no such precision: {precision!r}; use auto, {', '.join(PRECISIONS)}")
    found = [name for name in ENGINES if engine in ("auto", name) and importlib.util.find_spec(name)]
    if not found:
        wanted = "no engine is installed" if engine == "auto" else f"the engine {engine} is not installed"
        raise ModelError(f"{wanted}: pip install 'saccade[cpu]', or 'saccade[gpu]'")
    if precision == "bf16" and found[0] != "openvino":
        raise ModelError("ONNX Runtime multiplies in fp32 alone on a CPU: use the engine openvino for bf16")
    if precision == "auto":
        precision = "bf16" if found[0] == "openvino" and has_bf16() else "fp32"
    return found[0], precision


def open_engine(file: Path, engine: str, precision: str, threads: int, streams: int = 1) -> Engine:
    """Compile a graph, with names as `choose` gives them; for OpenVINO for `streams` runs at once, each on its share of
    the threads. Raises ModelError for a file that is not a graph."""
    try:
        if engine == "openvino":
            return OpenVino(file, precision, threads, streams)
        return OnnxRuntime(file, threads)
    except Exception as error:  # every engine has its own
        told = _first_line(error).replace(f"{file.parents[2]}/", "")
        raise ModelError(f"{engine} cannot load {'/'.join(file.parts[-3:])}: {told}") from error


class OnnxRuntime:
    """fp32, one operation after another, `threads` threads in each; on a CUDA device where the package has one."""

    def __init__(self, file: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 4  # what fails is raised, not printed
        providers = [name for name in PROVIDERS if name in onnxruntime.get_available_providers()]
        self._session = onnxruntime.InferenceSession(str(file), options, providers=providers)
        log.debug("%s: %s", "/".join(file.parts[-3:]), ", ".join(self._session.get_providers()))
        self.inputs = {port.name: _ort_port(port) for port in self._session.get_inputs()}
        self.outputs = {port.name: _ort_port(port) for port in self._session.get_outputs()}

    def specialise(self, shapes: Shapes) -> Shapes:
        """Its kernels are the same for any shape."""
        return {}

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        return dict(zip(self.outputs, self._session.run(None, dict(feeds)), strict=True))


class OpenVino:
    """fp32, or bf16 in linear layers and convolutions as `saccade.backends.bf16` says. Further runs than `streams` wait
    for one of those to end.

    A run that has begun goes on, even if nobody wants its results any more: OpenVINO 2026 can cancel it, but that is a
    failure to it, with what `_Compiled` tells of failures.
    """

    def __init__(self, file: Path, precision: str, threads: int, streams: int = 1) -> None:
        self._source = _Source(file, precision, threads, streams)
        model = self._source.read()
        self.lowered = self._source.lowered
        self.inputs = {port.any_name: _ov_port(port) for port in model.inputs}
        self.outputs = {port.any_name: _ov_port(port) for port in model.outputs}
        self._any = _Compiled(self._source.requests(model), self._source.again)
        self._special: dict[tuple[tuple[int, ...], ...], _Compiled] = {}

    def specialise(self, shapes: Shapes) -> Shapes:
        """With every size known OpenVINO fuses more, and infers no shapes as it goes."""
        model = self._source.read(shapes)
        compiled = _Compiled(self._source.requests(model), partial(self._source.again, shapes))
        self._special[tuple(shapes[name] for name in self.inputs)] = compiled
        return {port.any_name: _ov_port(port).dims for port in model.outputs}

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        whole = {name: np.ascontiguousarray(value) for name, value in feeds.items()}
        compiled = self._special.get(tuple(whole[name].shape for name in self.inputs), self._any)
        return dict(zip(self.outputs, compiled.run(whole), strict=True))


class _Source:
    """A graph's file, and how it is compiled. It knows nothing of those who hold what it makes: in a cycle that would
    keep its memory until the garbage collector comes by."""

    def __init__(self, file: Path, precision: str, threads: int, streams: int) -> None:
        self._file, self._precision, self._threads, self._streams = file, precision, threads, streams
        self._stamp = _stamp(file)
        self.lowered = 0

    def read(self, shapes: Shapes | None = None) -> Any:
        openvino = _openvino()
        if _stamp(self._file) != self._stamp:  # nobody has verified what is there now
            raise ModelError(
                f"the files of {self._file.parents[1].name} have changed since it was opened: open it anew"
            )
        with _READING:
            openvino.Tensor(np.zeros(1, np.float32))
            model = openvino.Core().read_model(str(self._file))
            self.lowered = bf16.narrow(model) if self._precision == "bf16" else 0
        log.debug("%s: %d layers in bf16", "/".join(self._file.parts[-3:]), self.lowered)
        if shapes is not None:
            model.reshape({name: list(sizes) for name, sizes in shapes.items()})
        return model

    def requests(self, model: Any) -> list[Any]:
        """One for each stream of the compiled model.

        OpenVINO's plugin gives the thread that it is made in another stack for signals, and frees that when it goes. If
        it goes in another thread, or before one that was made earlier, the first thread is left with what was freed,
        and its next signal ends the process. So it is made in a thread that ends here.
        """
        with ThreadPoolExecutor(1) as own:
            return own.submit(self._compile, model).result()

    def _compile(self, model: Any) -> list[Any]:
        properties = openvino_properties(self._threads, self._streams)
        compiled = _openvino().Core().compile_model(model, "CPU", properties)
        return [compiled.create_infer_request() for _ in range(self._streams)]

    def again(self, shapes: Shapes | None = None) -> list[Any]:
        return self.requests(self.read(shapes))


class _Compiled:
    """Infer requests of one compiled model, each for one run at a time; further runs wait.

    A run that fails leaves its stream's graph in disorder: later runs of other sizes fail too, or answer with what was
    there before. So whatever was compiled is given up then, and compiled anew for the next run. Runs that another's
    failure fell into, whether they came to something or not, are made again.
    """

    def __init__(self, requests: list[Any], again: Callable[[], list[Any]]) -> None:
        self._requests, self._again = requests, again
        self._free: SimpleQueue[int] = SimpleQueue()
        for slot in range(len(requests)):
            self._free.put(slot)
        self._failures = 0
        self._mending = threading.Lock()

    def run(self, feeds: Feeds) -> tuple[NDArray[Any], ...]:
        slot = self._free.get()
        try:
            for _ in range(ATTEMPTS):
                request, failures = self._whole(slot)
                try:
                    results: tuple[NDArray[Any], ...] = request.infer(feeds, share_inputs=True).to_tuple()
                except Exception:
                    if self._give_up(failures):
                        raise
                else:
                    if self._failures == failures:
                        return results
            raise RuntimeError("other runs failed beside it, again and again")
        finally:
            self._free.put(slot)

    def _whole(self, slot: int) -> tuple[Any, int]:
        """A request in good order, and how many runs had failed before. Raises what compiling does."""
        with self._mending:
            if not self._requests:
                self._requests = self._again()
            return self._requests[slot], self._failures

    def _give_up(self, failures: int) -> bool:
        """Whether it was this run that failed, and no other beside it."""
        with self._mending:
            if self._failures != failures:
                return False
            self._failures += 1
            self._requests = []
            return True


def openvino_properties(threads: int, streams: int = 1) -> dict[str, Any]:
    """How every graph is compiled: precision is the graph's own (see `saccade.backends.bf16`)."""
    return {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
        "NUM_STREAMS": streams,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # several processes of one machine would pin to the same cores
    }


def _openvino() -> Any:
    """The package without its telemetry: on import that would fork this process and write to Google Analytics."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as if it were not installed
    import openvino

    return openvino


def _stamp(file: Path) -> list[tuple[str, int, int]]:
    """Of a graph and the weights beside it: name, size and time of last change."""
    found = [(one.name, one.stat()) for one in sorted(file.parent.iterdir())]
    return [(name, told.st_size, told.st_mtime_ns) for name, told in found]


def _ort_port(port: Any) -> Port:
    names = {"tensor(float)": "float32", "tensor(int64)": "int64"}
    return Port(tuple(size if isinstance(size, int) else -1 for size in port.shape), names.get(port.type, port.type))


def _ov_port(port: Any) -> Port:
    dims = tuple(size.get_length() if size.is_static else -1 for size in port.get_partial_shape())
    return Port(dims, np.dtype(port.get_element_type().to_dtype()).name)


def default_threads() -> int:
    """Physical cores that this process may use, and no more than its control group's share of time allows."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed}
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.isdigit():
        return max(1, min(len(cores), -(-int(quota) // int(period))))
    return max(1, len(cores))


def has_bf16() -> bool:
    """Whether the processor multiplies in bf16 by itself."""
    return bool({"avx512_bf16", "amx_bf16"} & set(_read("/proc/cpuinfo").split()))


def _read(file: str) -> str:
    """A system file's text; empty where the system has none."""
    try:
        return Path(file).read_text().strip()
    except OSError:
        return ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200] or type(error).__name__
