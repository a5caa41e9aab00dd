"""Tokens, bodies and addresses: what a callback is worth, without any I/O."""

from __future__ import annotations

import copy
import json
import pickle
import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolink_async import ConfigurationError
from evolink_async.callbacks.rules import MOST_BYTES, Recent, Tokens, checked_public_url, judge_head, task_id_in

SECRET = "s" * 16
TEXT = st.text(st.characters(), max_size=40)


@given(TEXT, TEXT)
def test_a_token_is_read_back_by_whoever_has_the_secret_and_by_nobody_else(job: str, identity: str) -> None:
    here, restarted, other = Tokens(SECRET), Tokens(SECRET.encode()), Tokens("t" * 16)
    name = here.name(job, identity)
    token = here.token(name)
    assert restarted.name(job, identity) == restarted.name_in(token) == name
    assert restarted.token(name) == token
    assert other.name_in(token) is None
    assert len(token) == 43
    assert not set(token) - set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


@given(st.integers(0, 42), st.characters())
def test_a_token_with_one_character_changed_is_none(place: int, character: str) -> None:
    tokens = Tokens(SECRET)
    token = tokens.token(tokens.name("job", "request"))
    changed = token[:place] + character + token[place + 1 :]
    assert tokens.name_in(changed) is None or changed == token


@given(TEXT)
def test_any_text_is_no_token(text: str) -> None:
    assert Tokens(SECRET).name_in(text) is None


def test_job_and_request_are_told_apart_wherever_one_ends_and_the_other_begins() -> None:
    tokens = Tokens(SECRET)
    pairs = [("a", "bc"), ("ab", "c"), ("abc", ""), ("", "abc"), ("1:a", "b"), ("a", ":b"), ("a:", "b")]
    assert len({tokens.name(job, identity) for job, identity in pairs}) == len(pairs)


def test_a_token_shows_neither_the_key_nor_the_job() -> None:
    import base64

    tokens = Tokens(SECRET)
    token = tokens.token(tokens.name("secret-job", "anna@example.org"))
    assert b"anna" not in base64.urlsafe_b64decode(token + "=")
    assert b"job" not in base64.urlsafe_b64decode(token + "=")


@pytest.mark.parametrize("secret", ["", "short", "x" * 15, b"x" * 15, None, 7, ["x" * 16]])
def test_a_weak_secret_is_refused_without_being_shown(secret: object) -> None:
    with pytest.raises(ConfigurationError, match="secret") as refused:
        Tokens(secret)  # type: ignore[arg-type]
    assert not (isinstance(secret, str) and secret and secret in str(refused.value))


def test_the_secret_leaves_the_tokens_in_no_way() -> None:
    secret = secrets.token_hex(16)
    tokens = Tokens(secret)
    assert secret not in repr(tokens)
    assert repr(tokens) == str(tokens) == "<Tokens>"
    for copying in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="secret"):
            copying(tokens)
    kept = [getattr(tokens, name) for name in Tokens.__slots__]
    assert secret.encode() not in kept


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "OPTIONS", "post", "", "DELETE"])
def test_whether_a_token_is_good_shows_to_nobody_who_does_not_post(method: str) -> None:
    tokens = Tokens(SECRET)
    good = tokens.token(tokens.name("job", "request"))
    assert judge_head(tokens, method, f"/{good}", None) == judge_head(tokens, method, "/x", None) == 405


def test_the_length_that_is_announced_is_judged_after_the_token_and_nonsense_of_it_is_left_to_the_reading() -> None:
    tokens = Tokens(SECRET)
    name = tokens.name("job", "request")
    path = f"/deep/down/{tokens.token(name)}"
    for length in (None, b"0", str(MOST_BYTES).encode(), b"-5", b"", b"\xff", b"1e9", "١٢".encode()):
        assert judge_head(tokens, "POST", path, length) == name
    for length in (str(MOST_BYTES + 1).encode(), b"9" * 5000):
        assert judge_head(tokens, "POST", path, length) == 413
        assert judge_head(tokens, "POST", "/x", length) == 404


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("id"), inner),
)


@given(st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_bytes_as_a_body_give_anything_but_an_id_or_none(body: bytes) -> None:
    task_id = task_id_in(body)
    assert task_id is None or json.loads(body)["id"] == task_id


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"{}",
        b"\xff\xfe",
        b"[" * 1_000_000,
        b'{"id":' * 150_000,
        b'{"id": ' + b"9" * 500_000 + b"}",
        b'{"id": null}',
        b'{"id": 7}',
        b'{"id": ["task-unified-1-a"]}',
        b'{"id": ""}',
        b'{"id": ".."}',
        b'{"id": "../credits"}',
        b'{"id": "a/../../v1/credits"}',
        b'{"id": "a?b"}',
        b'{"id": "a#b"}',
        b'{"id": "a%2f"}',
        b'{"id": "a\\nb"}',
        b'{"id": "http://169.254.169.254/"}',
        b'{"id": "\\ud800"}',
        b'{"id": "' + b"a" * 129 + b'"}',
        b'{"data": {"id": "task-unified-1-a"}}',
        b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
    ],
    ids=range(25),
)
def test_a_body_without_a_plain_id_names_no_task(body: bytes) -> None:
    assert task_id_in(body) is None


def test_a_body_that_is_as_long_as_may_be_is_read() -> None:
    body = b'{"id": "task-unified-1-a", "results": ["' + b"x" * (MOST_BYTES - 50) + b'"]}'
    assert task_id_in(body) == "task-unified-1-a"


@pytest.mark.parametrize(
    ("url", "good"),
    [
        ("https://example.org", "https://example.org"),
        ("https://example.org/", "https://example.org"),
        ("https://example.org:8443/a/b/", "https://example.org:8443/a/b"),
        ("http://127.0.0.1:8000/x", "http://127.0.0.1:8000/x"),
        ("http://localhost", "http://localhost"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_an_address_that_the_service_can_call_is_taken(url: str, good: str) -> None:
    assert checked_public_url(url) == good


@pytest.mark.parametrize(
    "url",
    [
        *("http://example.org", "http://10.0.0.1", "ftp://example.org", "example.org", "", "https://", "https:///x"),
        *("https://a@example.org", "https://a:b@example.org", "https://example.org?x", "https://example.org/#x"),
        *("https://example.org:99999", "https://example.org:0", "https://exa mple.org", "https://exämple.org"),
        *(
            "https://[::1",
            "https://example.org/" + "x" * 2000,
            None,
            7,
            b"https://example.org",
            "https://a\\b",
            "\nhttps://a",
        ),
    ],
)
def test_an_address_that_the_service_cannot_call_is_refused(url: object) -> None:
    with pytest.raises(ConfigurationError, match="public_url"):
        checked_public_url(url)  # type: ignore[arg-type]


def test_only_the_latest_are_remembered() -> None:
    recent: Recent[int, str] = Recent(3)
    for number in range(1000):
        recent.put(number, str(number))
        recent.put(0, "again")  # what comes again is the latest
    assert len(recent) == 3
    assert 0 in recent
    assert recent.get(999) == "999"
    assert recent.pop(5) is None
