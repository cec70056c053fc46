"""Explain an artefact of this project: what it is, what made it, whether it is whole, and whether it runs here.

FILE is a bundle folder (or the run or Triton folder around a model), an .onnx file, an engine (.plan), its manifest
(.plan.json), a parity report or weights.  Exits 1 when it cannot be used on this machine, and says what to do.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from export.engine import PLAN_SUFFIXES
from export.files import file_sha256
from export.gpu import gpus
from export.manifest import Manifest, manifest_path, parse_manifest, read_sidecar
from pipeline.cli import Parser, run
from pipeline.errors import UsageError, WorkError


def parser() -> Parser:
    """The command's flags."""
    flags = Parser("export.doctor", __doc__ or "")
    flags.add_argument("file", metavar="FILE", help="a bundle folder, an .onnx file, a .plan file or its manifest")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """Print what there is to say."""
    path = Path(parser().parse_args(argv).file)
    if not path.exists():
        raise UsageError(f"{path}: no such file; give a bundle folder, an .onnx file, a .plan file or its manifest")
    lines, trouble = examine(path)
    print(*lines, sep="\n")
    if trouble:
        raise WorkError(trouble)
    print("verdict: alright, and usable here")


def examine(path: Path) -> tuple[list[str], str | None]:
    """What there is to say of ``path``, and why it cannot be used here, if it cannot."""
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".onnx":
        return _graph(path)
    if path.suffix in PLAN_SUFFIXES:
        return _plan(path)
    if path.suffix == ".json":
        return _manifest_file(path)
    if path.suffix == ".safetensors":
        kind = "training images, for calibration and parity" if path.stem == "samples" else "weights"
        return [f"{path}: {kind} ({_size(path)})"], f"{path} is part of a bundle; give the folder that it lies in"
    if path.name.endswith(".parity.html"):
        return [
            f"{path}: a parity report ({_size(path)}), to be opened in a browser; its figures are in the JSON"
        ], None
    return [f"{path}: unknown kind of file ({_size(path)})"], (
        f"{path} is nothing that this project writes; give a bundle folder, an .onnx file or a .plan file"
    )


def _folder(path: Path) -> tuple[list[str], str | None]:
    if (path / "bundle").is_dir() and not (path / "model.json").exists():
        lines, trouble = _bundle(path / "bundle")
        return [f"{path}: the folder of a training run; its result is the bundle inside", *lines], trouble
    if (path / "config.pbtxt").is_file():
        models = [model for name in ("model.onnx", "model.plan") if (model := path / "1" / name).is_file()]
        lines = [f"{path}: a model folder for Triton; put it into the server's model repository"]
        if not models:
            return lines, f"{path}/1 holds no model; make the folder again with 'python -m export.trt --triton'"
        lines.append(f"  serves      {models[0].name} ({_size(models[0])})")
        if models[0].suffix == ".plan" and not manifest_path(models[0]).is_file():
            return [
                *lines,
                "  not looked into: this folder is of an earlier release, which wrote no manifest there",
            ], None
        inside, trouble = examine(models[0])
        return [*lines, *inside], trouble
    return _bundle(path)


def _bundle(path: Path) -> tuple[list[str], str | None]:
    from pipeline.bundle import load_bundle

    lines = [f"{path}: a folder"]
    try:
        bundle = load_bundle(path)
    except UsageError as error:
        return lines, str(error)
    spec = bundle.spec
    lines = [
        f"{path}: a model bundle, preset {spec.preset}",
        f"  classifier  {spec.backbone.source}:{spec.backbone.name}, {spec.backbone.outputs} classes",
        f"  input       {spec.input_size} pixels, {spec.geometry}; mask {spec.mask_size} cells",
        f"  taps        {', '.join(f'{tap.module} ({tap.height} cells)' for tap in spec.backbone.taps)}",
        f"  samples     {0 if bundle.samples is None else len(bundle.samples)} (for calibration and parity)",
        f"  sha256      {bundle.sha256}",
        f"  next        python -m export.onnx --model {path} --out model.onnx",
    ]
    return lines, None


def _graph(path: Path) -> tuple[list[str], str | None]:
    from export.engine import open_engine

    lines = [f"{path}: an ONNX file ({_size(path)}), sha256 {file_sha256(path)}"]
    try:
        import onnx

        model = onnx.load(path)
    except Exception as error:  # protobuf's errors have no public base
        return (
            lines,
            f"{path} is no readable ONNX file ({' '.join(str(error).split())[:120]}); it is damaged: export again",
        )
    counts = Counter(node.op_type for node in model.graph.node)
    opsets = ", ".join(f"{entry.domain or 'onnx'} {entry.version}" for entry in model.opset_import)
    lines += [
        f"  opset       {opsets}",
        f"  nodes       {', '.join(f'{count} {name}' for name, count in counts.most_common(8))}",
        f"  weights     {_types(model)}",
    ]
    try:
        engine = open_engine(path)
    except UsageError as error:
        return lines, str(error)
    lines += describe_manifest(Manifest.model_validate(engine.info.manifest))
    lines.append(f"  runs on     {engine.info.provider} through ONNX Runtime")
    return lines, None


def _types(model) -> str:
    """Bytes of the weights by type."""
    import onnx

    sizes: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        sizes[onnx.TensorProto.DataType.Name(tensor.data_type).lower()] += tensor.ByteSize()
    return ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.most_common() if size >= 50_000) or "none"


def _plan(path: Path) -> tuple[list[str], str | None]:
    from export.backend import load_backend
    from export.plan_engine import PlanEngine, check_file, check_fit

    lines = [f"{path}: a TensorRT engine ({_size(path)})"]
    try:
        lines += describe_manifest(read_sidecar(path))
        manifest = check_file(path)
        assert manifest.backend is not None
        lines.append("  file        whole: size and sha256 are those of its manifest")
        backend = load_backend(manifest.backend)
        lines.append(f"  {backend.name} here: {backend.version}")
        check_fit(path, manifest, backend.version, gpus()[0] if gpus() else None)
        PlanEngine(path)
    except (UsageError, WorkError) as error:
        return lines, str(error)
    lines.append(f"  runs on     {gpus()[0].name}")
    return lines, None


def _manifest_file(path: Path) -> tuple[list[str], str | None]:
    engine = path.with_suffix("")
    if path.name == "model.json" and (path.parent / "model.safetensors").is_file():
        return _bundle(path.parent)
    if path.name.endswith(".parity.json"):
        return _report(path)
    try:
        manifest = parse_manifest(path.read_text(encoding="utf-8"), path, "give the engine instead")
    except (UsageError, OSError, UnicodeDecodeError) as error:
        return [f"{path}: a JSON file ({_size(path)})"], f"{path} is no engine manifest ({error})"
    lines = [f"{path}: an engine manifest"]
    if engine.is_file():
        inside, trouble = examine(engine)
        return [*lines, *inside], trouble
    return (
        [*lines, *describe_manifest(manifest)],
        f"its engine {engine.name} is not beside it; copy it, or rebuild it with '{manifest.rebuild}'",
    )


def _report(path: Path) -> tuple[list[str], str | None]:
    """The figures of a parity report."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        errors = [error["message"] for error in record["errors"]]
        lines = [
            f"{path}: a parity report of {record['engine']} ({record['precision']}, run by {record['kind']} on "
            f"{record['provider']})",
            f"  against     {record['model']}, on {record['figures']['n_images']} images of {record['images']}",
            *(f"  note        {note}" for note in record["notes"]),
            f"  verdict     {'passed' if record['passed'] else '; '.join(errors)}",
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [
            f"{path}: a JSON file ({_size(path)})"
        ], f"{path} is no parity report ({error!r}); run export.parity again"
    return lines, None if record["passed"] else f"{record['engine']} failed the parity gate; see {path.stem}.html"


def describe_manifest(manifest: Manifest) -> list[str]:
    """A manifest in words."""
    lines = [
        f"  made        {manifest.created} from the bundle {manifest.bundle_sha256[:16]} ({manifest.architecture}, "
        f"preset {manifest.preset})",
        f"  precision   {manifest.precision}"
        + (f" ({manifest.precision_details['name']})" if "name" in manifest.precision_details else ""),
        f"  in          {', '.join(f'{port.name} {port.dtype} {port.shape}' for port in manifest.inputs)}",
        f"  out         {', '.join(f'{port.name} {port.dtype} {port.shape}' for port in manifest.outputs)}",
    ]
    if manifest.backend:
        built = manifest.versions.get(manifest.backend, "unknown")
        where = manifest.gpu or "a machine without a GPU"
        profiles = "; ".join(f"{p.min} to {p.max}, best at {p.opt}" for p in manifest.profiles)
        lines += [f"  built with  {manifest.backend} {built} on {where}", f"  batches     {profiles}"]
        lines.append(f"  made for    {', '.join(manifest.compute_capabilities) or 'the default GPUs of its backend'}")
    if manifest.calibration:
        seen = manifest.calibration
        lines.append(f"  calibrated  on {seen.images} images of {seen.source} ({seen.method})")
    if manifest.parity:
        found = manifest.parity
        names = [
            name
            for name in ("n_images", "mask_mean_abs", "mask_iou", "top1_strict_agreement", "dLE")
            if name in found.figures
        ]
        figures = ", ".join(f"{name} {found.figures[name]:.4g}" for name in names)
        lines.append(f"  parity      {'passed' if found.passed else 'FAILED'}, run by {found.ran_on}: {figures}")
    if manifest.throughput:
        rates = manifest.throughput["images_per_second"].items()
        said = ", ".join(f"{rate} images/s in batches of {batch}" for batch, rate in rates)
        lines.append(f"  measured    {said} ({manifest.throughput['on']})")
    lines.append(f"  rebuild     {manifest.rebuild}")
    return lines


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"


if __name__ == "__main__":
    run(main, "export.doctor")
