"""The local files of a pool's requests: looked at first, uploaded before the POST, released at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from evolink_async.errors import EvoLinkError
from evolink_async.http.submit import Submission
from evolink_async.pool.outcome import UNFINISHED, UNKNOWN, OutcomeStatus
from evolink_async.pool.record import Record
from evolink_async.requests import media_links
from evolink_async.saving.attachments import Attachment, Attachments, attachments_of

if TYPE_CHECKING:
    from evolink_async.core import ClientCore
    from evolink_async.session import Session

Told = Callable[[Record, EvoLinkError | None], None]


class Uploads:
    """Knows which records have local files.

    looked_at: called when it is known what they hold; uploaded: when they are at the service. Both with the error that
    stands against it, and neither once they are released.
    """

    def __init__(self, core: ClientCore, looked_at: Told, uploaded: Told) -> None:
        self._core = core
        self._looked_at = looked_at
        self._uploaded = uploaded
        self._attachments: Attachments
        self._of: dict[Record, Attachment] = {}

    def look(self, record: Record, session: Session) -> None:
        """Look at its files."""
        assert record.request is not None
        self._attachments = attachments_of(self._core, session)
        self._of[record] = self._attachments.look(record.request, lambda error: self._looked_at(record, error))

    def names(self, record: Record) -> dict[str, str]:
        """What counts as the files in the identity of its request, and as links to earlier uploads, by their places."""
        assert record.request is not None
        names = self._of[record].names() if record in self._of else {}
        if links := self._core.memory.uploads:
            names |= {place: links[link] for place, link in media_links(record.request).items() if link in links}
        return names

    def are_due(self, record: Record) -> bool:
        """Whether its files have to be uploaded before it can be sent."""
        return record in self._of and record.submission is not None and not record.submission.content

    def upload(self, record: Record) -> None:
        """Bring its files to the service."""
        patience = self._core.options.retry.unreachable_for
        self._attachments.attach(self._of[record], lambda error: self._uploaded(record, error), patience)

    def content(self, record: Record, submission: Submission) -> bytes:
        """The body of its POST, with the links."""
        return self._of[record].encoded(submission.callback_url)

    def release(self, record: Record, *, keep: bool = False) -> None:
        """They are not needed at the service, any more or yet. keep: a task whose end we don't see may need them."""
        attachment = self._of.get(record)
        if attachment is not None:
            self._attachments.release(attachment, keep=keep)

    def forget(self, record: Record, status: OutcomeStatus) -> None:
        """The same, for good: it has its outcome."""
        if record in self._of:
            self.release(record, keep=status in (UNKNOWN, UNFINISHED))
            del self._of[record]
