"""PEM files: what is taken, and what is said about the rest."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from actors.transport.tls import WireTls
from cluster.config import ConfigError, TlsConfig, WireTlsConfig
from cluster.tls import server_pem, wire_tls, wire_tls_problem
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


def of_wires(pair: Pair, ca: Path) -> WireTlsConfig:
    return WireTlsConfig(certificate=pair.certificate, key=pair.key, ca=ca)


def self_signed(folder: Path, uses: list[ObjectIdentifier], days: int) -> Pair:
    """A certificate that is its own authority, for these uses, until so many days from now."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "node")])
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - timedelta(days=9)).not_valid_after(now + timedelta(days=days))
    made = made.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
    pair = Pair(folder / "own.pem", folder / "own.key")
    pair.certificate.write_bytes(made.sign(key, SHA256()).public_bytes(Encoding.PEM))
    pair.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return pair


def test_files_for_wires_that_fit(authority: Authority, pair: Pair) -> None:
    tls = of_wires(pair, authority.certificate)
    assert isinstance(wire_tls(tls), WireTls)
    assert wire_tls_problem(tls) is None


@pytest.mark.parametrize(
    ("key", "file", "message"),
    [
        ("certificate", "nowhere.pem", "cannot be read: No such file"),
        ("certificate", "another.example.pem", "not the key of the certificate in"),
        ("key", "nowhere.key", "cannot be read: No such file"),
        ("key", "127.0.0.1.encrypted", "the key is encrypted"),
        ("ca", "nowhere.pem", "cannot be read: No such file"),
        ("ca", "127.0.0.1.key", "no PEM certificate"),
    ],
)
def test_files_for_wires_that_cannot_be_used_are_named(
    authority: Authority, pair: Pair, key: str, file: str, message: str
) -> None:
    folder = pair.key.parent
    authority.sign("another.example")
    encrypted(pair.key)
    good = {"certificate": pair.certificate, "key": pair.key, "ca": authority.certificate}
    tls = WireTlsConfig(**{**good, key: folder / file})
    named = "key" if "not the key" in message else key
    with pytest.raises(ConfigError, match=f"^data_plane.tls.{named}: .*{message}") as refused:
        wire_tls(tls)
    assert str(folder / file) in str(refused.value)
    assert wire_tls_problem(tls) == str(refused.value)


def test_a_certificate_of_another_authority_is_refused_for_wires(pair: Pair, tmp_path: Path) -> None:
    other = Authority(tmp_path).certificate
    with pytest.raises(ConfigError, match=r"^data_plane\.tls\.certificate: .*not good for wires under data_plane"):
        wire_tls(of_wires(pair, other))


BOTH = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]


def test_a_certificate_must_be_valid_and_for_both_ends(tmp_path: Path) -> None:
    own = self_signed(tmp_path, BOTH, days=9)
    wire_tls(of_wires(own, own.certificate))
    cases = [(BOTH[:1], 9, "unsuitable certificate purpose"), (BOTH[1:], 9, "unsuitable certificate purpose")]
    for uses, days, message in [*cases, (BOTH, -1, "certificate has expired")]:
        own = self_signed(tmp_path, uses, days)
        with pytest.raises(ConfigError, match=f"^data_plane.tls.certificate: .*{message}"):
            wire_tls(of_wires(own, own.certificate))
