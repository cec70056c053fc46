"""Export a bundle as one ONNX graph: uint8 NHWC image in, class logits and native mask out, any batch size.

The file is checked by onnx.checker, run by ONNX Runtime and held against torch (the parity gate) before it gets its
name; a file that fails is not written.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from export.precision import add_judging
from export.trace import DEFAULT_OPSET, OPSETS
from pipeline.cli import Parser, run
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from export.graph import GraphConfig
    from export.judged import Judging, Say
    from export.manifest import Manifest
    from pipeline.bundle import Bundle


def parser() -> Parser:
    """The command's flags."""
    flags = Parser("export.onnx", __doc__ or "")
    flags.add_argument("--model", required=True, metavar="BUNDLE", help="the bundle to export")
    flags.add_argument("--out", required=True, metavar="FILE", help="where the graph goes, such as model.onnx")
    flags.add_argument("--opset", type=int, default=DEFAULT_OPSET, metavar="N", help=f"default {DEFAULT_OPSET}")
    flags.add_argument("--mask-dtype", choices=["float", "uint8"], default="float", help="uint8: round(255 mask)")
    flags.add_argument("--upsampled", action="store_true", help="further output: the mask at the input's size")
    flags.add_argument("--topk", type=int, default=0, metavar="K", help="class-conditional maskers: K classes' masks")
    flags.add_argument("--target-area", type=float, metavar="A", help="maskers that take the wanted area: a share")
    flags.add_argument("--resize", action="store_true", help="take images of any size and resize inside the graph")
    flags.add_argument("--dynamic-size", action="store_true", help="run the network at the size of the image")
    add_judging(flags)
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """Export, check, write."""
    arguments = parser().parse_args(argv)
    from export.files import check_local, ensure_writable
    from export.graph import GraphConfig
    from export.judged import Judging
    from pipeline.bundle import load_bundle

    check_local(arguments, "model", "out", "parity_data")
    out = Path(arguments.out)
    if out.suffix != ".onnx":
        raise UsageError(f"--out {out}: the name has to end in .onnx")
    if arguments.opset not in OPSETS:
        raise UsageError(f"--opset {arguments.opset}: use {OPSETS.start} to {OPSETS.stop - 1}")
    judging = Judging.of(arguments)
    bundle = load_bundle(arguments.model)
    config = GraphConfig(
        mask_dtype=arguments.mask_dtype,
        upsampled=arguments.upsampled,
        resize=arguments.resize,
        dynamic_size=arguments.dynamic_size,
        topk=arguments.topk,
        target_area=arguments.target_area,
    )
    ensure_writable(out)
    words = ["python", "-m", "export.onnx", *(argv if argv is not None else sys.argv[1:])]
    manifest = export_onnx(
        bundle, out, config=config, opset=arguments.opset, judging=judging, rebuild=shlex.join(words),
        say=print,
    )  # fmt: skip
    size = out.stat().st_size / 1e6
    print(f"wrote {out} ({size:.1f} MB, opset {manifest.opset}, image {manifest.inputs[0].shape})")


def export_onnx(
    bundle: Bundle,
    out: str | Path,
    *,
    config: GraphConfig | None = None,
    opset: int = DEFAULT_OPSET,
    judging: Judging | None = None,
    rebuild: str | None = None,
    say: Say = str,
) -> Manifest:
    """Export ``bundle`` to the file ``out``, which appears only when it has passed the gate; returns its manifest.

    ``say`` is given each line worth printing.

    Raises:
        UsageError: ``out`` cannot be written, or the classifier cannot be exported as asked.
        ParityFailure: the graph does not answer as torch does; the report beside ``out`` says where.
    """
    from export.graph import GraphConfig
    from export.judged import Judging, write_judged
    from export.source import from_bundle

    out = Path(out)
    say(f"exporting {bundle.path} ({bundle.spec.backbone.source}:{bundle.spec.backbone.name})")
    rebuild = rebuild or shlex.join(["python", "-m", "export.onnx", "--model", str(bundle.path), "--out", str(out)])
    source = from_bundle(bundle, config=config or GraphConfig(), opset=opset, rebuild=rebuild)
    return write_judged(source.model, source.manifest, source, out, judging or Judging(), say=say)


if __name__ == "__main__":
    run(main, "export.onnx")
