"""Key derivation and the job secret."""

import os

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from ddplog.errors import ConfigError
from ddplog.wire.keys import (
    SECRET_VARIABLE,
    aggregator_keys,
    allow_list,
    hkdf_sha256,
    load_secret,
    node_keys,
    parse_secret,
    read_secret,
)

SECRET = bytes(range(32))

# RFC 5869, appendix A.1 to A.3: key, salt, info, output.
VECTORS = [
    (
        "0b" * 22,
        "000102030405060708090a0b0c",
        "f0f1f2f3f4f5f6f7f8f9",
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
    ),
    (
        bytes(range(0x50)).hex(),
        bytes(range(0x60, 0xB0)).hex(),
        bytes(range(0xB0, 0x100)).hex(),
        (
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
            "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87"
        ),
    ),
    (
        "0b" * 22,
        "",
        "",
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
    ),
]


@pytest.mark.parametrize(("key", "salt", "info", "output"), VECTORS)
def test_hkdf_gives_the_vectors_of_rfc_5869(key, salt, info, output):
    derived = hkdf_sha256(
        bytes.fromhex(key), salt=bytes.fromhex(salt), info=bytes.fromhex(info), num_bytes=len(output) // 2
    )
    assert derived.hex() == output


@pytest.mark.parametrize("num_bytes", [0, -1, 255 * 32 + 1])
def test_hkdf_refuses_a_length_it_cannot_give(num_bytes):
    with pytest.raises(ValueError, match="num_bytes"):
        hkdf_sha256(b"key", salt=b"", info=b"", num_bytes=num_bytes)


def test_hkdf_gives_its_longest_output():
    assert len(hkdf_sha256(b"key", salt=b"", info=b"", num_bytes=255 * 32)) == 255 * 32


def test_a_key_pair_never_changes():
    """Nodes and aggregator of two releases must agree; a change here is a change of the protocol version."""
    assert aggregator_keys(SECRET).public == b"M.riTFe/J:l{]D?sYM)fPb#O/r9kb%?({:zLFsZW"
    assert node_keys(SECRET, "node-0").public == b">P%xq6az(WpHAhOmxDb@!F/I2u8U4iCTeWX2U$$t"


def test_the_public_key_belongs_to_the_secret_one():
    pair = node_keys(SECRET, "n")
    assert pair.public == zmq.curve_public(pair.secret)
    assert len(pair.public) == len(pair.secret) == 40


@given(st.sampled_from(["a", "b", "node-0", "aggregator"]), st.sampled_from(["a", "b", "node-0", "aggregator"]))
def test_each_name_and_secret_has_keys_of_its_own(one, other):
    assert (node_keys(SECRET, one) == node_keys(SECRET, other)) == (one == other)
    assert node_keys(SECRET, one) != aggregator_keys(SECRET)
    assert node_keys(SECRET, one) != node_keys(bytes(32), one)


def test_the_repr_hides_the_secret_key():
    pair = node_keys(SECRET, "n")
    for shown in (repr(pair), str(pair), f"{pair}"):
        assert pair.secret.decode() not in shown
        assert pair.public.decode() in shown


@pytest.mark.parametrize("node_id", ["", "x" * 256, "é" * 128, "a\nb", "a\0b", "\udc80", "a\u202eb"])
def test_a_node_id_that_cannot_be_shown_or_is_too_long_is_refused(node_id):
    with pytest.raises(ConfigError):
        node_keys(SECRET, node_id)


@pytest.mark.parametrize("secret", [b"", bytes(31), bytes(33)])
def test_a_secret_of_another_length_is_refused(secret):
    with pytest.raises(ConfigError):
        aggregator_keys(secret)


def test_the_allow_list_names_the_node_of_each_key():
    nodes = allow_list(SECRET, ["a", "b"])
    assert nodes[node_keys(SECRET, "b").public] == "b"
    assert len(nodes) == 2


@pytest.fixture
def secret_file(tmp_path):
    path = tmp_path / "secret"
    path.write_text(SECRET.hex() + "\n")
    path.chmod(0o600)
    return path


def test_the_file_gives_the_secret(secret_file):
    assert read_secret(secret_file) == SECRET
    assert load_secret(secret_file, {}) == SECRET


def test_the_variable_wins_over_the_file(secret_file):
    other = bytes(32).hex()
    assert load_secret(secret_file, {SECRET_VARIABLE: other}) == bytes(32)
    assert load_secret(None, {SECRET_VARIABLE: other}) == bytes(32)


def test_the_process_environment_is_the_default(secret_file, monkeypatch):
    monkeypatch.setenv(SECRET_VARIABLE, bytes(32).hex())
    assert load_secret(secret_file) == bytes(32)
    monkeypatch.delenv(SECRET_VARIABLE)
    assert load_secret(secret_file) == SECRET


def test_no_secret_at_all_is_refused():
    with pytest.raises(ConfigError):
        load_secret(None, {})


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o610, 0o777])
def test_a_file_open_to_others_is_refused(secret_file, mode):
    secret_file.chmod(mode)
    with pytest.raises(ConfigError):
        read_secret(secret_file)


def test_a_file_of_another_user_is_refused(secret_file, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ConfigError):
        read_secret(secret_file)


def test_a_link_is_refused(secret_file, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(secret_file)
    with pytest.raises(ConfigError):
        read_secret(link)


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name in ("pipe", "missing", "."):
        with pytest.raises(ConfigError):
            read_secret(tmp_path / name)


@pytest.mark.parametrize("text", ["", "secret", "zz" * 32, "00" * 31, "00" * 33, "0 " * 32, "00 " * 32, "é" * 64])
def test_what_is_no_secret_is_refused_and_never_shown(text):
    with pytest.raises(ConfigError) as caught:
        parse_secret(text, SECRET_VARIABLE)
    assert caught.value.setting == SECRET_VARIABLE
    assert not text or text not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_bytes_that_are_no_text_are_refused(secret_file):
    secret_file.write_bytes(b"\xff" * 64)
    with pytest.raises(ConfigError):
        read_secret(secret_file)
