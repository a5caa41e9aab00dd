"""How a task ended, or that it did not: the task or the error that stands for it. Pure."""

from __future__ import annotations

from evolink_async.errors import TaskCancelledError, TaskError, TaskFailedError, TaskTimeoutError
from evolink_async.types import Task, TaskFailure, TaskStatus


def has_result(task: Task) -> bool:
    """Whether a completed task has anything to show."""
    return bool(task.results or task.result_data)


def is_over(task: Task) -> bool:
    """Whether there is nothing left to wait for."""
    return task.is_terminal and (has_result(task) or not task.succeeded)


def conclude(task: Task) -> Task:
    """The completed task. Raises `TaskFailedError` or `TaskCancelledError` for one that ended otherwise."""
    error = failure_of(task)
    if error is not None:
        raise error
    return task


def failure_of(task: Task) -> TaskError | None:
    """The error that a terminal task stands for, None if it completed."""
    if task.succeeded:
        return None
    failure = task.error or TaskFailure()
    message = failure.message or "the service gave no reason"
    if task.status == TaskStatus.CANCELLED:
        return TaskCancelledError(f"the task was cancelled: {message}", task=task)
    return TaskFailedError(message, task=task, code=failure.code)


def still_running(task: Task, timeout: float | None, why: str | None = None) -> TaskTimeoutError:
    """The error of a wait that ended before its task. why: what the last look failed with, if it did."""
    after = "" if timeout is None else f" after {timeout:g} s"
    failed = "" if why is None else f" (the last look at it failed: {why})"
    message = (
        f"still {task.status}{after}{failed}; it goes on and is paid for: wait again with "
        f"client.tasks.wait({task.id!r})"
    )
    return TaskTimeoutError(message, task=task)


def never_seen(task: Task, timeout: float | None, why: str | None = None) -> TaskTimeoutError:
    """The error of a wait for an id of which no look told anything, so that nobody can say that it runs."""
    told = "the service told nothing of it" if why is None else "no look at it told anything"
    reason = "so it may not know the id" if why is None else f"the last one failed: {why}"
    within = "" if timeout is None else f" in {timeout:g} s"
    message = f"{told}{within}, {reason}; if the id is right, wait again with client.tasks.wait({task.id!r})"
    return TaskTimeoutError(message, task=task)
