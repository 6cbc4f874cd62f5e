"""Memory that runs out: refused in time, by a real process under a real limit; and where limits are read from."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image

from server.guard import Guard, Reading, sources
from server.problems import Problem
from tests.server.house import Clock, files
from tests.server.process import PROGRAM, serving, started
from tests.server.test_refusals import assert_problem

MIB = 2**20
TIGHT = f"""
import re, resource
from pathlib import Path
from server.service import Service

begin = Service.begin

async def begin_and_be_limited(self):
    await begin(self)
    Service.begin = begin
    used = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    most = int((used + {700 * MIB}) / self.guard.share)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))

Service.begin = begin_and_be_limited
{PROGRAM}
"""
"""A server that the kernel refuses memory to, once 700 MiB more than it began with are taken and a tenth of all."""


def flat(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (90, 120, 30)).save(out, "PNG")
    return out.getvalue()


def test_a_process_under_a_limit_refuses_and_lives(toy_repository: Path) -> None:
    large = files("depth", image=flat(2800, 2000))
    with serving(toy_repository, program=TIGHT) as server, ThreadPoolExecutor(8) as pool:
        url = server.url + "/depth?format=npy"
        many = [pool.submit(httpx.post, url, files=large, timeout=120) for _ in range(8)]
        answers = [answer.result() for answer in many]
        assert {answer.status_code for answer in answers} == {200, 503}
        for answer in answers:
            if answer.status_code == 503:
                assert_problem(answer, 503, "low-memory")
                assert int(answer.headers["retry-after"]) >= 1
        assert server.counters()["saccade_memory_refused_total"] >= 1
        too_much = httpx.post(
            url, files=files("depth", image=flat(5000, 4000)), params={"ensemble_size": 20}, timeout=60
        )
        assert too_much.status_code in (413, 503)
        server.until(server.ready)
        server.until(lambda: httpx.post(url, files=large, timeout=60).status_code == 200)
        assert server.counters()["saccade_memory_promised_bytes"] == 0
        log = server.log.read_text()
        assert "address space uses" in log
        assert "MemoryError" not in log


def test_a_server_without_room_says_so(toy_repository: Path) -> None:
    with started(toy_repository, memory_limit_bytes=16 * MIB) as server:
        refused = httpx.get(server.url + "/readyz")
        assert "memory" in assert_problem(refused, 503, "unavailable")["detail"]
        assert_problem(httpx.post(server.url + "/depth", files=files("depth")), 503, "low-memory")


class Memory:
    """A limit of 100 bytes."""

    used = 0

    def __call__(self) -> Reading:
        return Reading("test", self.used, 100)


def test_promises_count_until_they_are_given_back() -> None:
    memory, clock = Memory(), Clock()
    guard = Guard([memory, lambda: Reading("wide", 0, 1000), lambda: None], 0.9, clock)
    with guard.hold(60):
        assert guard.room == 30
        with pytest.raises(Problem, match="memory") as refused, guard.hold(31):
            pass
        assert (refused.value.kind.status, refused.value.retry_after_s) == (503, 5)
        with guard.hold(30):
            assert guard.room == 0
    assert guard.room == 90
    with pytest.raises(Problem) as never, guard.hold(91):
        pass
    assert never.value.kind.status == 413
    memory.used, clock.now = 95, 1.0
    assert guard.exhausted
    with pytest.raises(Problem):
        guard.check()


def written(root: Path, **content: str) -> Path:
    for name, text in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = {
    "proc/self/cgroup": "0::/pods/one\n",
    "sys/fs/cgroup/pods/one/memory.max": "max\n",
    "sys/fs/cgroup/pods/one/memory.current": "700\n",
    "sys/fs/cgroup/pods/memory.max": "1000\n",
    "sys/fs/cgroup/pods/memory.current": "800\n",
    "sys/fs/cgroup/pods/memory.stat": "anon 500\ninactive_file 300\n",
}
V2_CONTAINER = {
    "proc/self/cgroup": "0::/the/hosts/path\n",
    "sys/fs/cgroup/memory.max": "1000\n",
    "sys/fs/cgroup/memory.current": "500\n",
}
V1 = {
    "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "600\n",
    "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 100\n",
}
UNLIMITED = {
    "proc/self/cgroup": "4:memory:/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "600\n",
    "proc/meminfo": "MemTotal:       4 kB\nMemAvailable:       3 kB\n",
}
OWN = {"proc/self/status": "VmSize:\t  9 kB\nVmRSS:\t  2 kB\n"}


@pytest.mark.parametrize(
    ("system", "own", "nearest"),
    [
        (V2, None, Reading("control group", 500, 1000)),
        (V2_CONTAINER, None, Reading("control group", 500, 1000)),
        (V1, None, Reading("control group", 500, 1000)),
        (UNLIMITED, None, Reading("machine", 1024, 4096)),
        (OWN, 3000, Reading("memory_limit_bytes", 2048, 3000)),
    ],
    ids=["v2", "v2-in-a-container", "v1", "no-limit", "own"],
)
def test_the_nearest_limit_counts(tmp_path: Path, system: dict[str, str], own: int | None, nearest: Reading) -> None:
    assert Guard(sources(own, written(tmp_path, **system))).nearest == nearest
