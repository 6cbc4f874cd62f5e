"""Jobs in a SQLite file. Every method is one transaction; one thread at a time may use a store."""

from __future__ import annotations

import json
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from saccade.errors import SaccadeError
from server.jobs.records import Asked, Record, Result, Status

VERSION = 1
SCHEMA = """
CREATE TABLE jobs (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL UNIQUE,
  owner TEXT NOT NULL,
  task TEXT NOT NULL,
  status TEXT NOT NULL,
  created REAL NOT NULL,
  started REAL,
  finished REAL,
  not_before REAL NOT NULL DEFAULT 0,
  attempts INTEGER NOT NULL DEFAULT 0,
  kept INTEGER NOT NULL DEFAULT 1,
  size INTEGER NOT NULL,
  problem TEXT,
  idempotency_key TEXT,
  fingerprint TEXT NOT NULL,
  query BLOB NOT NULL,
  content_type TEXT NOT NULL,
  accept TEXT NOT NULL,
  request_id TEXT NOT NULL,
  webhook TEXT,
  webhook_status TEXT,
  webhook_tries INTEGER NOT NULL DEFAULT 0,
  webhook_at REAL NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX jobs_by_key ON jobs (owner, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX jobs_by_status ON jobs (status, number);
CREATE INDEX jobs_by_webhook ON jobs (webhook_status, webhook_at) WHERE webhook_status IS NOT NULL;
CREATE TABLE bodies (number INTEGER PRIMARY KEY REFERENCES jobs ON DELETE CASCADE, data BLOB NOT NULL);
CREATE TABLE results (
  number INTEGER PRIMARY KEY REFERENCES jobs ON DELETE CASCADE,
  status INTEGER NOT NULL, headers TEXT NOT NULL, data BLOB NOT NULL
);
"""
FIELDS = (
    "number, id, owner, task, status, created, started, finished, attempts, kept, problem, fingerprint, "
    "webhook, webhook_status, webhook_tries"
)
JOURNAL_BYTES = 2**26
VACUUM_PAGES = 2000


class Full(Exception):
    """The store holds as many jobs, or bytes, as it may."""


class KeyReused(Exception):
    """The idempotency key came before, with another request."""


class Store:
    """`limit` jobs and `max_bytes` of requests and results at most; a result is kept for `keep_s`.

    Whoever has the file open has it alone. Raises SaccadeError if it cannot be had. `clock` is wall-clock time.
    """

    def __init__(
        self, file: Path, *, limit: int, max_bytes: int, keep_s: float, clock: Callable[[], float] = time.time
    ) -> None:
        self.limit, self.max_bytes, self.keep_s, self.clock = limit, max_bytes, keep_s, clock
        self.queued = 0
        try:
            os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
            self._db = sqlite3.connect(file, timeout=1.0, isolation_level=None, check_same_thread=False)
            self._prepare()
        except (OSError, sqlite3.Error) as error:
            raise SaccadeError(f"jobs cannot be kept in {file}: {_reason(error)}") from error
        self._count()

    def close(self) -> None:
        self._db.close()

    def add(self, owner: str, asked: Asked, webhook: str | None, key: str | None) -> tuple[Record, bool]:
        """The new job, or the one that came before with the same key; and whether it is new.

        Raises Full or KeyReused.
        """
        fingerprint = asked.fingerprint()
        with self._transaction():
            if key is not None and (before := self._find("owner = ? AND idempotency_key = ?", owner, key)):
                if before.fingerprint != fingerprint:
                    raise KeyReused
                return before, False
            held, size = self._value("SELECT COUNT(*) FROM jobs WHERE kept"), self._value("SELECT SUM(size) FROM jobs")
            if held >= self.limit or size + len(asked.body) > self.max_bytes:
                raise Full
            identity = secrets.token_hex(16)
            made = self._db.execute(
                "INSERT INTO jobs (id, owner, task, status, created, size, idempotency_key, fingerprint, query, "
                "content_type, accept, request_id, webhook) VALUES (?, ?, ?, 'queued', ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(identity, owner, asked.task, self.clock(), len(asked.body), key, fingerprint, asked.query),
                    *(asked.content_type, asked.accept, asked.request_id, webhook),
                ),
            )
            self._db.execute("INSERT INTO bodies VALUES (?, ?)", (made.lastrowid, asked.body))
        return self._need(identity), True

    def claim(self) -> tuple[Record, Asked] | None:
        """The next job, running from now on: the oldest of the owner with the fewest that run. None where there is
        none, or where results already fill the store."""
        with self._transaction():
            if self._value("SELECT SUM(size) FROM jobs WHERE finished IS NOT NULL") >= self.max_bytes:
                return None
            found = self._db.execute(
                "SELECT number FROM jobs j WHERE status = 'queued' AND not_before <= ? ORDER BY "
                "(SELECT COUNT(*) FROM jobs r WHERE r.status = 'running' AND r.owner = j.owner), number LIMIT 1",
                (self.clock(),),
            ).fetchone()
            if found is None:
                return None
            self._db.execute(
                "UPDATE jobs SET status = 'running', started = ?, attempts = attempts + 1 WHERE number = ?",
                (self.clock(), *found),
            )
            asked = self._db.execute(
                "SELECT task, query, content_type, accept, data, request_id FROM jobs JOIN bodies USING (number) "
                "WHERE number = ?",
                found,
            ).fetchone()
            record = self._find("number = ?", *found)
        return (record, Asked(*asked)) if record is not None else None

    def put_back(self, number: int, wait_s: float, count: bool) -> None:
        """A running job waits again, for `wait_s` at least; `count` keeps the attempt against it."""
        with self._transaction():
            self._db.execute(
                "UPDATE jobs SET status = 'queued', started = NULL, not_before = ?, attempts = attempts - ? "
                "WHERE number = ? AND status = 'running'",
                (self.clock() + wait_s, 0 if count else 1, number),
            )

    def finish(self, number: int, result: Result) -> Record | None:
        """Keep the result, once: None if the job does not run (any more)."""
        failed = result.status >= 400
        with self._transaction():
            changed = self._db.execute(
                "UPDATE jobs SET status = ?, finished = ?, size = ?, problem = ?, "
                "webhook_status = CASE WHEN webhook IS NULL THEN NULL ELSE 'pending' END "
                "WHERE number = ? AND status = 'running'",
                (
                    *("failed" if failed else "done", self.clock(), len(result.body)),
                    *(result.body.decode() if failed else None, number),
                ),
            ).rowcount
            if not changed:
                return None
            self._db.execute("DELETE FROM bodies WHERE number = ?", (number,))
            self._db.execute(
                "INSERT INTO results VALUES (?, ?, ?, ?)",
                (number, result.status, json.dumps(result.headers), result.body),
            )
            return self._find("number = ?", number)

    def cancel(self, identity: str) -> Record | None:
        """The job, cancelled unless it was finished before."""
        with self._transaction():
            changed = self._db.execute(
                "UPDATE jobs SET status = 'cancelled', finished = ?, size = 0 "
                "WHERE id = ? AND status IN ('queued', 'running')",
                (self.clock(), identity),
            ).rowcount
            if changed:
                self._db.execute(
                    "DELETE FROM bodies WHERE number = (SELECT number FROM jobs WHERE id = ?)", (identity,)
                )
            return self._find("id = ?", identity)

    def forget(self, identity: str) -> None:
        with self._transaction():
            self._db.execute("DELETE FROM jobs WHERE id = ?", (identity,))

    def get(self, identity: str) -> Record | None:
        return self._find("id = ?", identity)

    def result(self, identity: str, whole: bool = True) -> Result | None:
        """Its body is left out unless the `whole` is wanted."""
        row = self._db.execute(
            "SELECT r.status, headers, CASE WHEN ? THEN data ELSE x'' END "
            "FROM results r JOIN jobs USING (number) WHERE id = ?",
            (whole, identity),
        ).fetchone()
        return None if row is None else Result(row[0], json.loads(row[1]), row[2])

    def page(self, owner: str, count: int, before: int | None) -> list[Record]:
        """The owner's jobs, newest first, those that came before number `before`."""
        rows = self._db.execute(
            f"SELECT {FIELDS} FROM jobs WHERE owner = ? AND number < ? ORDER BY number DESC LIMIT ?",
            (owner, 2**62 if before is None else before, count),
        )
        return [Record(*row) for row in rows]

    def interrupted(self, most: int) -> list[Record]:
        """After a restart: what ran waits again, but for the given, which were begun `most` times."""
        with self._transaction():
            rows = self._db.execute(f"SELECT {FIELDS} FROM jobs WHERE status = 'running' AND attempts >= ?", (most,))
            given_up = [Record(*row) for row in rows]
            self._db.execute(
                "UPDATE jobs SET status = 'queued', started = NULL WHERE status = 'running' AND attempts < ?", (most,)
            )
        return given_up

    def expire(self) -> None:
        """Drop results older than `keep_s`, and after as long again every trace of them."""
        now = self.clock()
        with self._transaction():
            old = "finished IS NOT NULL AND kept AND finished < ?"
            self._db.execute(
                f"DELETE FROM results WHERE number IN (SELECT number FROM jobs WHERE {old})", (now - self.keep_s,)
            )
            self._db.execute(f"UPDATE jobs SET kept = 0, size = 0 WHERE {old}", (now - self.keep_s,))
            self._db.execute("DELETE FROM jobs WHERE NOT kept AND finished < ?", (now - 2 * self.keep_s,))
            self._db.execute(
                "DELETE FROM jobs WHERE number IN "
                "(SELECT number FROM jobs WHERE NOT kept ORDER BY number DESC LIMIT -1 OFFSET ?)",
                (self.limit,),
            )
        # As a script: `execute` steps once, which frees a single page, and there are no rows to fetch the others by.
        self._db.executescript(f"PRAGMA incremental_vacuum({VACUUM_PAGES})")

    def webhooks(self, count: int) -> list[Record]:
        """Those that are due."""
        rows = self._db.execute(
            f"SELECT {FIELDS} FROM jobs WHERE webhook_status = 'pending' AND webhook_at <= ? "
            "ORDER BY webhook_at LIMIT ?",
            (self.clock(), count),
        )
        return [Record(*row) for row in rows]

    def next_webhook_s(self) -> float | None:
        """Seconds until one is due; None where none waits."""
        row = self._db.execute("SELECT MIN(webhook_at) FROM jobs WHERE webhook_status = 'pending'").fetchone()
        return None if row[0] is None else max(0.0, row[0] - self.clock())

    def told(self, number: int, delivered: bool, again_s: float | None) -> None:
        """One try of the webhook has ended; `again_s` None: it was the last."""
        status = "delivered" if delivered else "failed" if again_s is None else "pending"
        with self._transaction():
            self._db.execute(
                "UPDATE jobs SET webhook_status = ?, webhook_tries = webhook_tries + 1, webhook_at = ? "
                "WHERE number = ?",
                (status, self.clock() + (again_s or 0.0), number),
            )

    def _prepare(self) -> None:
        for pragma in (
            "locking_mode = EXCLUSIVE",
            "auto_vacuum = INCREMENTAL",
            "journal_mode = WAL",
            f"journal_size_limit = {JOURNAL_BYTES}",
            "synchronous = FULL",
            "foreign_keys = ON",
        ):
            self._db.execute(f"PRAGMA {pragma}")
        with self._transaction():
            version = self._value("PRAGMA user_version")
            if version == 0:
                for statement in SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {VERSION}")
            elif version != VERSION:
                raise sqlite3.DatabaseError(f"it is of version {version}, and this server reads version {VERSION}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")
        self._count()

    def _count(self) -> None:
        queued: Status = "queued"
        self.queued = self._db.execute("SELECT COUNT(*) FROM jobs WHERE status = ?", (queued,)).fetchone()[0]

    def _value(self, query: str) -> int:
        return int(self._db.execute(query).fetchone()[0] or 0)

    def _find(self, where: str, *values: object) -> Record | None:
        row = self._db.execute(f"SELECT {FIELDS} FROM jobs WHERE {where}", values).fetchone()
        return None if row is None else Record(*row)

    def _need(self, identity: str) -> Record:
        found = self._find("id = ?", identity)
        assert found is not None  # it has just been written, and nobody else writes
        return found


def _reason(error: Exception) -> str:
    if "locked" in str(error):
        return "another server has it open; give each its own jobs_file"
    return getattr(error, "strerror", None) or str(error)
