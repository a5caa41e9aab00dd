"""The tables of a ledger, by version. In the words of SQLite; `postgres` translates the few that differ.

Times are microseconds since 1970 UTC, amounts are micro-credits.
"""

from __future__ import annotations

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    # Version 1.
    (
        """CREATE TABLE job (
            id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, created_at INTEGER NOT NULL,
            runs INTEGER NOT NULL DEFAULT 0, requests INTEGER NOT NULL DEFAULT 0,
            reserved INTEGER NOT NULL DEFAULT 0, spent INTEGER NOT NULL DEFAULT 0,
            probe INTEGER, probe_price TEXT,
            replays INTEGER NOT NULL DEFAULT 0, keys_honoured INTEGER NOT NULL DEFAULT 0)""",
        """CREATE TABLE request (
            id INTEGER PRIMARY KEY, job INTEGER NOT NULL, identity TEXT NOT NULL, keyed INTEGER NOT NULL,
            content BLOB NOT NULL, endpoint TEXT NOT NULL, model TEXT NOT NULL, state TEXT NOT NULL,
            seen INTEGER NOT NULL, number INTEGER NOT NULL, attempts INTEGER NOT NULL, losses INTEGER NOT NULL,
            replayed INTEGER NOT NULL, idempotency_key TEXT, fingerprint TEXT, task_id TEXT,
            reserved INTEGER, spent INTEGER, submitted_at INTEGER, ended_at INTEGER,
            error_code TEXT, error TEXT, past INTEGER NOT NULL,
            UNIQUE (job, identity))""",
        "CREATE TABLE body (request INTEGER PRIMARY KEY, body BLOB NOT NULL)",
        "CREATE TABLE result (request INTEGER PRIMARY KEY, task TEXT, files TEXT NOT NULL)",
        """CREATE TABLE past_try (
            id INTEGER PRIMARY KEY, request INTEGER NOT NULL, number INTEGER NOT NULL, state TEXT NOT NULL,
            replayed INTEGER NOT NULL, task_id TEXT, idempotency_key TEXT, reserved INTEGER, spent INTEGER,
            submitted_at INTEGER, ended_at INTEGER, error_code TEXT, error TEXT)""",
        "CREATE INDEX past_try_of ON past_try (request)",
        """CREATE TABLE price (
            job INTEGER NOT NULL, class TEXT NOT NULL, credits INTEGER NOT NULL,
            PRIMARY KEY (job, class)) WITHOUT ROWID""",
    ),
    # Version 2. A table of its own: a job's row is rewritten with every turn, and this is long.
    ("CREATE TABLE learned (job INTEGER PRIMARY KEY, value TEXT NOT NULL)",),
    # Version 3. `credits` is the last that the service has reserved for a request of the class; `used` is the most that
    # one has used where that was more, or nothing was reserved.
    ("ALTER TABLE price ADD COLUMN used INTEGER",),
)
VERSION = len(MIGRATIONS)
