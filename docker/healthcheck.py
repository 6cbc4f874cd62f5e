"""Exit with 0 if this container's server is ready, else with 1 and one line that says why.

Usage: healthcheck.py [URL]    by default the gateway's own /readyz, on the port it was told to listen on
"""

import http.client
import os
import sys
import urllib.parse

TIMEOUT_S = 12  # a readiness probe that hangs answers after 10 s; HEALTHCHECK allows 15


def fault(url: str) -> str | None:
    """What is wrong with the server, or None."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", parts.path)
        answer = connection.getresponse()
        told = answer.read(500).decode("utf-8", "replace")
        return None if answer.status == 200 else f"{answer.status} {told}".strip()
    except (OSError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        connection.close()


if __name__ == "__main__":
    default = f"http://127.0.0.1:{os.environ.get('SACCADE_PORT') or 8080}/readyz"
    sys.exit(fault(sys.argv[1] if len(sys.argv) > 1 else default))
