"""PEM files: what is taken, and what is said about the rest."""

from __future__ import annotations

import pytest

from cluster.config import ConfigError, TlsConfig
from cluster.tls import server_pem
from tests.authority import Authority, Pair, encrypted


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("pem"))


@pytest.fixture(scope="module")
def pair(authority: Authority) -> Pair:
    return authority.sign("127.0.0.1")


def test_files_that_belong_together(authority: Authority, pair: Pair) -> None:
    pem = server_pem(TlsConfig(certificate=pair.certificate, key=pair.key, client_ca=authority.certificate))
    assert (pem.certificate, pem.key) == (pair.certificate.read_bytes(), pair.key.read_bytes())
    assert pem.client_ca == authority.certificate.read_bytes()
    assert server_pem(TlsConfig(certificate=pair.certificate, key=pair.key)).client_ca is None
    assert "PRIVATE" not in repr(pem)


@pytest.mark.parametrize(
    ("key", "file", "message"),
    [
        ("certificate", "nowhere.pem", "cannot be read: No such file"),
        ("certificate", "text.pem", "no PEM certificate"),
        ("certificate", "cut.pem", "no PEM certificate"),
        ("certificate", "127.0.0.1.key", "no PEM certificate"),
        ("certificate", "other.example.pem", "not the key of the certificate in"),
        ("key", "nowhere.pem", "cannot be read: No such file"),
        ("key", "text.pem", "no PEM private key"),
        ("key", "127.0.0.1.pem", "no PEM private key"),
        ("key", "other.example.key", "not the key of the certificate in"),
        ("key", "127.0.0.1.encrypted", "the key is encrypted; a key without a passphrase is needed"),
        ("client_ca", "nowhere.pem", "cannot be read: No such file"),
        ("client_ca", "text.pem", "no PEM certificate"),
        ("client_ca", "127.0.0.1.key", "no PEM certificate"),
        ("client_ca", ".", "cannot be read: Is a directory"),
    ],
)
def test_files_that_cannot_be_used_are_named(
    authority: Authority, pair: Pair, key: str, file: str, message: str
) -> None:
    folder = pair.key.parent
    authority.sign("other.example")
    encrypted(pair.key)
    (folder / "text.pem").write_text("not PEM")
    (folder / "cut.pem").write_bytes(pair.certificate.read_bytes()[:300])
    good = {"certificate": pair.certificate, "key": pair.key, "client_ca": authority.certificate}
    with pytest.raises(ConfigError) as refused:
        server_pem(TlsConfig(**{**good, key: folder / file}))
    named = "key" if "not the key" in message else key
    assert str(refused.value).startswith(f"gateway.tls.{named}: ")
    assert str(folder / file) in str(refused.value)
    assert message in str(refused.value)
