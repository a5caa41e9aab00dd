"""Many requests, each result as it completes."""

from evolink_async.pool.outcome import Outcome, OutcomeStatus, PoolStats
from evolink_async.pool.pool import TaskPool, run_many

__all__ = ["Outcome", "OutcomeStatus", "PoolStats", "TaskPool", "run_many"]
