"""The hello before a wire: both ends prove that they know the secret, which itself never crosses the wire.

    C -> S  hello:      version, medium, 32 random bytes, C's name, the name C wants to reach
    S -> C  challenge:  version, 32 random bytes                       (or a refusal with its reason)
    C -> S  proof:      HMAC-SHA256(secret, "client" + hello + challenge)
    S -> C  verdict:    HMAC-SHA256(secret, "server" + hello + challenge)  (or a refusal)

Each proof covers both sides' random bytes, both names, the version and the medium, so none can be replayed,
reflected or moved to another medium (the usual mutual challenge-response, ISO/IEC 9798-4). The connecting end
proves first: a stranger learns nothing but that something listens. It does not encrypt: where the medium is TLS
(``tls.py``) all of this, the names too, and what follows is inside; on TCP it is plain.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import struct
from typing import NoReturn

from actors.transport.base import HandshakeRefused, Medium
from actors.transport.frame import PROTOCOL_VERSION
from actors.transport.sockets import recv_exact, send_exact

HANDSHAKE_SECONDS = 2.0
"""The accepting end gives a client this long in all, however it spends it."""

MAX_NAME_BYTES = 255

_MAGIC = b"EXMH"
_NONCE_BYTES = 32
_MAC_BYTES = 32
_OPENING = struct.Struct("<4sH")
_HELLO = struct.Struct(f"<B{_NONCE_BYTES}sBB")
_CHALLENGE = struct.Struct(f"<4sHBB{_NONCE_BYTES}s")
_VERDICT = struct.Struct(f"<BB{_MAC_BYTES}s")
_MEDIUM_CODES = {Medium.SHM: 1, Medium.TCP: 2, Medium.TLS: 3}
_PEER_CREDENTIALS = struct.Struct("3i")


def greet(
    sock: socket.socket,
    medium: Medium,
    own: str,
    peer: str,
    secret: bytes,
    deadline: float,
    version: int = PROTOCOL_VERSION,
) -> None:
    """The connecting end's part. Returns once ``peer`` has proved itself.

    Errors: HandshakeRefused (with the peer's reason where it gave one), WireTimeout, PeerGone.
    """
    what = f"handshake with {peer!r}"
    own_bytes, peer_bytes = name_bytes(own), name_bytes(peer)
    opening = _OPENING.pack(_MAGIC, version)
    hello = _HELLO.pack(_MEDIUM_CODES[medium], os.urandom(_NONCE_BYTES), len(own_bytes), len(peer_bytes))
    hello = opening + hello + own_bytes + peer_bytes
    send_exact(sock, hello, deadline, what)
    challenge = recv_exact(sock, _CHALLENGE.size, deadline, what)
    magic, theirs, refused, length, _ = _CHALLENGE.unpack(challenge)
    if magic != _MAGIC:
        raise HandshakeRefused(f"{what}: what answers there is not one of ours")
    _raise_if_refused(sock, refused, length, deadline, what)
    if theirs != version:
        raise HandshakeRefused(f"{what}: it speaks version {theirs}, this end {version}")
    send_exact(sock, _mac(secret, b"client", hello + challenge), deadline, what)
    refused, length, mac = _VERDICT.unpack(recv_exact(sock, _VERDICT.size, deadline, what))
    _raise_if_refused(sock, refused, length, deadline, what)
    if not hmac.compare_digest(mac, _mac(secret, b"server", hello + challenge)):
        raise HandshakeRefused(f"{what}: it does not know the secret")


def answer(sock: socket.socket, medium: Medium, own: str, secret: bytes, deadline: float) -> str:
    """The accepting end's part. Returns the name of the peer, which has proved that it knows the secret.

    Errors: HandshakeRefused (the client was told why, unless it is no client of ours), WireTimeout, PeerGone.
    """
    what = "handshake with a client"
    opening = recv_exact(sock, _OPENING.size, deadline, what)
    magic, version = _OPENING.unpack(opening)
    if magic != _MAGIC:
        raise HandshakeRefused(f"{what}: it began with {magic!r}, not with a hello of ours")
    if version != PROTOCOL_VERSION:
        _refuse(sock, f"the client speaks version {version}, this end {PROTOCOL_VERSION}", deadline)
    fields = recv_exact(sock, _HELLO.size, deadline, what)
    code, _, peer_length, own_length = _HELLO.unpack(fields)
    names = recv_exact(sock, peer_length + own_length, deadline, what)
    if code != _MEDIUM_CODES[medium]:
        _refuse(sock, f"the hello is for medium code {code}, this listener is for {medium}", deadline)
    if names[peer_length:] != name_bytes(own):
        _refuse(sock, "another endpoint listens here than the one asked for", deadline)
    peer = _text(names[:peer_length])
    if not peer:
        _refuse(sock, "the client's name is empty or not UTF-8", deadline)
    challenge = _CHALLENGE.pack(_MAGIC, PROTOCOL_VERSION, 0, 0, os.urandom(_NONCE_BYTES))
    send_exact(sock, challenge, deadline, what)
    transcript = opening + fields + names + challenge
    if not hmac.compare_digest(recv_exact(sock, _MAC_BYTES, deadline, what), _mac(secret, b"client", transcript)):
        text = "the client does not know the secret"
        send_exact(sock, _VERDICT.pack(1, len(text), bytes(_MAC_BYTES)) + text.encode(), deadline, what)
        raise HandshakeRefused(text)
    send_exact(sock, _VERDICT.pack(0, 0, _mac(secret, b"server", transcript)), deadline, what)
    return peer


def require_same_user(sock: socket.socket) -> None:
    """Refuse a Unix-socket peer of another user (SO_PEERCRED). Errors: HandshakeRefused."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    pid, uid, _ = _PEER_CREDENTIALS.unpack(data)
    if uid != os.getuid():
        raise HandshakeRefused(f"process {pid} of user {uid} is at the other end; only user {os.getuid()} may be")


def name_bytes(name: str) -> bytes:
    """The name as it crosses the wire. Errors: ValueError (empty or longer than MAX_NAME_BYTES)."""
    data = name.encode()
    if not 0 < len(data) <= MAX_NAME_BYTES:
        raise ValueError(f"endpoint name {name!r} has {len(data)} bytes; allowed are 1 to {MAX_NAME_BYTES}")
    return data


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return ""


def _mac(secret: bytes, role: bytes, transcript: bytes) -> bytes:
    return hmac.digest(secret, role + hashlib.sha256(transcript).digest(), "sha256")


def _refuse(sock: socket.socket, text: str, deadline: float) -> NoReturn:
    data = text.encode()
    refusal = _CHALLENGE.pack(_MAGIC, PROTOCOL_VERSION, 1, len(data), bytes(_NONCE_BYTES)) + data
    send_exact(sock, refusal, deadline, "refusing a client")
    raise HandshakeRefused(text)


def _raise_if_refused(sock: socket.socket, refused: int, length: int, deadline: float, what: str) -> None:
    if refused:
        reason = recv_exact(sock, length, deadline, what).decode(errors="replace")
        raise HandshakeRefused(f"{what}: {reason}")
