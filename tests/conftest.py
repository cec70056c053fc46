"""Fixtures that every room's tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", type=Path, default=None, help="folder of golden values (default: tests/golden)")
    parser.addoption(
        "--golden-only", default=None, help="comma-separated sections of the golden README, such as 1,1c,2"
    )


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real photographs and weights, which are never part of the repository.

    ``$ONEPASS_SHARED``, else ``shared`` beside the repository.  Without it a test is skipped by name, and fails in CI.
    """
    folder = Path(os.environ.get("ONEPASS_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        message = f"needs the folder of real photographs and weights; {folder} is missing (set ONEPASS_SHARED)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder
