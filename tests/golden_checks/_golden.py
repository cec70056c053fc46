"""Golden files as mappings that remember what was read, so that a test can insist that everything was.

A checker is ``tests/golden_checks/<name>.py`` with ``check(golden)``, called for ``<name>_<tag>.npz`` (any tag) or for
``<name>.json``.  It raises AssertionError when the product disagrees with a number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np


class Golden(Mapping[str, Any]):
    """One golden file: ``name`` (``criterion``), ``tag`` (``a``; empty for JSON), its entries, and which were read."""

    def __init__(self, name: str, tag: str, entries: Mapping[str, Any]) -> None:
        self.name = name
        self.tag = tag
        self.read: set[str] = set()
        self._entries = entries

    def __getitem__(self, key: str) -> Any:
        value = self._entries[key]
        self.read.add(key)
        return value

    def __contains__(self, key: object) -> bool:
        """Looking whether an entry is there is not reading it."""
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def unread(self) -> list[str]:
        return sorted(set(self._entries) - self.read)


class GoldenFile(Golden):
    """``<name>_<tag>.npz``: entries are NumPy arrays."""

    def json(self, key: str) -> Any:
        """The document in a ``*_json`` entry, a 0-d string array."""
        return json.loads(str(self[key]))


def assert_rows(golden: Golden, count: int, *names: str) -> None:
    """Each of these entries has one row for each of ``count`` settings: a result without its setting is not checked."""
    for name in names:
        assert len(golden[name]) == count, f"{name} has {len(golden[name])} rows for {count} settings"


class GoldenJson(Golden):
    """``<name>.json``: entries are the parsed top-level members; those of a list are called "0", "1", ..."""


def load_golden(path: Path) -> Golden:
    """The file as a mapping; everything is in memory, so no file stays open."""
    if path.suffix == ".json":
        document = json.loads(path.read_text())
        if isinstance(document, list):
            document = {str(i): item for i, item in enumerate(document)}
        return GoldenJson(path.stem, "", document)
    name, _, tag = path.stem.rpartition("_")
    with np.load(path, allow_pickle=False) as arrays:
        return GoldenFile(name, tag, {key: arrays[key] for key in arrays.files})


def assert_close(actual: Any, expected: Any, tolerance: float, what: str = "") -> None:
    """``|actual - expected| <= tolerance`` everywhere, equal shapes; tensors and arrays alike; NaN never passes."""
    actual = np.asarray(actual.detach().cpu() if hasattr(actual, "detach") else actual)
    expected = np.asarray(expected)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, golden {expected.shape}"
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance, equal_nan=False, err_msg=what)
