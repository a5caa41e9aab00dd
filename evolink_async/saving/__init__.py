"""Links into files and files into links: `client.save`, a pool's `Saver`, and `client.files`."""

from __future__ import annotations

from evolink_async.saving.files import FileQuota, Files
from evolink_async.saving.objects import ObjectPath
from evolink_async.saving.results import save_results
from evolink_async.saving.saver import SavedPath, Saver

__all__ = ["FileQuota", "Files", "ObjectPath", "SavedPath", "Saver", "save_results"]
