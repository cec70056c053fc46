"""Build a TensorRT engine with its manifest, and let the parity gate decide whether it may be used.

One strongly typed path for TensorRT 10.13 and later, 11.x and TensorRT-RTX: the precision is rewritten into the graph,
which is then compiled.  Written are OUT, OUT.json (manifest) and OUT.onnx (the very graph that was compiled).  Without
a GPU an engine can be built with TensorRT-RTX but not run: the gate then runs that graph in ONNX Runtime, and says so.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from export.precision import CALIBRATED, Name, Rewriter, Rewritten, add_judging, add_rewriting, use_modelopt
from export.trace import DEFAULT_OPSET, OPSETS
from pipeline.cli import Parser, run
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from export.backend import Backend
    from export.build import BuildConfig, Built
    from export.engine import Engine
    from export.gate_images import GateImages
    from export.judged import Judging
    from export.manifest import Manifest
    from export.source import Source

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
DEFAULT_BATCH = "1,8,64"


def parser() -> Parser:
    """The command's flags."""
    flags = Parser("export.trt", __doc__ or "")
    source = flags.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="BUNDLE", help="the bundle to export")
    source.add_argument("--onnx", metavar="FILE", help="a float32 graph of export.onnx, instead of a bundle")
    flags.add_argument("--out", required=True, metavar="FILE", help="where the engine goes, such as model.plan")
    precision = flags.add_mutually_exclusive_group()
    precision.add_argument("--precision", choices=PRECISIONS, help="default fp16")
    precision.add_argument("--fp16", action="store_true", help="the same as --precision fp16")
    precision.add_argument("--int8", action="store_true", help="the same as --precision int8")
    flags.add_argument(
        "--batch", action="append", metavar="MIN,OPT,MAX", help=f"a profile; may be repeated (default {DEFAULT_BATCH})"
    )
    flags.add_argument(
        "--backend", choices=["auto", "tensorrt", "tensorrt-rtx"], default="auto", help="what builds and runs it"
    )
    add_rewriting(flags)
    add_judging(flags)
    flags.add_argument("--search", action="store_true", help="raise the layers that hurt; prints the Pareto table")
    flags.add_argument("--opset", type=int, metavar="N", help=f"default {DEFAULT_OPSET}")
    flags.add_argument("--mask-dtype", choices=["float", "uint8"], help="default float; uint8: round(255 mask)")
    flags.add_argument("--workspace", type=int, metavar="MIB", help="most scratch memory (default: all that is free)")
    flags.add_argument("--opt-level", type=int, metavar="0..5", help="effort of the builder")
    flags.add_argument("--timing-cache", metavar="FILE", help="measured tactics, read and extended")
    flags.add_argument("--version-compatible", action="store_true", help="also for later TensorRT versions")
    flags.add_argument("--hardware-compat", choices=["none", "same_cc", "ampere+"], default="none", help="TensorRT")
    flags.add_argument("--compute-capability", default="", metavar="LIST", help="TensorRT-RTX: such as 8.6,8.9")
    flags.add_argument("--refit", action="store_true", help="weights can be exchanged later")
    flags.add_argument("--verify-only", action="store_true", help="build nothing; run the gate on OUT as it is")
    flags.add_argument("--triton", metavar="DIR", help="also write a model folder for Triton there")
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """Build, judge, write; or only judge."""
    arguments = parser().parse_args(argv)
    from export.files import check_local
    from export.judged import Judging

    check_local(arguments, "model", "onnx", "out", "parity_data", "calib_data", "timing_cache", "triton")
    out = Path(arguments.out)
    if out.suffix not in (".plan", ".engine", ".trt"):
        raise UsageError(f"--out {out}: the name has to end in .plan")
    for flag in ("opset", "mask_dtype"):
        if arguments.onnx is not None and getattr(arguments, flag) is not None:
            raise UsageError(f"--{flag.replace('_', '-')}: the graph of --onnx has it already; give it to export.onnx")
    if arguments.opset is not None and arguments.opset not in OPSETS:
        raise UsageError(f"--opset {arguments.opset}: use {OPSETS.start} to {OPSETS.stop - 1}")
    judging = Judging.of(arguments)
    if arguments.verify_only:
        verify_only(arguments, out)
        return
    words = ["python", "-m", "export.trt", *(argv if argv is not None else sys.argv[1:])]
    make(arguments, out, judging, rebuild=shlex.join(words))


def make(arguments: Any, out: Path, judging: Judging, *, rebuild: str) -> Manifest:
    """Build the engine that the flags ask for; returns its manifest."""
    from export.backend import load_backend
    from export.build import batch_sizes_of, build, check_config
    from export.files import ensure_writable
    from export.graph import GraphConfig
    from export.judged import check_source, judge_engine, serialise
    from export.source import calibration_images, open_source
    from export.throughput import measured
    from export.triton import check_folder, check_profiles

    name = graph_name(arguments)
    use_modelopt(name, arguments.quantiser, arguments.calib_method)  # refuses before any work
    config = build_config(arguments)
    backend = load_backend(arguments.backend)
    check_config(config, backend)
    ensure_writable(out)
    if config.timing_cache is not None:
        ensure_writable(config.timing_cache, "--timing-cache")
    if arguments.triton:
        if backend.name == "tensorrt":
            check_profiles(config.profiles)
        check_folder(Path(arguments.triton) / out.stem)
        ensure_writable(Path(arguments.triton) / out.stem / "config.pbtxt", "--triton")
    source = open_source(arguments, GraphConfig(mask_dtype=arguments.mask_dtype or "float"), arguments.opset)
    for option in ("resize", "dynamic_size"):
        if source.manifest.options.get(option):
            raise UsageError(
                f"{source.path} takes images of any size, but a plan is built for one; export it without "
                f"--{option.replace('_', '-')}"
            )
    print(f"source: {source.path} ({source.manifest.architecture}), {name} with {backend.name} {backend.version}")
    remarks = check_source(source, judging)
    calibration = calibration_images(source, arguments) if name in CALIBRATED else None
    rewritten, further = rewrite(arguments, name, source, calibration, backend, config, judging)
    remarks += further
    manifest = source.describe(rewritten, calibration, arguments.calib_method, rebuild=rebuild)
    graph = serialise(rewritten.model, manifest)
    built = build(graph, backend, config)
    print(f"built {len(built.plan) / 1e6:.1f} MB from {built.layers} layers in {built.seconds:.1f} s")
    manifest = describe_plan(manifest, graph, built, backend, config)
    engine, notes = open_built(out, graph, built, rewritten, manifest, judging)
    parity = judge_engine(
        engine, source, out, judging, calibration=calibration, notes=[*remarks, *built.notes, *notes], say=print,
        batches=batch_sizes_of(config.profiles),
    )  # fmt: skip
    rates = measured(engine, source.images(None, 8, "--parity-data").images, opt=manifest.profiles[0].opt)
    if engine.info.kind != "tensorrt":
        rates["on"] += (
            f": {'an emulation' if rewritten.stand_in is not None else 'the graph'}'s speed, not the engine's"
        )
    manifest = manifest.model_copy(update={"parity": parity, "throughput": rates})
    write_engine(out, graph, built.plan, manifest)
    print(f"wrote {out}, {out.name}.json and {out.name}.onnx")
    if arguments.triton:
        from export.triton import write_model_folder

        print(f"wrote {write_model_folder(Path(arguments.triton), out, manifest)}")
    return manifest


def graph_name(arguments: Any) -> Name:
    """The graph that the flags ask for, by its name."""
    wanted = "fp16" if arguments.fp16 else "int8" if arguments.int8 else arguments.precision or "fp16"
    name = "int8-tensorrt" if wanted == "int8" else wanted
    assert name in get_args(Name)
    return name


def build_config(arguments: Any) -> BuildConfig:
    """The builder's settings from the flags."""
    from export.build import BuildConfig, parse_profile

    return BuildConfig(
        profiles=tuple(parse_profile(text) for text in arguments.batch or [DEFAULT_BATCH]),
        workspace=arguments.workspace,
        opt_level=arguments.opt_level,
        timing_cache=Path(arguments.timing_cache) if arguments.timing_cache else None,
        version_compatible=arguments.version_compatible,
        hardware_compatibility=arguments.hardware_compat,
        compute_capabilities=tuple(part for part in arguments.compute_capability.split(",") if part),
        refit=arguments.refit,
    )


def rewrite(
    arguments: Any,
    name: Name,
    source: Source,
    calibration: GateImages | None,
    backend: Backend,
    config: BuildConfig,
    judging: Judging,
) -> tuple[Rewritten, list[str]]:
    """The graph in the wanted precision, after a search where one is asked for, and what has to be said about it."""
    from export.build import build
    from export.judged import check_rewriting, serialise
    from export.search import searched
    from export.verify import progress_bar

    with progress_bar(len(calibration.images) if calibration else 0, "calibration") as advance:
        rewriter = Rewriter(
            source.model, name, calibration=calibration, method=arguments.calib_method, progress=advance,
            keep_ops=[op for op in arguments.keep_fp32.split(",") if op], quantiser=arguments.quantiser,
        )  # fmt: skip
        if arguments.search:
            rewritten = searched(
                rewriter, source, judging, calibration=calibration,
                size_of=lambda model: len(build(serialise(model, source.manifest), backend, config).plan),
            )  # fmt: skip
        else:
            rewritten = rewriter.rewrite()
    return rewritten, check_rewriting(rewriter, rewritten, source, judging)


def describe_plan(manifest: Manifest, graph: bytes, built: Built, backend: Backend, config: BuildConfig) -> Manifest:
    """The plan's manifest, but for what the gate finds."""
    import hashlib

    from export.gpu import gpus

    here = gpus()[0] if gpus() else None
    capabilities = list(config.compute_capabilities)
    if backend.name == "tensorrt" and here is not None:
        capabilities = [here.compute_capability]
    return manifest.model_copy(
        update={
            "kind": "tensorrt",
            "onnx_sha256": hashlib.sha256(graph).hexdigest(),
            "engine_sha256": hashlib.sha256(built.plan).hexdigest(),
            "backend": backend.name,
            "profiles": list(config.profiles),
            "gpu": here.name if here else None,
            "compute_capabilities": capabilities,
            "versions": manifest.versions
            | {backend.name: backend.version}
            | ({"cuda driver": here.driver} if here else {}),
            "build": {
                "bytes": len(built.plan),
                "seconds": round(built.seconds, 2),
                "layers": built.layers,
                "workspace_mib": config.workspace,
                "opt_level": config.opt_level,
                "version_compatible": config.version_compatible,
                "hardware_compatibility": config.hardware_compatibility,
                "refit": config.refit,
                "notes": list(built.notes),
            },
        }
    )


def open_built(
    out: Path, graph: bytes, built: Built, rewritten: Rewritten, manifest: Manifest, judging: Judging
) -> tuple[Engine, list[str]]:
    """What the gate runs, before anything is written: the plan on a GPU, else the graph that it was compiled from."""
    from export.engine import OnnxEngine, default_threads
    from export.gpu import gpus
    from export.judged import serialise
    from export.verify import compiled_graph

    here = gpus()[0] if gpus() else None
    if here and (not manifest.compute_capabilities or here.compute_capability in manifest.compute_capabilities):
        from export.plan_engine import PlanEngine

        return PlanEngine(out, manifest=manifest, plan=built.plan), []
    judged = "the very graph that it was compiled from" if rewritten.stand_in is None else "an emulation of its graph"
    reason = f"no GPU here, so {out.name} was built and not run"
    if here is not None:
        reason = f"{out.name} was built for other cards than the {here.name} here, so it was not run"
    note = f"{reason}: judged {judged}, in ONNX Runtime on the CPU"
    data = graph if rewritten.stand_in is None else serialise(rewritten.stand_in, manifest)
    threads = judging.threads or default_threads()
    engine = OnnxEngine(compiled_graph(out), provider="cpu", threads=threads, data=data)
    return engine, [*rewritten.notes, note]


def write_engine(out: Path, graph: bytes, plan: bytes, manifest: Manifest) -> None:
    """Write plan, manifest and graph: all three or none."""
    from export.files import whole
    from export.manifest import manifest_path
    from export.verify import compiled_graph

    with whole(out) as plan_file, whole(manifest_path(out)) as manifest_file, whole(compiled_graph(out)) as graph_file:
        plan_file.write_bytes(plan)
        graph_file.write_bytes(graph)
        manifest_file.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")


def verify_only(arguments: Any, out: Path) -> None:
    """The gate on an engine that is there."""
    from export import parity

    if arguments.model is None:
        raise UsageError("--verify-only needs --model: the bundle that the engine is held against")
    words = ["--model", arguments.model, "--engine", str(out), "--images", str(arguments.parity_images)]
    for flag, value in (
        ("--data", arguments.parity_data),
        ("--max-drop", arguments.max_drop),
        ("--threads", arguments.threads),
    ):
        words += [flag, str(value)] if value is not None else []
    parity.main(words)


if __name__ == "__main__":
    run(main, "export.trt")
