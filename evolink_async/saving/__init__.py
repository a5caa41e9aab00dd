"""Links into files and files into links: `client.save` and `client.files`."""

from __future__ import annotations

from evolink_async.saving.files import FileQuota, Files, UploadedFile
from evolink_async.saving.results import save_results

__all__ = ["FileQuota", "Files", "UploadedFile", "save_results"]
