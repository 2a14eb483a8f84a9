"""Owns the run's keys: their ids, how each is reduced, and the limit on their number."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from ddplog.core.effects import KeyRow


class Definition(NamedTuple):
    """What define_metric() says of the keys that match a pattern."""

    pattern: str
    reduce: str
    replicated: bool


class KeyTable:
    """The keys in the order in which they were first seen. The first definition that matches a key holds.

    Args:
        max_keys: No further key is taken once there are so many.
    """

    def __init__(self, max_keys: int) -> None:
        self.max_keys = max_keys
        self.rows: dict[str, KeyRow] = {}
        self.names: dict[int, str] = {}
        self.definitions: list[Definition] = []
        self._changed: list[KeyRow] = []

    def restore(self, rows: Iterable[KeyRow], definitions: Iterable[tuple[str, str, bool]]) -> None:
        """Take over what the store has."""
        for row in rows:
            self.rows[row.name] = row
            self.names[row.key_id] = row.name
        self.definitions = [Definition(*definition) for definition in definitions]

    def key(self, name: str) -> KeyRow | None:
        """Return the key, new if it was not known; None if there are too many."""
        row = self.rows.get(name)
        if row is None:
            if len(self.rows) >= self.max_keys:
                return None
            row = self.rows[name] = KeyRow(len(self.rows) + 1, name, *self._reduction(name))
            self.names[row.key_id] = name
            self._changed.append(row)
        return row

    def by_id(self, key_id: int) -> KeyRow:
        """Return a known key."""
        return self.rows[self.names[key_id]]

    def definition(self, pattern: str) -> Definition | None:
        """Return what was said of exactly this pattern."""
        return next((definition for definition in self.definitions if definition.pattern == pattern), None)

    def define(self, definition: Definition) -> list[KeyRow]:
        """Add a definition.

        Returns:
            The known keys that are reduced otherwise from now on.
        """
        self.definitions.append(definition)
        changed = []
        for name, row in self.rows.items():
            reduce, replicated = self._reduction(name)
            if (reduce, replicated) != (row.reduce, row.replicated):
                changed.append(row._replace(reduce=reduce, replicated=replicated))
        self.rows.update({row.name: row for row in changed})
        self._changed += changed
        return changed

    def take_changed(self) -> list[KeyRow]:
        """Return the keys that are new or were defined again since the last call."""
        changed, self._changed = self._changed, []
        return changed

    def _reduction(self, name: str) -> tuple[str, bool]:
        for definition in self.definitions:
            if fnmatchcase(name, definition.pattern):
                return definition.reduce, definition.replicated
        return "mean", False

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"<KeyTable keys={len(self.rows)} definitions={len(self.definitions)}>"
