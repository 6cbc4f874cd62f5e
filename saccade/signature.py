"""The signature under a webhook: `Saccade-Signature: t=<seconds since 1970>,v1=<hex of HMAC-SHA256(secret, "t.body")>`.

if not signature.verify(body, request.headers["Saccade-Signature"], secret):
    ...  # not from the server that knows the secret, or too old: refuse it
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time

HEADER = "Saccade-Signature"
_FORM = re.compile(r"t=([0-9]{1,12}),v1=([0-9a-f]{64})")


def sign(body: bytes, secret: str, seconds: int) -> str:
    """The header's value for `body` sent at `seconds` since 1970."""
    return f"t={seconds},v1={_digest(body, secret, seconds)}"


def verify(body: bytes, header: str, secret: str, *, tolerance_s: float = 300.0, now: float | None = None) -> bool:
    """Whether `body`, as it came byte for byte, was signed with the secret within the last `tolerance_s`."""
    found = _FORM.fullmatch(header)
    if found is None:
        return False
    seconds = int(found[1])
    fresh = abs((time.time() if now is None else now) - seconds) <= tolerance_s
    return hmac.compare_digest(_digest(body, secret, seconds), found[2]) and fresh


def _digest(body: bytes, secret: str, seconds: int) -> str:
    return hmac.new(secret.encode(), f"{seconds}.".encode() + body, hashlib.sha256).hexdigest()
