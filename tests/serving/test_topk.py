"""Masks of the best classes: a column that is there when it is asked for, and what the model itself says of each class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.bundle import load_bundle
from pipeline.data.decode import read_image
from pipeline.data.geometry import fit
from pipeline.errors import UsageError
from serving import codec
from serving.class_masks import open_with_masks
from serving.job import BatchRequest, prepare
from serving.rows import SCHEMA, schema
from tests.serving.conftest import SIZE, make_bundle, write_images

CLASSES = 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("engine") / "conditional", seed=2, class_conditional=True)


def test_every_row_has_the_masks_that_the_model_gives_for_its_best_classes(
    conditional: Path, score_here: Callable[..., Any], tmp_path: Path
) -> None:
    source = write_images(tmp_path / "in", 9)
    (source / "none.jpg").write_bytes(b"never an image")
    plain = rows_of(score_here(conditional, source, tmp_path / "plain"))
    output = score_here(conditional, source, tmp_path / "out", topk=CLASSES)
    assert output.schema.equals(schema(CLASSES), check_metadata=False)
    assert schema(CLASSES).names == [*SCHEMA.names, "topk"] and schema(0) is SCHEMA
    rows = rows_of(output)
    model = load_bundle(conditional).model.eval()
    for uri, row in rows.items():
        assert {name: row[name] for name in SCHEMA.names} == plain[uri], "the other columns are what they are without"
        if row["status"] == "error":
            assert row["topk"] is None
            continue
        image = torch.from_numpy(fit(read_image(uri), SIZE, "squash")[0]).permute(2, 0, 1)[None] / 255.0
        x = (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        with torch.no_grad():
            best = torch.softmax(model(x)[0].double(), 1).topk(CLASSES)
        assert [one["label"] for one in row["topk"]] == best.indices[0].tolist()
        assert [one["score"] for one in row["topk"]] == pytest.approx(best.values[0].tolist(), abs=1e-5)
        assert (row["topk"][0]["label"], row["topk"][0]["mask"]) == (row["label"], row["mask"])
        for one in row["topk"]:
            with torch.no_grad():
                mask = model(x, labels=torch.tensor([one["label"]]))[1][0, 0].numpy()
            assert np.abs(codec.decode_mask(one["mask"]).astype(int) - codec.quantize(mask)).max() <= 1
            alike = codec.of_class(row, one["label"])
            assert np.array_equal(codec.stored(alike), codec.decode_mask(one["mask"]))
            assert (alike["score"], alike["class_name"]) == (one["score"], f"class {one['label']}")
            assert alike["box"] == codec.box(alike) and alike["area"] == codec.area(alike)
    scored = [row for row in rows.values() if row["status"] == "ok"]
    assert any(row["topk"][0]["mask"] != row["topk"][1]["mask"] for row in scored), "classes differ"
    with pytest.raises(ValueError, match=r"no mask of class 99; the row has those of \["):
        codec.of_class(scored[0], 99)
    with pytest.raises(ValueError, match="no mask of class 1; the row has those of no class"):
        codec.of_class(next(iter(plain.values())), 1)


def test_asking_for_class_masks_is_another_version(conditional: Path, images: Path, tmp_path: Path) -> None:
    def version(**request: Any) -> str:
        asked = BatchRequest(engine=str(conditional), input=str(images), output=str(tmp_path / "out"), **request)
        return prepare(asked, dry=True).version.id

    assert len({version(), version(topk=2), version(topk=3)}) == 3


def test_an_engine_without_class_masks_is_refused(bundle: Path, onnx_engine: Path) -> None:
    with pytest.raises(UsageError, match="--topk 2: this masker is not class-conditional"):
        open_with_masks(str(bundle), topk=2, provider="cpu", threads=1)
    with pytest.raises(UsageError, match=r"predicted class only; export it with 'python -m export.onnx --topk 2'"):
        open_with_masks(str(onnx_engine), topk=2, provider="cpu", threads=1)


def rows_of(output: pa.Table) -> dict[str, dict[str, Any]]:
    return {row["uri"]: row for row in output.to_pylist()}
