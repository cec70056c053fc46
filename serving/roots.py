"""What clients of the service may read and write: places below the configured roots, and nothing else."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.data import store
from pipeline.errors import UsageError

ROOTS_VARIABLE = "ONEPASS_ROOTS"


class OutsideRoots(UsageError):
    """A place that a client has no business with."""


def configured_roots() -> list[str]:
    """The roots that ``ONEPASS_ROOTS`` names, comma-separated paths or buckets; by default the working directory."""
    named = [part.strip() for part in os.environ.get(ROOTS_VARIABLE, "").split(",") if part.strip()]
    return [_resolved(store.place_of(text)) for text in named or ["."]]


def within(place: str, roots: Sequence[str]) -> bool:
    """Whether a place lies below one of the roots, wherever links lead."""
    resolved = _resolved(place)
    return any(resolved == root or resolved.startswith(root.rstrip("/") + "/") for root in roots)


def bounded(text: str, roots: list[str]) -> str:
    """The place that a client means; relative paths count from the first root.

    Raises:
        OutsideRoots: it is below none of the roots.
    """
    if "\0" in text:
        raise OutsideRoots("a path cannot hold a NUL character")
    here = not store.is_remote(text) and not text.startswith("/")
    place = store.place_of(store.join(roots[0], text) if here else text)
    if not within(place, roots):
        raise OutsideRoots(f"{text} is outside the roots of this service; ask its keeper to add it to {ROOTS_VARIABLE}")
    return place


def outward(text: str, roots: Sequence[str]) -> str:
    """A text for clients, in which paths below the first root are relative to it: how they may name them, and no more.

    ``/srv/pictures/in/x.jpg`` below ``/srv/pictures`` becomes ``in/x.jpg``, and the root itself ``.``.  Further roots have to be
    named in full by whoever uses them, and so have buckets.
    """
    root = roots[0].rstrip("/") if roots and not store.is_remote(roots[0]) else ""
    if not root:
        return text
    below = r"/(?P<first>[^\s/'\":;,)])"
    itself = r"/?(?![\w/-]|\.\w)"
    found = rf"(?<![\w/.-]){re.escape(root)}(?:{below}|{itself})"
    return re.sub(found, lambda match: match["first"] or ".", text)


def _resolved(place: str) -> str:
    if not store.is_remote(place):
        return str(Path(place).resolve())
    scheme, _, path = place.partition("://")
    # Stores know no "..", but what serves them may.
    return f"{scheme}://{os.path.normpath(path)}" if ".." in path.split("/") else place
