"""Callback addresses that would cost money and never be called (F151)."""

from __future__ import annotations

import pytest

from evolink_async.catalog import check


def findings(url: str, *, lenient: bool = False) -> list[tuple[str, str | None]]:
    found = check("image", "gpt-4o-image", {"prompt": "x", "callback_url": url}, allow_private_hosts=lenient)
    return [(finding.severity, finding.param) for finding in found]


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/a hook",
        "https://example.com/hook\n",
        "https://exam\tple.com/hook",
        "https://example.com/\u202ehook",
        "https://example.com:99999/hook",
        "https://example.com:0/hook",
        "https://example.com:port/hook",
    ],
    ids=ascii,
)
def test_a_callback_with_a_blank_or_an_impossible_port_is_refused(url: str, lenient: bool) -> None:
    assert findings(url, lenient=lenient) == [("error", "callback_url")]


@pytest.mark.parametrize("model", ["gpt-4o-image", "who-knows"])
def test_a_callback_with_a_user_name_is_remarked_upon_without_showing_the_password(model: str) -> None:
    params = {"prompt": "x", "callback_url": "https://me:hunter2@example.com/hook"}
    [remark] = [finding for finding in check("image", model, params) if finding.param == "callback_url"]
    assert remark.severity == "warning"
    assert "hunter2" not in str(remark)


@pytest.mark.parametrize(
    "host",
    ["localhost.", "LOCALHOST", "a.localhost.", "127.0.0.1.", "[::ffff:10.0.0.1]", "[::ffff:a9fe:a9fe]", "0.0.0.0"],
)
def test_a_private_host_is_known_however_it_is_spelt(host: str) -> None:
    assert findings(f"https://{host}/hook") == [("error", "callback_url")]
    assert findings(f"https://{host}/hook", lenient=True) == []


@pytest.mark.parametrize(
    "host", ["8.8.8.8", "[::ffff:8.8.8.8]", "[2606:4700::1111]", "localhost.example", "example.com."]
)
def test_a_public_host_is_not_taken_for_a_private_one(host: str) -> None:
    assert findings(f"https://{host}/hook") == []


def test_a_user_name_before_a_private_host_does_not_hide_it() -> None:
    assert findings("https://example.com@10.0.0.1/hook") == [("error", "callback_url")]


@pytest.mark.parametrize("url", ["https://example.com/@hook", "https://example.com:8443/hook?a=b@c"])
def test_an_at_sign_elsewhere_is_no_user_name(url: str) -> None:
    assert findings(url) == []
