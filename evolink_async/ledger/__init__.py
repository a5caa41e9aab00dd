"""The durable record of a job's requests: what was intended, what was accepted, how it ended, what it has cost."""

from evolink_async.ledger.candidates import candidates
from evolink_async.ledger.job import Census, JobLedger
from evolink_async.ledger.opening import Ledger, LedgerJob, checked_job, open_job, open_ledger
from evolink_async.ledger.rerun import Entered, Todo, may_try_again, what_to_do
from evolink_async.ledger.states import State
from evolink_async.ledger.values import Entry, PastTry, Refusal, Row

__all__ = [
    "Census",
    "Entered",
    "Entry",
    "JobLedger",
    "Ledger",
    "LedgerJob",
    "PastTry",
    "Refusal",
    "Row",
    "State",
    "Todo",
    "candidates",
    "checked_job",
    "may_try_again",
    "open_job",
    "open_ledger",
    "what_to_do",
]
