"""Tokens, and the door that must not stand open."""

from __future__ import annotations

import copy
import hashlib
import hmac
import pickle
from typing import Any

import pytest

from cluster import access
from cluster.access import (
    EVERYBODY,
    AccessList,
    Caller,
    bearer_token,
    is_loopback,
    missing_locks,
    new_token,
    refuse_open_door,
    token_hash,
)
from cluster.config import ConfigError, TokenConfig, load_config


def entry(token: str, tenant: str = "acme", **fields: Any) -> TokenConfig:
    return TokenConfig(sha256=token_hash(token), tenant=tenant, **fields)


def test_each_token_leads_to_its_caller() -> None:
    known = AccessList([entry("a", "one"), entry("b", "two", role="admin", share=2.5), entry("c", "one")])
    assert known.caller("a") == known.caller("c") == Caller("one", "user", 1.0)
    assert known.caller("b") == Caller("two", "admin", 2.5)
    assert [known.caller(token) for token in ("", "A", "a ", "ab", token_hash("a"), "\udcff")] == [None] * 6
    assert [caller.is_admin for caller in (Caller("t", "user", 1), Caller("t", "admin", 1), EVERYBODY)] == [0, 1, 1]


def test_without_tokens_it_is_open_and_knows_nobody() -> None:
    assert AccessList().is_open
    assert AccessList().caller("") is None
    assert not AccessList([entry("a")]).is_open


def test_every_entry_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those after the one that matches: the time tells neither whether nor where there was one."""
    compared = []
    honest = hmac.compare_digest

    def compare(known: bytes, given: bytes) -> bool:
        compared.append(known)
        return honest(known, given)

    monkeypatch.setattr(access.hmac, "compare_digest", compare)
    known = AccessList([entry(token) for token in "abc"])
    for token in ("a", "c", "nobody's"):
        compared.clear()
        known.caller(token)
        assert [digest.hex() for digest in compared] == [token_hash(t) for t in "abc"]


def test_the_list_travels_to_the_gateway_and_holds_no_token() -> None:
    token = new_token()
    sent = AccessList([entry(token)])
    assert token.encode() not in pickle.dumps(sent)
    assert copy.deepcopy(sent).caller(token) == Caller("acme", "user", 1.0)  # by the same protocol


def test_new_tokens_are_256_bits_and_never_the_same() -> None:
    tokens = {new_token() for _ in range(50)}
    assert len(tokens) == 50
    assert {len(token.removeprefix("emt_")) for token in tokens} == {43}  # base64 of 32 bytes
    assert token_hash("abc") == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize("header", ["Bearer t0k.e-n_~+/=", "bearer t0k.e-n_~+/=", "BEARER  t0k.e-n_~+/= "])
def test_bearer_headers(header: str) -> None:
    assert bearer_token(header) == "t0k.e-n_~+/="


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "token", "Basic dXNlcg==", "Bearer a b", "Bearertoken"])
def test_headers_that_hold_no_token(header: str) -> None:
    assert bearer_token(header) is None


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("0", False),
        ("::", False),
        ("192.0.2.1", False),
        ("::ffff:192.0.2.1", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host, "gateway.host") is loopback


def test_a_host_without_an_address_is_named() -> None:
    with pytest.raises(ConfigError, match=r"gateway\.host: 'no host at all' has no address"):
        is_loopback("no host at all", "gateway.host")


TLS = {"gateway.tls": {"certificate": "/c", "key": "/k"}}
TOKENS = {"access.tokens": [{"sha256": token_hash("a"), "tenant": "acme"}]}


@pytest.mark.parametrize(
    ("keys", "missing"),
    [
        ({}, ["gateway.tls", "access.tokens"]),
        (TLS, ["access.tokens"]),
        (TOKENS, ["gateway.tls"]),
        ({**TLS, **TOKENS}, []),
    ],
)
def test_off_loopback_tls_and_tokens_are_needed(keys: dict[str, Any], missing: list[str]) -> None:
    config = load_config(None, {"gateway.host": "0.0.0.0", **keys})
    assert missing_locks(config) == missing
    assert missing_locks(load_config(None, keys)) == []  # on loopback none is missed
    refuse_open_door(load_config(None, keys))
    refuse_open_door(load_config(None, {"gateway.host": "0.0.0.0", "gateway.insecure": True, **keys}))
    if missing:
        with pytest.raises(ConfigError) as refused:
            refuse_open_door(config)
        assert f"'0.0.0.0' is not loopback and {' and '.join(missing)} not set" in str(refused.value)
        assert "--insecure" in str(refused.value)
    else:
        refuse_open_door(config)
