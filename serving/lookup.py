"""Size and stamp of inputs that a list names: what a listing would have told of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.data import folders, store
from pipeline.data.folders import Entry
from pipeline.errors import UsageError

AT_A_TIME = 10_000
"""Lines of a list that are looked up together."""
THREADS = 64
PER_PAGE = 10
"""Requests for single objects that cost as much as a page of a listing, which may tell of a thousand."""
_OBJECT = re.compile(r"s3://(arn:[^/]+|[\w.-]{3,255})/.+", re.ASCII | re.DOTALL)


def looked_up(places: Iterable[str], *, allowed: Callable[[str], bool] = lambda _place: True) -> Iterator[Entry]:
    """An entry for each place, in the same order; without size and stamp where nothing is there or can be asked.

    Objects of a bucket that lie close together are found in the listing of their folder, others asked for one by one: a list
    in order of most of a bucket costs little more than the bucket's listing, a list of few objects no more than these.

    ``allowed``: which places may be looked up at all; the others are left to whoever reads them, who refuses.
    """
    iterator = iter(places)
    with ThreadPoolExecutor(THREADS) as pool:
        while part := list(itertools.islice(iterator, AT_A_TIME)):
            remote = sorted(
                {place for place in part if store.is_remote(place) and allowed(place)}, key=_folder_and_name
            )
            buckets = [place for place in remote if place.startswith("s3://")]
            siblings = [
                list(group) for _, group in itertools.groupby(buckets, lambda place: _folder_and_name(place)[0])
            ]
            known = {entry.place: entry for found in pool.map(_listed, siblings) for entry in found}
            single = [place for place in remote if place not in known]
            known |= zip(single, pool.map(_asked, single), strict=True)
            yield from (
                known.get(place) or (_local(place) if allowed(place) else Entry(place, -1, "")) for place in part
            )


def _folder_and_name(place: str) -> tuple[str, str]:
    folder, _, name = place.rpartition("/")
    return folder, name


def _asked(place: str) -> Entry:
    """What the store says of one object; a line of a list that can name none costs that line alone, and no tries.

    Raises:
        StoreError: the store does not answer; without sizes and stamps the plan would be another one.
    """
    if place.startswith("s3://") and not _OBJECT.fullmatch(place):
        return Entry(place, -1, "")
    try:
        return folders.look_at(place)
    except UsageError:  # a scheme that nothing here knows
        return Entry(place, -1, "")


def _listed(places: list[str]) -> list[Entry]:
    """Those of ``places``, all of one folder and in order, that a listing finds at a lower price than asking for each."""
    most = 1000 * (len(places) // PER_PAGE)  # objects in as many pages
    if not most:
        return []
    folder, _, first = places[0].rpartition("/")
    wanted, found = set(places), []
    try:
        for entry in itertools.islice(folders.list_after(folder, first[:-1]), most):
            if entry.place > places[-1]:
                break
            if entry.place in wanted:
                found.append(entry)
    except store.ReadError:  # who may read objects need not be allowed to list them
        return []
    return found


def _local(place: str) -> Entry:
    try:
        about = Path(place).stat()
    except (OSError, ValueError):
        return Entry(place, -1, "")
    return Entry(place, about.st_size, str(about.st_mtime_ns))
