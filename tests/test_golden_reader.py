"""The golden test itself fails when an array, a file or a checker is missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.golden_checks._golden import load_golden
from tests.golden_mutation import main as count_unnoticed
from tests.test_golden import check_file, check_section, chosen_files

NUMBERS = Path(__file__).with_name("golden")


@pytest.fixture
def blur(tmp_path: Path) -> Path:
    """A folder with one file, under a tag that nobody has heard of."""
    return Path(shutil.copy(NUMBERS / "blur_a.npz", tmp_path / "blur_new.npz"))


def test_any_tag_is_found(blur: Path) -> None:
    assert chosen_files(blur.parent, None) == [blur] == chosen_files(blur.parent, ["10", "1"])
    assert load_golden(blur).tag == "new"
    check_file(blur)
    check_section(blur.parent, "10")


def test_an_array_that_nobody_reads_fails(blur: Path) -> None:
    with np.load(blur) as arrays:
        np.savez(blur, **{**arrays, "extra": np.zeros(3)})
    with pytest.raises(AssertionError, match=r"no checker read \['extra'\]"):
        check_file(blur)


def test_a_changed_value_fails(blur: Path) -> None:
    with np.load(blur) as arrays:
        np.savez(blur, **{**arrays, "out_1": arrays["out_1"] + np.float32(1e-4)})
    with pytest.raises(AssertionError, match="out_1"):
        check_file(blur)


@pytest.mark.parametrize("name", ["stranger_new.npz", "stranger.json", "notes.txt"])
def test_a_file_that_nobody_reads_fails(blur: Path, name: str) -> None:
    stranger = blur.rename(blur.with_name(name))
    assert stranger in chosen_files(blur.parent, None)
    with pytest.raises(AssertionError, match=r"no checker|nothing reads it"):
        check_file(stranger)


def test_a_named_section_must_be_there_in_every_tag(blur: Path) -> None:
    with pytest.raises(AssertionError, match=r"lacks criterion_new\.npz"):
        check_section(blur.parent, "1")
    shutil.copy(NUMBERS / "tv_a.npz", blur.with_name("tv_other.npz"))
    with pytest.raises(AssertionError, match=r"lacks tv_new\.npz"):
        check_section(blur.parent, "2")
    with pytest.raises(AssertionError, match=r"lacks checkpoint_layout\.json, randomisation_layers\.json"):
        check_section(blur.parent, "5")


def test_no_change_of_the_small_files_goes_unnoticed() -> None:
    assert count_unnoticed(["--golden", str(NUMBERS), "--golden-only", "2,3b,10"]) == 0
