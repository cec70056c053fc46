"""Size and stamp of inputs that a list names: what a listing would have told of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.data import folders, store
from pipeline.data.folders import Entry

AT_A_TIME = 10_000
"""Lines of a list that are looked up together."""
THREADS = 64
PER_PAGE = 10
"""Requests for single objects that cost as much as a page of a listing, which may tell of a thousand."""


def looked_up(places: Iterable[str]) -> Iterator[Entry]:
    """An entry for each place, in the same order; without size and stamp where nothing is there.

    Objects of a store that lie close together are found in the listing of their folder, others asked for one by one: a list
    of most of a bucket costs little more than the bucket's listing, a list of few objects no more than these.
    """
    iterator = iter(places)
    with ThreadPoolExecutor(THREADS) as pool:
        while part := list(itertools.islice(iterator, AT_A_TIME)):
            remote = sorted({place for place in part if store.is_remote(place)})
            siblings = [list(group) for _, group in itertools.groupby(remote, lambda place: place.rpartition("/")[0])]
            known = {entry.place: entry for found in pool.map(_listed, siblings) for entry in found}
            single = [place for place in remote if place not in known]
            known |= zip(single, pool.map(folders.look_at, single), strict=True)
            yield from (known.get(place) or _local(place) for place in part)


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
