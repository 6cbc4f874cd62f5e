"""What can go wrong, by whose doing.

SaccadeError
├── InvalidInput            the caller's: a bad picture, a bad option (also a ValueError)
│   ├── UnsupportedPicture  a file type we do not read
│   ├── PictureTooLarge     more pixels than allowed
│   ├── UnreadablePicture   truncated or corrupt
│   └── MetresUndetermined  known depths from which no metres follow
├── ModelError              the repository's: a missing file, a malformed card, an output that cannot be
├── BackendUnavailable      the backend's: not there, or draining; may be tried again
│   └── BackendTimeout      it is there, and did not answer in time
├── NotInstalled            a package that this needs is not here; the message says which extra has it
└── ServerError             an answer of a Saccade server that says no (raised by the clients)
    └── later.OtherAnswer   a job's answer in another format than the client reads
"""

from __future__ import annotations


class SaccadeError(Exception):
    """Root of every error raised on purpose."""


class InvalidInput(SaccadeError, ValueError):
    """The caller's input cannot be used; the message says what to do. `param` names the field at fault."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnsupportedPicture(InvalidInput):
    """The bytes are not a picture of a type we read."""


class PictureTooLarge(InvalidInput):
    """The picture has more pixels than the limit."""


class UnreadablePicture(InvalidInput):
    """The picture is truncated or corrupt."""


class MetresUndetermined(InvalidInput):
    """The known depths cannot determine a scale and a shift; the message says why."""


class ModelError(SaccadeError):
    """The model repository, or what a model computed, is not what its card promises."""


class BackendUnavailable(SaccadeError):
    """The backend cannot answer now; `retry_after_s` says when to try again."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class BackendTimeout(BackendUnavailable):
    """The backend did not answer within its deadline."""


class NotInstalled(SaccadeError):
    """What was asked needs a package that is not installed."""


class ServerError(SaccadeError):
    """A Saccade server refused or failed: its HTTP status and its problem+json document."""

    def __init__(self, status: int, problem: dict[str, object]) -> None:
        super().__init__(f"{status} {problem.get('title', '')}: {problem.get('detail', '')}")
        self.status = status
        self.problem = problem
