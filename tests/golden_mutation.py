"""Does the golden test notice?  Changes and removes every recorded array, one at a time, and counts what slips through.

    python tests/golden_mutation.py --golden DIR [--golden-only 1,1c] [--tag a]

For each file, in memory and in this process: (1) as recorded it must pass; (2) with one value of one array changed it
must fail; (3) without one array, or one entry of a list, it must fail; (4) with one more array it must fail; (5) the
folder without the file must fail.  An array whose change goes unnoticed is tried at further places, and by more: an input may hold values that
decide nothing, such as the logit of a class that is far from winning.  Documents (JSON) are changed once per kind of
leaf.
Exits 1 when something slipped through.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.golden_checks._golden import Golden, load_golden
from tests.test_golden import SECTIONS, check_file, check_section, golden_name

PLACES = 64
"""Positions of an array that are tried before its change counts as unnoticed."""

INERT = {
    "criterion": r"combos_json: \*\.y_hat_log_softmax",  # results are the same with it and without
    "masker": r"cases_json: \*\.extra_seed",  # seeded the arrays use_p and class_ids, which are recorded
    "checkpoint_layout": r"file|epoch|optimizers: \w+|args: note",  # prose
    "endtoend": r"configs_json: \*\.name",
    # Decided by the recorded inputs: both priors give one answer in a, and in b nothing of the class is confused.
    "kl_prior_a": r"configs_json: \*\.prior",
    "kl_prior_b": r"configs_json: \*\.nothing_class_reg_weight",
}
"""What cannot matter, as ``entry: kind of leaf``, by name of a kind of file or of one file."""

_PAIRS = (
    ("maximize", "minimize"),
    ("classification", "entropy"),
    ("l1", "l2"),
    ("mask_in", "mask_out"),
    ("forward", "backward"),
    ("subtract", "divide"),
    ("nearest", "bilinear"),
    ("hard", "sigmoid"),
    ("none", "blur"),
)
SWAPS = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}
"""Names that become their opposite rather than nonsense."""


def noticed(golden: Golden) -> bool:
    """Whether the test of this file fails."""
    try:
        import_module(f"tests.golden_checks.{golden.name}").check(golden)
    except Exception:  # a checker that breaks over bad input fails as well
        return True
    return bool(golden.unread())


def with_entries(golden: Golden, entries: dict[str, Any]) -> Golden:
    return type(golden)(golden.name, golden.tag, entries)


def changed_value(array: np.ndarray, attempt: int, random: np.random.Generator) -> np.ndarray:
    """A copy with one value changed by far more than any tolerance, the more the later the attempt."""
    array = array.copy()
    place = random.integers(array.size)
    value = array.flat[place]
    if array.dtype.kind == "f":
        scale = float(np.abs(array.astype(np.float64)).max()) or 1.0
        size = 0.5 * (1 + attempt)
        array.flat[place] = float(value) + scale * (size if value <= 0 or attempt % 2 else -size)
    elif array.dtype == np.uint8:
        array.flat[place] = value ^ 0x80  # half of a grey level's range, or one bit of packed ones
    else:
        array.flat[place] = value + (1 if value <= 0 else -1)
    return array


def leaves(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(document, dict | list) and document:
        for key, value in document.items() if isinstance(document, dict) else enumerate(document):
            yield from leaves(value, (*path, key))
    else:
        yield path


def leaf_kind(path: tuple[Any, ...]) -> str:
    return ".".join("*" if isinstance(key, int) else str(key) for key in path)


def changed_leaf(document: Any, path: tuple[Any, ...], attempt: int) -> Any:
    """A copy of the document with one leaf changed."""
    document = copy.deepcopy(document)
    if not path:
        return changed_scalar(document, attempt)
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = changed_scalar(holder[path[-1]], attempt)
    return document


def changed_scalar(value: Any, attempt: int) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1 + attempt
    if isinstance(value, float):
        return value * 1.5 + 0.25
    return SWAPS.get(value, f"changed {value}") if isinstance(value, str) else "changed"


def document_changes(
    golden: Golden, key: str, document: Any, random: np.random.Generator
) -> Iterator[tuple[str, list[Any]]]:
    """For each kind of leaf: its name and documents with one such leaf changed."""
    kinds: dict[str, list[tuple[Any, ...]]] = {}
    for path in leaves(document):
        kinds.setdefault(leaf_kind(path), []).append(path)
    for kind, paths in kinds.items():
        what = f"{key}: {kind}" if kind else key
        names = (golden.name, f"{golden.name}_{golden.tag}")
        if not any(name in INERT and re.fullmatch(INERT[name], what) for name in names):
            order = random.permutation(len(paths))
            attempts = range(min(max(len(paths), 8), PLACES))
            yield what, [changed_leaf(document, paths[order[a % len(paths)]], a) for a in attempts]


def changes(golden: Golden, random: np.random.Generator) -> Iterator[tuple[str, Iterator[Any] | list[Any], str]]:
    """What is changed, the new values to try in turn, and the entry that they belong to."""
    for key in list(golden):
        value = golden[key]
        if not isinstance(value, np.ndarray):
            for what, documents in document_changes(golden, key, value, random):
                yield what, documents, key
        elif value.dtype.kind == "U":
            for what, documents in document_changes(golden, key, json.loads(str(value)), random):
                yield what, [np.array(json.dumps(document)) for document in documents], key
        else:
            yield key, (changed_value(value, attempt, random) for attempt in range(PLACES)), key


def removals(golden: Golden, entries: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is taken away, and the entries that are left."""
    for key, value in entries.items():
        yield key, {k: v for k, v in entries.items() if k != key}
        if isinstance(value, np.ndarray) and value.dtype.kind == "U":
            document = json.loads(str(value))
            if isinstance(document, list) and document:
                yield f"the last entry of {key}", {**entries, key: np.array(json.dumps(document[:-1]))}


def examine(path: Path, figures: dict[str, int]) -> list[str]:
    """Everything that slipped through in one file."""
    name = golden_name(path)
    golden = load_golden(path)
    entries = {key: golden[key] for key in golden}
    if noticed(with_entries(golden, entries)):
        return [f"{path.name}: fails as recorded"]
    slipped = []
    random = np.random.default_rng(0)
    for what, values, key in changes(golden, random):
        figures["changes"] += 1
        for attempt, value in enumerate(values):
            if noticed(with_entries(golden, {**entries, key: value})):
                figures["first"] += attempt == 0
                break
        else:
            slipped.append(f"{path.name}: a change of {what} goes unnoticed")
    for what, left in removals(golden, entries):
        figures["removals"] += 1
        if not noticed(with_entries(golden, left)):
            slipped.append(f"{path.name}: nobody misses {what}")
    if not noticed(with_entries(golden, {**entries, "one_more": np.zeros(1)})):
        slipped.append(f"{path.name}: one more array goes unread")
    figures["arrays"] += len(entries)
    return [*slipped, *examine_folder(path, name, figures)]


def examine_folder(path: Path, name: str, figures: dict[str, int]) -> list[str]:
    """The same folder without the file, and with it under a name that nothing checks."""
    section = next(section for section, names in SECTIONS.items() if name in names)
    with tempfile.TemporaryDirectory() as scratch:
        for other in path.parent.iterdir():
            if other != path:
                (Path(scratch) / other.name).symlink_to(other.resolve())
        figures["files"] += 1
        stranger = Path(scratch) / f"stranger_{path.name}"
        stranger.symlink_to(path.resolve())
        slipped = []
        for what, test in (
            ("its absence goes unnoticed", lambda: check_section(Path(scratch), section)),
            ("a file without a checker goes unnoticed", lambda: check_file(stranger)),
        ):
            try:
                test()
            except (AssertionError, ImportError):
                continue
            slipped.append(f"{path.name}: {what}")
    return slipped


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Counts changes of golden values that the golden test does not notice."
    )
    parser.add_argument("--golden", type=Path, default=Path(__file__).with_name("golden"))
    parser.add_argument("--golden-only", default=",".join(SECTIONS), help="sections, such as 1,1c")
    parser.add_argument("--tag", help="only the files of this tag, and those without one")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    names = {name for section in arguments.golden_only.split(",") for name in SECTIONS[section]}
    slipped: list[str] = []
    total = dict.fromkeys(("arrays", "changes", "first", "removals", "files"), 0)
    for path in sorted(arguments.golden.resolve().iterdir()):
        tag = path.stem.rpartition("_")[2] if path.suffix == ".npz" else None
        if path.suffix not in (".npz", ".json") or golden_name(path) not in names:
            continue
        if arguments.tag and tag not in (None, arguments.tag):
            continue
        started = time.perf_counter()
        figures = dict.fromkeys(total, 0)
        found = examine(path, figures)
        slipped += found
        total = {key: total[key] + figures[key] for key in total}
        print(
            f"{path.name}: {figures}, {len(found)} slipped through, {time.perf_counter() - started:.0f} s", flush=True
        )
        print("".join(f"  {line}\n" for line in found), end="", flush=True)
    print(f"all: {total}, {len(slipped)} slipped through")
    return 1 if slipped else 0


if __name__ == "__main__":
    sys.exit(main())
