"""Many requests, each result as it completes."""

from evolink_async.pool.many import run_many
from evolink_async.pool.outcome import Outcome, OutcomeStatus, PoolStats
from evolink_async.pool.pool import TaskPool

__all__ = ["Outcome", "OutcomeStatus", "PoolStats", "TaskPool", "run_many"]
