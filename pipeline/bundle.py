"""The model bundle: the only thing that crosses from training to evaluation, export and serving.

A folder with `model.safetensors`, `model.json` (`pipeline.spec.ModelSpec`) and, unless left out, `samples.safetensors`:
at most 256 training images, fitted to the input, as uint8 — the default for calibration and parity.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from pipeline.errors import UsageError
from pipeline.model import SaliencyModel, build_model
from pipeline.spec import FORMAT, ModelSpec

WEIGHTS_FILE = "model.safetensors"
SPEC_FILE = "model.json"
SAMPLES_FILE = "samples.safetensors"
MOST_SAMPLES = 256


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A loaded bundle."""

    path: Path
    spec: ModelSpec
    model: SaliencyModel
    """In eval mode, on the CPU, without gradients."""
    samples: np.ndarray | None
    """(n, S, S, 3) uint8 images as the network sees them, before normalisation."""
    sha256: str
    """Of `model.safetensors` followed by `model.json`."""


def save_bundle(path: str | Path, model: SaliencyModel, spec: ModelSpec, samples: np.ndarray | None = None) -> str:
    """Write the bundle folder ``path`` whole or not at all, replacing an older one; returns its SHA-256.

    ``samples``: (n, S, S, 3) uint8, of which the first 256 are kept.

    Raises:
        UsageError: ``path`` cannot be written, or is a folder that is no bundle.
    """
    path = Path(path)
    if path.exists() and not (path / SPEC_FILE).is_file() and any(path.iterdir()):
        raise UsageError(f"{path} exists and is no model bundle; give an empty or a new folder")
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        partial.mkdir(parents=True)
        state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
        save_file(state, partial / WEIGHTS_FILE, metadata={"format": FORMAT})
        (partial / SPEC_FILE).write_text(spec.model_dump_json(indent=1) + "\n", encoding="utf-8")
        if samples is not None:
            save_arrays({"images": np.ascontiguousarray(samples[:MOST_SAMPLES])}, partial / SAMPLES_FILE)
        digest = bundle_sha256(partial)
        if path.exists():
            shutil.rmtree(path)
        partial.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write the bundle {path}: {error.strerror or error}; give a writable --out") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return digest


def bundle_sha256(path: str | Path) -> str:
    """SHA-256 of a bundle's weights and description, without loading it."""
    digest = hashlib.sha256()
    for name in (WEIGHTS_FILE, SPEC_FILE):
        with (Path(path) / name).open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def read_spec(path: str | Path) -> ModelSpec:
    """The description of a bundle, without its weights.

    Raises:
        UsageError: no bundle there, or one of another format.
    """
    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"{path}: no such bundle folder; make one with 'python -m pipeline.train'")
    for name in (SPEC_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise UsageError(f"{path} is no whole bundle: {name} is missing; train or copy it again")
    try:
        fields = json.loads((path / SPEC_FILE).read_text(encoding="utf-8"))
        return ModelSpec.model_validate(fields)
    except (ValidationError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        detail = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        raise UsageError(f"{path / SPEC_FILE}: {detail}; this release reads {FORMAT}") from error


def load_bundle(path: str | Path) -> Bundle:
    """Read a bundle.

    Raises:
        UsageError: a file is missing, damaged, or does not fit its description.
    """
    path = Path(path)
    spec = read_spec(path)
    model = build_model(spec)
    try:
        model.load_state_dict(load_file(path / WEIGHTS_FILE), strict=True)
        samples = load_arrays(path / SAMPLES_FILE)["images"] if (path / SAMPLES_FILE).is_file() else None
    except (SafetensorError, RuntimeError, KeyError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{path}: weights or samples do not fit {SPEC_FILE} ({reason}); train or copy it again"
        ) from error
    model.eval().requires_grad_(False)
    return Bundle(path=path, spec=spec, model=model, samples=samples, sha256=bundle_sha256(path))
