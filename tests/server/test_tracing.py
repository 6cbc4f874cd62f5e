"""Traces, as a collector receives them; and nothing of them where there is none."""

from __future__ import annotations

import gzip
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.server.house import files
from tests.server.process import serving
from tests.server.test_drain import HANGING, gate

__all__ = ["gate"]
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector:
    """Takes what OTLP over HTTP sends."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/v1/traces":
                    if self.headers.get("Content-Encoding") == "gzip":
                        body = gzip.decompress(body)
                    sent = ExportTraceServiceRequest.FromString(body)
                    collector.spans += [s for r in sent.resource_spans for found in r.scope_spans for s in found.spans]
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def attributes(span: Span) -> dict[str, str | int]:
    return {one.key: one.value.string_value or one.value.int_value for one in span.attributes}


def test_a_request_is_one_trace_with_its_phases_and_batches(toy_repository: Path, collector: Collector) -> None:
    with serving(toy_repository, otlp_endpoint=collector.url, log_format="json", batch_size=4) as server:
        url = server.url + "/depth?steps=5"
        headers = {"traceparent": PARENT, "X-Request-ID": "the-one"}
        assert httpx.post(url, files=files("depth"), headers=headers).status_code == 200
        assert httpx.post(url, content=b"x").status_code == 415
        with ThreadPoolExecutor(4) as pool:
            long = server.url + "/depth?steps=100"  # long enough to meet the others
            many = [pool.submit(httpx.post, long, files=files("depth")) for _ in range(4)]
            assert {answer.result().status_code for answer in many} == {200}
        server.popen.terminate()
        assert server.popen.wait(30) == 0
        assert f'"trace_id": "{PARENT[3:35]}"' in server.log.read_text()
    (root,) = (span for span in collector.named("POST /depth") if attributes(span)["saccade.request_id"] == "the-one")
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (PARENT[3:35], PARENT[36:52])
    facts = attributes(root)
    assert (facts["http.route"], facts["http.response.status_code"]) == ("/depth", 200)
    mine = [span for span in collector.spans if span.trace_id == root.trace_id]
    phases = {span.name: span for span in mine if span.parent_span_id == root.span_id}
    assert phases.keys() == {"encode", "denoise", "decode", "ensemble"}
    steps = [span for span in mine if span.name == "batch denoise"]
    assert len(steps) == 5
    assert {span.parent_span_id for span in steps} == {phases["denoise"].span_id}
    assert all(root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano for span in steps)
    check_sharing(collector)


def check_sharing(collector: Collector) -> None:
    """A batch that several requests shared is linked to the others."""
    known = {(span.trace_id, span.span_id): span.name for span in collector.spans}
    links = [(span, link) for span in collector.named("batch denoise") for link in span.links]
    assert {known[link.trace_id, link.span_id] for _, link in links} == {"denoise"}
    assert all(link.trace_id != span.trace_id for span, link in links)


def test_a_collector_that_is_away_keeps_nobody(toy_repository: Path) -> None:
    with serving(toy_repository, otlp_endpoint="http://127.0.0.1:9") as server:
        assert httpx.post(server.url + "/depth", files=files("depth")).status_code == 200
        server.popen.terminate()
        assert server.popen.wait(30) == 0


def test_a_fault_is_an_error_in_the_trace(toy_repository: Path, collector: Collector, gate: Path) -> None:
    settings = {"program": HANGING, "otlp_endpoint": collector.url, "request_timeout_s": 1}
    with serving(toy_repository, **settings) as server:
        gate.touch()
        assert httpx.post(server.url + "/depth", files=files("depth")).status_code == 503
        gate.unlink()
        server.popen.terminate()
        server.popen.wait(30)
    (span,) = collector.named("POST /depth")
    assert span.status.code == Status.STATUS_CODE_ERROR


def test_without_a_collector_nothing_of_it_is_loaded(toy_repository: Path) -> None:
    program = (
        "import sys; from server.app import create_app; from server.settings import Settings; "
        "app = create_app(Settings.load()); assert app.state.service.tracing is None; "
        "sys.exit(any(name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2]).returncode == 0
