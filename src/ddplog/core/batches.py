"""Turns a batch's payload, whole journal frames, into columns: one array per run of records with the same keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ddplog.core.records import KIND_SCALARS, PREFIX, PREFIX_BYTES, Record, decode, scan_payload
from ddplog.core.reduce import F64, I64

_PREFIX_WORDS = PREFIX_BYTES // 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Scalar records of one writer with the same keys, in the order of seq. M records, K keys."""

    schema_id: int
    steps: I64
    """[M]"""
    times: I64
    """[M] wall time, ns."""
    weights: F64
    """[M]"""
    values: F64
    """[M, K]"""

    def columns(self, sources: Sequence[int]) -> Rows:
        """Keep some keys, by index."""
        return Rows(
            schema_id=self.schema_id,
            steps=self.steps,
            times=self.times,
            weights=self.weights,
            values=self.values[:, sources],
        )

    def where(self, mask: np.ndarray) -> Rows:
        """Keep some records; `mask`: [M] bool."""
        return Rows(
            schema_id=self.schema_id,
            steps=self.steps[mask],
            times=self.times[mask],
            weights=self.weights[mask],
            values=self.values[mask],
        )


class Single(NamedTuple):
    """What must be known of a payload that is one scalar record, before its values are looked at."""

    seq: int
    schema_id: int
    num_keys: int
    step: int


def single(payload: bytes) -> Single | None:
    """Return what a payload of one whole scalar record is; None if it is anything else, or malformed."""
    if len(payload) < PREFIX_BYTES:
        return None
    length, _, seq, head, num_keys, step, _, _ = PREFIX.unpack_from(payload)
    if length != len(payload) or head & 0xFF != KIND_SCALARS or PREFIX_BYTES + 8 * num_keys != length:
        return None
    return Single(seq, head >> 8, num_keys, step)


def join(payloads: Sequence[bytes]) -> Rows:
    """Return single records with the same keys, of any writers, as one array: M payloads that single() has accepted."""
    return _columns(np.frombuffer(b"".join(payloads), "<u8").reshape(len(payloads), -1))


def split(payload: bytes, first_seq: int) -> tuple[int, list[Rows | Record]]:
    """Split a payload.

    Args:
        payload: Whole frames.
        first_seq: The seq its first frame must have.

    Returns:
        (number of records, runs of scalar records and single other records, in the order of seq).

    Raises:
        ValueError: If the frames do not fill the payload, their seqs are not consecutive, or one is malformed.
    """
    whole = _as_one_run(payload, first_seq)
    if whole is not None:
        return len(whole.steps), [whole]
    frames = scan_payload(payload)
    items: list[Rows | Record] = []
    start = 0
    heads = [payload[offset + 16 : offset + 24] for offset, _ in frames]
    while start < len(frames):
        end = start + 1
        offset, length = frames[start]
        if heads[start][0] != KIND_SCALARS:
            record = decode(payload, offset)
            if record.seq != first_seq + start:
                raise ValueError(f"seq {record.seq} where {first_seq + start} belongs")
            items.append(record)
        else:
            while end < len(frames) and heads[end] == heads[start]:
                end += 1
            words = np.frombuffer(payload, "<u8", (end - start) * length // 8, offset).reshape(end - start, -1)
            items.append(_rows(words, first_seq + start))
        start = end
    return len(frames), items


def _as_one_run(payload: bytes, first_seq: int) -> Rows | None:
    """Return the whole payload as one run, if all its frames are scalars of one schema: the common case."""
    total = len(payload)
    length = int.from_bytes(payload[:4], "little")
    if length < PREFIX_BYTES or length & 7 or total % length or payload[16] != KIND_SCALARS:
        return None
    words = np.frombuffer(payload, "<u8").reshape(-1, length // 8)
    if (words[:, 0] & 0xFFFFFFFF != length).any() or (words[:, 2] != words[0, 2]).any():
        return None
    return _rows(words, first_seq)


def _rows(words: np.ndarray, first_seq: int) -> Rows:
    count = words.shape[0]
    if int(words[0, 1]) != first_seq or int(words[-1, 1]) != first_seq + count - 1:
        raise ValueError(f"seqs {words[0, 1]}..{words[-1, 1]} where {first_seq}.. belongs")
    num_keys = int(words[0, 2]) >> 32
    if _PREFIX_WORDS + num_keys != words.shape[1]:
        raise ValueError(f"{num_keys} values do not fill {words.shape[1] * 8} bytes")
    return _columns(words)


def _columns(words: np.ndarray) -> Rows:
    signed, floats = words.view("<i8"), words.view("<f8")
    return Rows(
        schema_id=int(words[0, 2]) >> 8 & 0xFFFFFF,
        steps=signed[:, 3],
        times=signed[:, 4],
        weights=floats[:, 5],
        values=floats[:, _PREFIX_WORDS:],
    )
