"""The report: one file that needs nothing else, whatever is known of the images."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import UsageError
from pipeline.evaluate import Evaluation, run_evaluation
from pipeline.report import COLUMNS, EXTREME, TILE, TYPICAL, figure_table, gallery, heat, write_report
from tests.pipeline._evaluation import planted_data, untrained_bundle


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    data = planted_data(tmp_path_factory.mktemp("planted"))
    return run_evaluation(untrained_bundle(Path("untrained")), data, progress=False)


class Addresses(HTMLParser):
    """Collects what a page would load or lead to, and checks that tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "data", "srcset")]
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(page: str) -> Addresses:
    addresses = Addresses()
    addresses.feed(page)
    assert not addresses.open
    return addresses


def test_the_page_stands_alone(evaluation: Evaluation, tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    write_report(evaluation, path)
    page = path.read_text(encoding="utf-8")
    addresses = parsed(page)
    assert all(address.startswith("data:image/jpeg;base64,") for address in addresses.found)
    assert not re.search(r"url\(|@import|https?://", page)
    cards = min(TYPICAL, len(evaluation.rows)) + 2 * EXTREME
    assert len(addresses.found) == 4 * cards
    assert path.stat().st_size < 3_000_000
    for words in ("centre box", "CAM", "Typical", "Worst", "PxAP", "prefers-color-scheme", "bootstrap"):
        assert words in page


def test_best_and_worst_are_in_order(evaluation: Evaluation) -> None:
    groups = {title: cards for title, _, cards in gallery(evaluation)}

    def ious(title: str) -> list[float]:
        return [float(card.note.rpartition(" ")[2]) for card in groups[title]]

    assert ious("Best") == sorted(ious("Best"), reverse=True)
    assert ious("Worst") == sorted(ious("Worst"))
    assert ious("Worst")[-1] <= ious("Best")[-1]
    assert [card.title for card in groups["Typical"]] == [card.title for card in gallery(evaluation)[0][2]]


def test_without_truth_the_page_shows_what_is_known(evaluation: Evaluation, tmp_path: Path) -> None:
    shutil.copytree(Path(evaluation.examples.images.root) / "val", tmp_path / "val")
    blind = run_evaluation(untrained_bundle(Path("untrained")), tmp_path, progress=False)
    write_report(blind, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    parsed(page)
    assert "Worst" not in page and "localisation error" not in page
    assert "PxAP" not in figure_table(blind.metrics, COLUMNS)["columns"]


def test_names_are_escaped(evaluation: Evaluation, tmp_path: Path) -> None:
    spec = evaluation.scorer.spec
    names = [f"<b>{name}" for name in spec.class_names]
    bundle = untrained_bundle(Path("untrained"))
    object.__setattr__(bundle, "spec", spec.model_copy(update={"class_names": names}))
    write_report(
        run_evaluation(bundle, Path(evaluation.examples.images.root), limit=3, progress=False), tmp_path / "report.html"
    )
    parsed((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_an_unwritable_place_is_named(evaluation: Evaluation) -> None:
    with pytest.raises(UsageError, match="/proc/none"):
        write_report(evaluation, "/proc/none/report.html")


def test_the_heat_follows_the_mask() -> None:
    image = np.full((TILE, TILE, 3), 128, dtype=np.uint8)
    mask = np.zeros((TILE, TILE), dtype=np.float32)
    mask[: TILE // 2] = 1
    overlay = heat(image, mask).astype(int)
    assert (overlay[0].sum(axis=1) > overlay[-1].sum(axis=1)).all()
