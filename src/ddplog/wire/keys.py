"""Derives every CURVE key pair of a job from one secret, and reads that secret.

The job secret is 32 random bytes, kept as 64 hex digits in a 0600 file or in DDPLOG_SECRET. The aggregator and each
node get a key pair of their own by HKDF-SHA256 (RFC 5869), so that distributing the secret is all the key
distribution there is, and the aggregator knows each node's public key before the node has ever connected:

    secret key = HKDF(salt = "ddplog/v1", key = job secret, info, 32 bytes)
    info       = "curve aggregator", or "curve node" + one zero byte + the node id in UTF-8

Whoever holds the job secret can be any node: it binds honest nodes to their names and keeps strangers out.
A secret is never shown: not by a repr and not in an error's text.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import zmq
from zmq.utils import z85

from ddplog.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

SECRET_BYTES: Final = 32
SECRET_VARIABLE: Final = "DDPLOG_SECRET"  # noqa: S105 - the name of the variable
MAX_NODE_ID_BYTES: Final = 255

_HIDDEN: Final = "<hidden>"
_SALT: Final = b"ddplog/v1"
_HASH_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A CURVE key pair, both keys in Z85 (40 ASCII bytes). The repr hides the secret one."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        return f"KeyPair(public={self.public!r}, secret={_HIDDEN})"


def node_keys(secret: bytes, node_id: str) -> KeyPair:
    """Derive a node's key pair.

    Args:
        secret: The job secret, 32 bytes.
        node_id: The node's name, 1 to 255 bytes of UTF-8.

    Raises:
        ConfigError: If the node id cannot be one.
    """
    name = node_id.encode("utf-8", "surrogatepass")
    if not 1 <= len(name) <= MAX_NODE_ID_BYTES or not node_id.isprintable():
        raise ConfigError("node_id", node_id, f"must be 1 to {MAX_NODE_ID_BYTES} bytes of printable UTF-8")
    return _key_pair(secret, b"curve node\0" + name)


def aggregator_keys(secret: bytes) -> KeyPair:
    """Derive the aggregator's key pair from the job secret, 32 bytes."""
    return _key_pair(secret, b"curve aggregator")


def allow_list(secret: bytes, node_ids: Iterable[str]) -> dict[bytes, str]:
    """Map the public key of each node to its id: whom a RouterEndpoint lets in."""
    return {node_keys(secret, node_id).public: node_id for node_id in node_ids}


def parse_secret(text: str, setting: str) -> bytes:
    """Decode a job secret.

    Raises:
        ConfigError: Naming `setting`, never the value, unless it is 64 hex digits.
    """
    text = text.strip()
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        secret = b""
    if len(secret) != SECRET_BYTES or len(text) != 2 * SECRET_BYTES:
        # Raised outside the handler: a chained ValueError would say where the offending character stands.
        raise ConfigError(setting, _HIDDEN, f"must be {2 * SECRET_BYTES} hex digits")
    return secret


def load_secret(path: Path | None, environ: Mapping[str, str] | None = None) -> bytes:
    """Read the job secret: DDPLOG_SECRET where it is set, else the file.

    Args:
        path: The secret's file, or None if there is none.
        environ: The environment; `os.environ` if None.

    Raises:
        ConfigError: If there is no secret, it cannot be read safely, or it is not 64 hex digits.
    """
    environ = os.environ if environ is None else environ
    if environ.get(SECRET_VARIABLE):
        return parse_secret(environ[SECRET_VARIABLE], SECRET_VARIABLE)
    if path is None:
        raise ConfigError(SECRET_VARIABLE, None, "no job secret: set it, or give the secret's file")
    return read_secret(path)


def read_secret(path: Path) -> bytes:
    """Read the job secret from a file that only this user can read.

    Raises:
        ConfigError: If it is missing, a link, not a plain file, another user's, open to others, or not a secret.
    """
    shown = f"secret file {path}"
    try:
        # O_NONBLOCK: a named pipe put in the secret's place must not hang the start.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        raise ConfigError(shown, _HIDDEN, f"cannot be read, or is a link: {exc.strerror}") from exc
    try:
        info = os.fstat(descriptor)  # of what was opened: a check by path could be raced
        if not stat.S_ISREG(info.st_mode):
            raise ConfigError(shown, _HIDDEN, "must be a plain file")
        if info.st_uid != os.geteuid():
            raise ConfigError(shown, _HIDDEN, f"belongs to user {info.st_uid}; it must be yours")
        if info.st_mode & 0o077:
            raise ConfigError(shown, _HIDDEN, f"has mode {info.st_mode & 0o777:o}; it must be 600")
        text = os.read(descriptor, 4 * SECRET_BYTES)
    finally:
        os.close(descriptor)
    return parse_secret(text.decode("ascii", "replace"), shown)


def _key_pair(secret: bytes, info: bytes) -> KeyPair:
    if len(secret) != SECRET_BYTES:
        raise ConfigError("secret", _HIDDEN, f"must be {SECRET_BYTES} bytes, not {len(secret)}")
    private = z85.encode(hkdf_sha256(secret, salt=_SALT, info=info, num_bytes=SECRET_BYTES))
    return KeyPair(public=zmq.curve_public(private), secret=private)


def hkdf_sha256(key: bytes, *, salt: bytes, info: bytes, num_bytes: int) -> bytes:
    """Derive key material from a key.

    Args:
        key: Input keying material.
        salt: Not secret; empty means 32 zero bytes.
        info: What the derived key is for.
        num_bytes: Length of the result, 1 to 8160 (255 hashes).

    Source: RFC 5869, sections 2.2 (extract) and 2.3 (expand).
    """
    if not 1 <= num_bytes <= 255 * _HASH_BYTES:
        raise ValueError(f"num_bytes={num_bytes}: must be 1 to {255 * _HASH_BYTES}")
    pseudorandom = hmac.digest(salt or bytes(_HASH_BYTES), key, hashlib.sha256)
    blocks, block = b"", b""
    for index in range(1, -(-num_bytes // _HASH_BYTES) + 1):
        block = hmac.digest(pseudorandom, block + info + bytes((index,)), hashlib.sha256)
        blocks += block
    return blocks[:num_bytes]
