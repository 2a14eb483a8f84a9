"""Decides what of a batch is new: every writer's seqs are taken once each, in order, without a gap.

The key is (incarnation, seq). There is no time window: a batch sent again a day later is still known, because all
that has to be remembered is the next seq.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Accept:
    """Take the batch from its record number `skip` on."""

    skip: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Duplicate:
    """Everything in it is known: acknowledge again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Records before it are missing: resume from `next_seq`."""

    next_seq: int


def admit(next_seq: int, first_seq: int, num_records: int) -> Accept | Duplicate | Gap:
    """Decide about the batch first_seq .. first_seq + num_records - 1 of a writer whose next seq is `next_seq`."""
    if first_seq > next_seq:
        return Gap(next_seq=next_seq)
    if first_seq + num_records <= next_seq:
        return Duplicate()
    return Accept(skip=next_seq - first_seq)
