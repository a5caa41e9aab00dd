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


def test_a_user_name_before_a_private_host_does_not_hide_it() -> None:
    assert findings("https://example.com@10.0.0.1/hook") == [("error", "callback_url")]


@pytest.mark.parametrize("url", ["https://example.com/@hook", "https://example.com:8443/hook?a=b@c"])
def test_an_at_sign_elsewhere_is_no_user_name(url: str) -> None:
    assert findings(url) == []
