"""What a driver must know of an engine, found out without loading it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pipeline.errors import UsageError


def engine_sha256(engine: str) -> str:
    """Hash of an engine file or a bundle.

    Raises:
        UsageError: there is none, or a plan is not the file that its manifest describes.
    """
    path = Path(engine)
    if path.is_dir():
        from pipeline.bundle import bundle_sha256, read_spec

        read_spec(path)
        return bundle_sha256(path)
    if not path.is_file():
        raise UsageError(f"--engine {engine}: no such file or bundle; give model.onnx, model.plan or a bundle folder")
    from export.engine import PLAN_SUFFIXES
    from export.files import file_sha256

    if path.suffix in PLAN_SUFFIXES:  # a worker would find it out too late, and tell it by Ray's tracebacks
        from export.plan_engine import check_file

        return str(check_file(path).engine_sha256)
    return file_sha256(path)


def engine_input(engine: str) -> tuple[int, Literal["squash", "crop"]]:
    """Side of the square that an engine takes, in pixels, and how pictures are fitted to it.

    Raises:
        UsageError: its description is missing or damaged.
    """
    path = Path(engine)
    if path.is_dir():
        from pipeline.bundle import read_spec

        spec = read_spec(path)
        return spec.input_size, spec.geometry
    if path.suffix == ".onnx":
        from export.engine import open_engine

        info = open_engine(path, provider="cpu", threads=1).info
        return info.input_size, info.geometry
    from export.manifest import read_sidecar

    manifest = read_sidecar(path)
    return manifest.input_size, manifest.geometry
