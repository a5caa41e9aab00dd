"""What is set before the command."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evolink_async import AsyncEvoLink


@dataclass(frozen=True, slots=True)
class Settings:
    """The options before the command."""

    base_url: str | None = None
    verbose: bool = False

    @property
    def is_local(self) -> bool:
        """Whether the service is on this machine: plain http is allowed for no other."""
        return (self.base_url or os.environ.get("EVOLINK_BASE_URL") or "").startswith("http:")

    def client(self, rate: str | None = None) -> AsyncEvoLink:
        """A client. Raises `ConfigurationError`."""
        from evolink_async import AsyncEvoLink

        return AsyncEvoLink(base_url=self.base_url, rate_limit=rate)
