"""Promote a model if its evaluation is no worse than that of the model that serves.

    saccade evaluate PICTURES --model saccade-s   --out reports/current
    saccade evaluate PICTURES --model saccade-s-2 --out reports/candidate
    python -m training.promote reports/current reports/candidate --config-map saccade-model

Every mean of every task, set and metric counts: a candidate that gains in one and loses in another is not promoted.
With --config-map, inside a Kubernetes pod, the key `model` of that ConfigMap is moved from the one model to the other
and the key `previous` keeps the way back; nothing is changed if it names a third model by now. Without it, the verdict
is only printed. The exit status is 0 for either verdict, 2 where the reports cannot be compared, 1 where the ConfigMap
cannot be changed.
"""

from __future__ import annotations

import argparse
import math
import os
import ssl
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import httpx
from pydantic import BaseModel, Field, ValidationError

from saccade.errors import InvalidInput, SaccadeError
from saccade.repository import check_name
from saccade.tasks import TaskName
from training.report import LABELS, MORE_IS_BETTER

REPORT = "report.json"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIMEOUT_S = 30.0
Finite = Annotated[float, Field(allow_inf_nan=False)]
Place = tuple[TaskName, str, str]
"""(task, set of pictures, metric): what a mean is of."""


class Mean(BaseModel):
    task: TaskName
    group: str
    metric: str
    value: Finite

    @property
    def place(self) -> Place:
        return self.task, self.group, self.metric


class Picture(BaseModel):
    task: TaskName
    name: str


class Evaluation(BaseModel):
    """What of a report.json decides."""

    data: str
    model: str
    means: tuple[Mean, ...] = Field(min_length=1)
    pictures: tuple[Picture, ...]

    @classmethod
    def read(cls, folder: Path) -> Evaluation:
        """Raises InvalidInput where there is no report, or one that `saccade evaluate` cannot have written."""
        file = folder / REPORT
        try:
            read = cls.model_validate_json(file.read_bytes())
        except OSError as error:
            raise InvalidInput(f"{file} cannot be read: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            raise InvalidInput(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        strange = {mean.metric for mean in read.means} - LABELS.keys()
        if strange:
            raise InvalidInput(f"{file}: it is not known whether more is better of {', '.join(sorted(strange))}")
        check_name(read.model)
        return read

    @property
    def values(self) -> dict[Place, float]:
        return {mean.place: mean.value for mean in self.means}

    @property
    def asked(self) -> set[tuple[TaskName, str]]:
        return {(picture.task, picture.name) for picture in self.pictures}


@dataclass(frozen=True)
class Comparison:
    """One mean of both models. `loss`: by which share of the current value the candidate is worse; negative: better."""

    place: Place
    current: float
    candidate: float

    @property
    def loss(self) -> float:
        gain = self.candidate - self.current if self.place[2] in MORE_IS_BETTER else self.current - self.candidate
        if gain == 0:
            return 0.0
        return -gain / abs(self.current) if self.current else math.copysign(math.inf, -gain)

    def __str__(self) -> str:
        task, group, metric = self.place
        return f"{task}, {group}, {LABELS[metric]}: {self.current:.4f} -> {self.candidate:.4f}"


@dataclass(frozen=True)
class Verdict:
    """Whether `candidate` may serve in place of `current`; `worse` says where it is worse by more than allowed."""

    current: str
    candidate: str
    comparisons: tuple[Comparison, ...]
    worse: tuple[Comparison, ...]

    @property
    def promote(self) -> bool:
        return not self.worse

    def __str__(self) -> str:
        rows = [f"{'worse ' if row in self.worse else '      '}{row}" for row in self.comparisons]
        told = "is no worse than" if self.promote else f"is worse in {len(self.worse)} of {len(rows)} means than"
        return "\n".join([*rows, f"{self.candidate} {told} {self.current}"])


def compare(current: Evaluation, candidate: Evaluation, tolerance: float = 0.0) -> Verdict:
    """`tolerance`: the share of a current mean by which the candidate's may be worse.

    Raises InvalidInput where the two are not of the same pictures, or not of two models.
    """
    if current.model == candidate.model:
        raise InvalidInput(f"both reports are of {current.model}: nothing to compare")
    if current.asked != candidate.asked or current.values.keys() != candidate.values.keys():
        raise InvalidInput("the reports are of different pictures, tasks or metrics: they cannot be compared")
    theirs = candidate.values
    rows = tuple(Comparison(place, value, theirs[place]) for place, value in current.values.items())
    return Verdict(current.model, candidate.model, rows, tuple(row for row in rows if row.loss > tolerance))


@dataclass(frozen=True)
class ConfigMap:
    """A ConfigMap of this pod's namespace, through the token that the pod was given to change it."""

    name: str
    client: httpx.Client
    namespace: str

    @classmethod
    def here(cls, name: str, account: Path | None = None) -> ConfigMap:
        """Raises SaccadeError outside a pod, or in a pod without a token."""
        account = account or ACCOUNT
        try:
            host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
            namespace, token = ((account / part).read_text().strip() for part in ("namespace", "token"))
            trust = ssl.create_default_context(cafile=account / "ca.crt")
        except (KeyError, OSError) as error:
            raise SaccadeError(f"no access to the Kubernetes API from here: {error}") from error
        url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
        headers = {"Authorization": f"Bearer {token}"}
        client = httpx.Client(base_url=url, headers=headers, verify=trust, timeout=TIMEOUT_S, trust_env=False)
        return cls(name, client, namespace)

    def move(self, current: str, candidate: str) -> None:
        """Change the key `model` from `current` to `candidate`, or nothing. Raises SaccadeError."""
        patch = [
            {"op": "test", "path": "/data/model", "value": current},
            {"op": "add", "path": "/data/previous", "value": current},
            {"op": "replace", "path": "/data/model", "value": candidate},
        ]
        try:
            answer = self.client.patch(
                f"/api/v1/namespaces/{self.namespace}/configmaps/{self.name}",
                json=patch,
                headers={"Content-Type": "application/json-patch+json"},
            )
        except httpx.HTTPError as error:
            raise SaccadeError(f"the Kubernetes API does not answer: {error}") from error
        if answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY:
            raise SaccadeError(f"ConfigMap {self.name} does not name {current} any more: somebody else has moved it")
        if not answer.is_success:
            raise SaccadeError(f"ConfigMap {self.name} cannot be changed: {_reason(answer)}")


def _reason(answer: httpx.Response) -> str:
    """The message of a Kubernetes Status, or the status code."""
    try:
        return str(answer.json()["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status_code}"


def main(argv: Sequence[str] | None = None) -> None:
    args = _arguments().parse_args(argv)
    verdict = compare(Evaluation.read(args.current), Evaluation.read(args.candidate), args.tolerance)
    sys.stdout.write(f"{verdict}\n")
    if not verdict.promote or args.config_map is None:
        return
    ConfigMap.here(args.config_map).move(verdict.current, verdict.candidate)
    sys.stdout.write(f"{args.config_map} names {verdict.candidate}; the way back is {verdict.current}\n")


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.promote", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("current", type=Path, help="folder of the report of the model that serves")
    parser.add_argument("candidate", type=Path, help="folder of the report of the model that may replace it")
    parser.add_argument("--config-map", metavar="NAME", help="move this ConfigMap of the pod's namespace")
    parser.add_argument(
        "--tolerance", type=_share, default=0.0, help="share by which a mean may be worse; 0.01 is 1%% (default: 0)"
    )
    return parser


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"not a share from 0 to 1: {text}")
    return share


def run() -> None:
    """The command: errors become one line and an exit status."""
    try:
        main()
    except SaccadeError as error:
        sys.stderr.write(f"promote: {error}\n")
        raise SystemExit(2 if isinstance(error, InvalidInput) else 1) from error


if __name__ == "__main__":
    run()
