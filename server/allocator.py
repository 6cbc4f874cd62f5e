"""Memory that stays with the process between requests.

A request takes and gives back maps of some megabytes. glibc returns such to the system each time, and every page of the
next ones is faulted in anew: that made merging members take up to twice as long, from one run of the server to the next
(flow 3.3 or 8.2 ms, amodal 7.1 or 10.4). So what is free is kept, up to a bound; the memory guard gives it back when
memory runs short.
"""

from __future__ import annotations

import ctypes
import os

# malloc.h: M_ARENA_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD. 32 MB is the most that the last one may be. The
# first arena keeps up to 128 MB at its end, each of the three others one heap, which is 64 MB at most.
OPTIONS = {-8: 4, -1: 128 * 2**20, -2: 8 * 2**20, -3: 32 * 2**20}
CHOSEN_BY_OPERATOR = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


def settle() -> str:
    """Set the C library's allocator up for this process, once, before it is used much; what was done, in words."""
    if chosen := next((name for name in os.environ if name.startswith(CHOSEN_BY_OPERATOR)), None):
        return f"as {chosen} has it"
    try:
        done = [ctypes.CDLL(None).mallopt(option, size) for option, size in OPTIONS.items()]
    except (OSError, AttributeError):  # glibc has it, others do without
        return "as the system has it"
    return "up to 320 MB that are free are kept" if all(done) else "as the system has it"
