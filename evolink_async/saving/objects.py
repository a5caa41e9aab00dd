"""Results in object stores: s3://, gs:// and az://, through obstore (the `storage` extra).

A file is fetched and checked in the system's temporary folder first, then uploaded in one step that shows the object
whole or not at all, and only where there is none of that name. An object carries its mark in its metadata.

Everything here blocks. obstore's own asyncio functions are not used: its threads still hand results to the
interpreter when that is shutting down, which aborted 17 of 40 short programs with Python 3.11 (obstore 0.12.1).
"""

from __future__ import annotations

import re
import tempfile
from contextlib import closing
from datetime import timedelta
from pathlib import Path, PurePath, PurePosixPath
from typing import Any
from urllib.parse import quote

from evolink_async.errors import ConfigurationError, DownloadError
from evolink_async.saving.content import content_type_of
from evolink_async.saving.folder import Folder, PartFile, hash_of

SCHEMES = "s3", "gs", "az"
AT_ONCE = 8 * 2**20
"""Bytes up to which an object is put in one request, which can be told to replace nothing. Above, it takes parts."""

_RESULT = "evolink-result"
_RETRY: Any = {"max_retries": 5, "retry_timeout": timedelta(seconds=60)}
_LIKELY = {"image": ("png", "jpg", "webp"), "video": ("mp4",), "audio": ("mp3", "wav")}
_ADDRESS = re.compile(r"(?P<scheme>[a-z0-9]+)://(?P<bucket>[^/?#\s]+)(?P<prefix>(?:/[^?#\0]*)?)")
_AS_A_PATH = re.compile(rf"({'|'.join(SCHEMES)}):/{{1,2}}(?=[^/])")


class ObjectPath(PurePosixPath):
    """The place of an object, like s3://bucket/prefix/name.png: `str()` gives that, `.name` the last part of it."""

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)


def is_object_store(directory: object) -> bool:
    """Whether this is the address of an object store, or of anything else that is no folder."""
    return isinstance(directory, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", directory) is not None


def as_written(directory: Any) -> Any:
    """The address that was made a path, `Path("s3://bucket")`, its text, or the parent of a result; else as it is.

    A `Path` keeps one of the two slashes, and would be a folder of that name.
    """
    text = directory.as_posix() if isinstance(directory, PurePath) else directory
    found = _AS_A_PATH.match(text) if isinstance(text, str) else None
    return directory if found is None else f"{found[1]}://{found.string[found.end() :]}"


def path_of(text: str) -> Path | ObjectPath:
    """The path that was written as this text."""
    return ObjectPath(text) if is_object_store(text) else Path(text)


class Bucket:
    """A prefix in an object store that results are saved under.

    Credentials and endpoints come from the environment, as obstore reads it (AWS_..., GOOGLE_..., AZURE_...).
    Raises `ConfigurationError` for an address that is none, and if the extra is missing.
    """

    def __init__(self, address: str) -> None:
        match = _ADDRESS.fullmatch(address)
        if match is None or match["scheme"] not in SCHEMES or ".." in match["prefix"].split("/"):
            known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
            raise ConfigurationError(f"results go into folders and to {known} bucket/prefix, not to {address[:80]!r}")
        try:
            import obstore
            from obstore import exceptions, store
        except ImportError:
            raise ConfigurationError(
                "saving to an object store needs the storage extra: pip install 'evolink-async[storage]'"
            ) from None
        self._obstore: Any = obstore
        self._exceptions: Any = exceptions
        self._root = ObjectPath(address)
        self._folder = Folder(Path(tempfile.gettempdir()))
        self.part_folder = self._folder.part_folder
        self.lingers = True
        try:
            # As a URL a prefix would be decoded: "50%25" names another place than our paths tell.
            url = f"{match['scheme']}://{match['bucket']}{quote(match['prefix'].rstrip('/'))}"
            self._store: Any = store.from_url(url, retry_config=_RETRY)
        except Exception as error:  # noqa: BLE001  (obstore's errors have no other common root; nothing is awaited)
            raise ConfigurationError(f"{address!r} cannot be used: {_first_line(error)}") from None

    def __str__(self) -> str:
        return repr(str(self._root))

    def prepare(self) -> None:
        """Look whether it is there. Raises `OSError` if nothing can be saved."""
        self._folder.prepare()
        try:
            next(iter(self._obstore.list(self._store, chunk_size=1)), None)
        except self._exceptions.PermissionDeniedError:
            pass  # may write, may not list
        except Exception as error:  # noqa: BLE001  (as above)
            raise OSError(f"{_first_line(error)}; credentials and endpoint come from the environment") from None

    def case_matters(self) -> bool:
        """It does in all of them."""
        self._folder.case_matters()  # removes what killed processes have left in the temporary folder
        return True

    def find(self, stem: str, result: str | None, *, by_name: bool, kind: str | None = None) -> ObjectPath | None:
        """The object `stem`.* that holds this result. Looked for under the extensions that the kind makes likely."""
        for ending in _LIKELY.get(kind or "", ()):
            mark = self._mark(f"{stem}.{ending}")
            if mark is not None and (mark == result or (by_name and not mark)):
                return self._root / f"{stem}.{ending}"
        return None

    def kept(self, file: PurePath, result: str) -> ObjectPath | None:
        """This object, which an earlier run has saved, if it is there. Objects are whole or not there."""
        inside = PurePosixPath(file).parts[len(self._root.parts) :]
        if PurePosixPath(file).parts[: len(self._root.parts)] != self._root.parts or not inside:
            return None
        return ObjectPath(file) if self._mark("/".join(inside)) in ("", result) else None

    def publish(self, part: PartFile, name: str, result: str | None) -> ObjectPath:
        """Upload the file under its name: its path. An object of that name and the same content is kept as it is.

        Raises `DownloadError` if another object has the name; that one isn't touched.
        """
        place = self._root / name
        part.flush()
        part.close()
        attributes = {"Content-Type": content_type_of(name.rpartition(".")[2])}
        if result is not None:
            attributes[_RESULT] = result
        options: dict[str, Any] = {"attributes": attributes, "max_concurrency": 2}
        try:
            if part.size <= AT_ONCE:
                self._obstore.put(self._store, name, part.path, mode="create", use_multipart=False, **options)
            elif self._mark(name) is not None:
                raise self._exceptions.AlreadyExistsError(name)
            else:
                self._obstore.put(self._store, name, part.path, use_multipart=True, **options)
        except self._exceptions.AlreadyExistsError:
            if not self._same_content(name, part):
                raise DownloadError(
                    f"another object is there already: {str(place)!r}; it was not touched: "
                    "move it away or save under another prefix"
                ) from None
        except Exception as error:  # noqa: BLE001  (as above)
            raise DownloadError(f"{str(place)!r} could not be written: {_first_line(error)}") from None
        return place

    def _mark(self, name: str) -> str | None:
        """Which result an object is, "" if it doesn't tell; None if there is no object of that name."""
        try:
            found = self._obstore.get(self._store, name, options={"head": True})
        except FileNotFoundError:
            return None
        except Exception as error:  # noqa: BLE001  (as above)
            raise DownloadError(f"{str(self._root / name)!r} could not be looked for: {_first_line(error)}") from None
        return str(found.attributes.get(_RESULT, "")) if found.meta["size"] else None

    def _same_content(self, name: str, part: PartFile) -> bool:
        try:
            if self._obstore.head(self._store, name)["size"] != part.size:
                return False
            with part.path.open("rb") as file, closing(self._obstore.open_reader(self._store, name)) as other:
                return bool(hash_of(file) == hash_of(other))
        except Exception as error:  # noqa: BLE001  (as above)
            raise DownloadError(f"{str(self._root / name)!r} could not be read: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    """What an error says, without the details, and without the queries of links, which may hold signatures."""
    line = (str(error).splitlines() or [""])[0].partition(": <?xml")[0]
    return re.sub(r"\?\S+", "", line)[:300] or type(error).__name__
