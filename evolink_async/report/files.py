"""The names of what a run leaves in its folder. Pure."""

from __future__ import annotations

RESULTS = "results.jsonl"
ERRORS = "errors.jsonl"
LEDGER = "job.db"
PROGRESS = "progress.jsonl"
REPORT = "report.html"
