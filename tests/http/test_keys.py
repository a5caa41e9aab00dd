"""The API key and the address it is sent to: what is refused, and that the key shows nowhere."""

from __future__ import annotations

import asyncio
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from evolink_async import AsyncEvoLink, ConfigurationError
from evolink_async.http.exchange import checked_base_url
from evolink_async.http.keys import ApiKey, checked_key, fingerprint

SECRET = "SECRETSECRETSECRET"

BAD_KEYS: dict[str, Any] = {
    "empty": "",
    "newline": f"sk-{SECRET}\n",
    "crlf": f"sk-{SECRET}\r\nX-Evil: 1",
    "space": f"sk {SECRET}",
    "tab": f"sk\t{SECRET}",
    "nul": f"sk\0{SECRET}",
    "accent": f"sk-é{SECRET}",
    "zero-width": f"sk-\u200b{SECRET}",
    "full-width": f"sk-１{SECRET}",
    "surrogate": f"sk-\ud800{SECRET}",
    "quoted": f'"sk-{SECRET}"',
    "single-quoted": f"'sk-{SECRET}'",
    "bearer": f"Bearer sk-{SECRET}",
    "placeholder": "YOUR_API_KEY",
    "long": SECRET * 100,
    "bytes": SECRET.encode(),
    "number": 5,
    "list": [SECRET],
}


def everything_of(error: BaseException) -> str:
    parts = [str(error), repr(error), repr(error.args), *traceback.format_exception(error), repr(vars(error))]
    for other in (error.__cause__, error.__context__):
        if other is not None:
            parts.append(everything_of(other))
    return " ".join(parts)


@pytest.mark.parametrize("name", BAD_KEYS)
def test_a_key_that_cannot_be_sent_is_refused_without_being_shown(name: str) -> None:
    for use in (checked_key, ApiKey, AsyncEvoLink):
        with pytest.raises(ConfigurationError) as caught:
            use(BAD_KEYS[name])
        assert SECRET not in everything_of(caught.value)


def test_a_key_that_is_too_long_is_called_too_long() -> None:
    checked_key("k" * 512)
    with pytest.raises(ConfigurationError, match=r"^the API key has 513 characters, and at most 512 are taken"):
        checked_key("k" * 513)
    with pytest.raises(ConfigurationError, match="holds a space"):
        checked_key("k " * 500)


@pytest.mark.parametrize("name", BAD_KEYS)
async def test_what_a_key_function_returns_is_checked_too(name: str) -> None:
    async def later() -> Any:
        return BAD_KEYS[name]

    for source in (lambda: BAD_KEYS[name], later):
        with pytest.raises(ConfigurationError) as caught:
            await ApiKey(source).get()
        assert SECRET not in everything_of(caught.value)


def raising() -> str:
    raise ValueError(SECRET)


async def raising_later() -> str:
    raise ValueError(SECRET)


async def raising_ours() -> str:
    raise ConfigurationError(SECRET)


@pytest.mark.parametrize("source", [raising, raising_later, raising_ours])
async def test_what_a_key_function_raises_is_neither_shown_nor_kept(source: Callable[[], Any]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        await ApiKey(source).get()
    assert SECRET not in everything_of(caught.value)
    assert "raised" in str(caught.value)


@pytest.mark.looptime
async def test_a_key_function_that_gives_nothing_is_not_waited_for_for_ever() -> None:
    async def never() -> str:
        await asyncio.Event().wait()
        raise AssertionError

    async def too_late_by_itself() -> str:
        raise TimeoutError

    with pytest.raises(ConfigurationError, match="no key within 60 s"):
        await ApiKey(never).get()
    assert asyncio.get_running_loop().time() == pytest.approx(60)
    with pytest.raises(ConfigurationError, match="raised TimeoutError"):
        await ApiKey(too_late_by_itself).get()


async def test_a_key_function_is_asked_each_time() -> None:
    keys = iter(["sk-one-one-one", "sk-two-two-two"])
    key = ApiKey(lambda: next(keys))
    assert [await key.get(), await key.get()] == ["sk-one-one-one", "sk-two-two-two"]


def test_a_key_shows_nowhere_and_is_not_pickled() -> None:
    key = ApiKey(f"sk-{SECRET}")
    assert SECRET not in f"{key!r} {key}"
    assert SECRET not in repr(AsyncEvoLink(f"sk-{SECRET}"))
    with pytest.raises(TypeError):
        pickle.dumps(key)


def test_a_fingerprint_tells_keys_apart_and_reveals_none() -> None:
    assert fingerprint("sk-a") == fingerprint("sk-a") != fingerprint("sk-b")
    assert "sk-a" not in fingerprint("sk-a")


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("https://api.evolink.ai", "https://api.evolink.ai"),
        ("https://api.evolink.ai/", "https://api.evolink.ai"),
        ("https://api.evolink.ai/v1", "https://api.evolink.ai"),
        ("https://api.evolink.ai/v1/", "https://api.evolink.ai"),
        ("https://api.evolink.ai//v1", "https://api.evolink.ai"),
        ("https://api.evolink.ai/?", "https://api.evolink.ai"),
        ("HTTPS://API.evolink.ai:443", "https://api.evolink.ai"),
        ("https://proxy.test/evolink/v1", "https://proxy.test/evolink"),
        ("https://host.test/dev1", "https://host.test/dev1"),
        ("http://127.0.0.1:8085", "http://127.0.0.1:8085"),
        ("http://127.8.9.10", "http://127.8.9.10"),
        ("http://localhost:1", "http://localhost:1"),
        ("http://[::1]:8085/v1", "http://[::1]:8085"),
    ],
)
def test_an_address_is_accepted_with_and_without_v1(url: str, root: str) -> None:
    assert checked_base_url(url, "base_url") == root


BAD_URLS: list[Any] = [
    "",
    "api.evolink.ai",
    "http://api.evolink.ai",
    "http://127.0.0.1.evil.test",
    "http://xn--ls8h.test",
    "http://localhost.evil.test",
    "http://10.0.0.1",
    "ftp://api.evolink.ai",
    "file:///etc/passwd",
    "https://",
    "https:///v1",
    "https://user:password@api.evolink.ai",
    "https://api.evolink.ai?x=1",
    "https://api.evolink.ai#x",
    "https://api.evolink.ai:99999",
    "https://a b.test",
    "https://api.evolink.ai\n",
    None,
    5,
    b"https://api.evolink.ai",
]


@pytest.mark.parametrize("url", BAD_URLS, ids=repr)
def test_an_address_that_would_show_the_key_or_leads_nowhere_is_refused(url: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        checked_base_url(url, "base_url")
    assert "password" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["api.evolink.ai", "127.0.0.1:8085", "localhost:8085/v1", "ftp://api.evolink.ai", "//x.test"]
)
def test_an_address_without_its_scheme_is_told_to_begin_with_one(url: str) -> None:
    with pytest.raises(ConfigurationError, match="base_url must begin with https://, got"):
        checked_base_url(url, "base_url")
