"""The product agrees with recorded values of the published code.

``pytest tests/test_golden.py --golden DIR [--golden-only 1,1c,2]`` checks every array of every ``<name>_<tag>.npz`` and
the JSON files of DIR, one test per file.  A file without a checker, an array that no checker read, and a file that is
missing from one of the sections (of all, where none is named) are failures.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.golden_checks._golden import load_golden

SECTIONS = {
    "1": ("criterion",),
    "1b": ("kl_prior",),
    "1c": ("endtoend",),
    "2": ("tv",),
    "3": ("score", "boxes_fullres", "edge_cases"),
    "3b": ("bbox_preprocess",),
    "4": ("masker",),
    "4b": ("train_fix",),
    "5": ("checkpoint_layout", "randomisation_layers"),
    "7": ("wsol",),
    "8": ("score",),
    "9": ("sanity",),
    "10": ("blur",),
}
"""Section of the golden README -> names of its files."""

UNTAGGED = ("edge_cases", "checkpoint_layout", "randomisation_layers")
"""The JSON files; every other name comes once per tag."""


def golden_name(path: Path) -> str:
    """``criterion`` of ``criterion_a.npz``, ``edge_cases`` of ``edge_cases.json``."""
    return path.stem if path.suffix == ".json" else path.stem.rpartition("_")[0]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder: Path = metafunc.config.getoption("--golden") or Path(__file__).with_name("golden")
    only: str | None = metafunc.config.getoption("--golden-only")
    if not folder.is_dir():
        raise pytest.UsageError(f"--golden {folder}: no such folder")
    sections = only.split(",") if only else list(SECTIONS)
    if unknown := [section for section in sections if section not in SECTIONS]:
        raise pytest.UsageError(f"--golden-only {','.join(unknown)}: sections are {','.join(SECTIONS)}")

    if "golden_path" in metafunc.fixturenames:
        files = chosen_files(folder, sections if only else None)
        metafunc.parametrize("golden_path", files, ids=[path.name for path in files])
    if "golden_section" in metafunc.fixturenames:
        metafunc.parametrize("golden_section", [(folder, section) for section in sections], ids=sections)


def test_every_array_agrees(golden_path: Path) -> None:
    check_file(golden_path)


def test_no_file_is_missing(golden_section: tuple[Path, str]) -> None:
    check_section(*golden_section)


def chosen_files(folder: Path, sections: list[str] | None) -> list[Path]:
    """The files of the named sections; all of them, also those that belong to no section, when none is named."""
    files = sorted(path for path in folder.iterdir() if path.name != "README.md")
    if sections is None:
        return files
    names = {name for section in sections for name in SECTIONS[section]}
    return [path for path in files if golden_name(path) in names]


def check_file(path: Path) -> None:
    """Run the checker of one file; raises AssertionError when it has none, disagrees, or leaves an array unread."""
    assert path.suffix in (".npz", ".json"), f"{path.name} is neither .npz nor .json: nothing reads it"
    name = golden_name(path)
    assert any(name in group for group in SECTIONS.values()), f"{path.name} has no checker: no section names {name!r}"
    golden = load_golden(path)
    importlib.import_module(f"tests.golden_checks.{name}").check(golden)
    assert not golden.unread(), f"{path.name}: no checker read {golden.unread()}"


def check_section(folder: Path, section: str) -> None:
    """No file of a section is missing from the folder: its JSON files, and every other file in every tag there is."""
    present = {path.name for path in folder.iterdir()}
    tags = {path.stem.rpartition("_")[2] for path in folder.glob("*.npz")} or {"*"}
    missing = []
    for name in SECTIONS[section]:
        files = {f"{name}.json"} if name in UNTAGGED else {f"{name}_{tag}.npz" for tag in tags}
        missing += sorted(files - present)
    assert not missing, f"section {section}: {folder} lacks {', '.join(missing)}"
