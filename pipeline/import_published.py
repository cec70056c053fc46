"""Published checkpoints become bundles: `python -m pipeline.import_published CHECKPOINT.chk --out BUNDLE`.

Reads the layout of the paper's code (`ca.chk`, `fix.chk`) and of its predecessor.  Checkpoints are pickles, and a pickle can
hold a program: the reader takes tensors, plain containers, numbers, names and `argparse.Namespace`, and refuses a file
that asks for anything else without running any of it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli import Parser, run
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipeline.model import SaliencyModel
    from pipeline.spec import ModelSpec

INPUT_SIZE = 224
IMAGENET_CLASSES = 1000
MOST_CLASSES = 100_000
"""A file that claims more is damaged or hostile: a network of its size is made before its tensors are read."""


def parser() -> Parser:
    p = Parser("pipeline.import_published", "Turn a checkpoint of the paper's own code into a model bundle.")
    p.add_argument("checkpoint", type=Path, metavar="CHECKPOINT.chk", help="ca.chk, fix.chk, or a predecessor's file")
    p.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="folder of the bundle")
    p.add_argument(
        "--classifier",
        type=Path,
        metavar="FILE",
        help="ResNet-50 state dict (safetensors or PyTorch) in place of the checkpoint's own classifier",
    )
    return p


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    from pipeline.bundle import save_bundle

    checkpoint = read_checkpoint(arguments.checkpoint)
    model, spec = from_checkpoint(checkpoint, where=str(arguments.checkpoint), classifier=arguments.classifier)
    digest = save_bundle(arguments.out, model, spec)
    layers = ",".join(str(tap.layer) for tap in spec.backbone.taps)
    print(
        f"{arguments.out}: ResNet-50, masker on layers {layers}, {spec.backbone.outputs} classes, sha256 {digest[:16]}"
    )
    if ignored := spec.training["ignored_options"]:
        print(f"options without a meaning here: {', '.join(ignored)}")
    if left_out := spec.training["left_out"]:
        print(f"left out: {', '.join(left_out)}")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The dictionary in a checkpoint file, under the published names, ``args`` as a plain dict.

    Raises:
        UsageError: no such file, not a checkpoint, one that holds code, or one with keys that nothing here accounts for.
    """
    import torch

    from pipeline.published import CHECKPOINT_KEYS, LEGACY_MASKER_KEY

    if not path.is_file():
        raise UsageError(f"{path}: no such file; give a checkpoint of the paper's code, such as ca.chk")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes the reader raise
        if found := re.search(r"GLOBAL ([\w.]+)|class ([\w.]+)", str(error)):
            asked = found[1] or found[2]
            raise UsageError(f"{path} is refused: it asks for {asked}, and a checkpoint holds data only") from error
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UsageError(f"{path} is not a readable PyTorch checkpoint ({reason}); download it again") from error
    if not isinstance(checkpoint, dict):
        raise UsageError(f"{path} holds a {type(checkpoint).__name__} and not a checkpoint's dictionary; give ca.chk")

    checkpoint = _plain_dictionary(checkpoint)
    if LEGACY_MASKER_KEY in checkpoint and "state_dict_masker" not in checkpoint:
        checkpoint["state_dict_masker"] = checkpoint.pop(LEGACY_MASKER_KEY)
    if unknown := sorted(str(key) for key in set(checkpoint) - set(CHECKPOINT_KEYS)):
        raise UsageError(f"{path} has unknown keys {', '.join(unknown)}; known are {', '.join(CHECKPOINT_KEYS)}")
    if "state_dict_masker" not in checkpoint:
        raise UsageError(f"{path} holds no masker (state_dict_masker or {LEGACY_MASKER_KEY}); give ca.chk or fix.chk")
    checkpoint["args"] = _plain_options(checkpoint.get("args"), path)
    if not isinstance(checkpoint.get("epoch"), int | None):
        raise UsageError(
            f"{path}: its epoch is a {type(checkpoint['epoch']).__name__} and not a number; download it again"
        )
    return checkpoint


def _plain_options(args: object, path: Path) -> dict[str, Any]:
    """The run options of a checkpoint, which model.json has to hold."""
    options = vars(args) if isinstance(args, argparse.Namespace) else {} if args is None else args
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise UsageError(f"{path}: its args are a {type(args).__name__} and not options by name; download it again")
    options = _plain_dictionary(options)
    for name, value in options.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"{path}: option {name} is {value!r:.40}, which is no plain value; download it again"
            ) from error
    return options


def _plain_dictionary(mapping: dict[Any, Any]) -> dict[Any, Any]:
    """The entries alone: a file may give an OrderedDict attributes of its own in the place of its methods."""
    return dict(dict.items(mapping))


def from_checkpoint(
    checkpoint: Mapping[str, Any], *, where: str, classifier: Path | None = None
) -> tuple[SaliencyModel, ModelSpec]:
    """The model in a checkpoint (of `read_checkpoint`), in eval mode, and its description.

    ``classifier``: a file whose weights take the place of the checkpoint's own classifier.

    Raises:
        UsageError: no classifier, an unknown option value, or a tensor missing, unknown or of another shape.
    """
    import torch

    from pipeline import backbone, published
    from pipeline.masker import default_mask_size
    from pipeline.model import SaliencyModel, build_masker
    from pipeline.spec import BackboneSpec, ModelSpec

    state = checkpoint.get("state_dict_classifier") if classifier is None else _read_classifier(classifier)
    whose = f"{where}: state_dict_classifier" if classifier is None else f"--classifier {classifier}"
    if not isinstance(state, dict) or "fc.weight" not in state:
        place = where if classifier is None else whose
        raise UsageError(f"{place} holds no ResNet-50 classifier; name its state dict with --classifier FILE")
    options, head = checkpoint["args"], state["fc.weight"]
    if not isinstance(head, torch.Tensor) or head.ndim != 2 or not len(head) or not _is_whole(head):
        raise UsageError(f"{whose}: fc.weight is no matrix of weights; download it again")
    outputs = len(head)
    if outputs > MOST_CLASSES:
        raise UsageError(
            f"{whose}: fc.weight has {outputs} classes, and at most {MOST_CLASSES} are read; download it again"
        )
    network = backbone.create_classifier("torchvision", "resnet50", outputs=outputs, arguments={})
    _load(network, state, whose)
    maps = backbone.pyramid("torchvision", network, INPUT_SIZE)
    taps = backbone.choose_taps(maps, published.published_layers(options))
    tapped = backbone.tap_classifier("torchvision", network, taps, last_map=maps[-1].module)
    masker_spec = published.published_masker(options, tensors=checkpoint["state_dict_masker"])
    mask_size = default_mask_size(INPUT_SIZE)
    masker = build_masker(masker_spec, tapped, mask_size=mask_size, classes=outputs)
    _load(masker, checkpoint["state_dict_masker"], f"{where}: state_dict_masker")

    joint = not options.get("fixed_classifier", published.DEFAULT_OPTIONS["fixed_classifier"])
    class_names, data_classes = _class_names(outputs)
    paths = [name for name in options if name.endswith(("_path", "_json"))]
    known = [name for name in published.DEFAULT_OPTIONS if name in options and name not in paths]
    left_out = [name for name in ("optimizer_classifier", "optimizer_masker") if checkpoint.get(name) is not None]
    left_out += ["state_dict_classifier"] if classifier and checkpoint.get("state_dict_classifier") is not None else []
    spec = ModelSpec(
        backbone=BackboneSpec(
            source="torchvision",
            name="resnet50",
            outputs=outputs,
            taps=taps,
            batchnorm="train" if joint else "eval",
        ),
        masker=masker_spec,
        preset="published",
        input_size=INPUT_SIZE,
        mask_size=mask_size,
        geometry="crop",
        mean=backbone.IMAGENET_MEAN,
        std=backbone.IMAGENET_STD,
        class_names=class_names,
        data_classes=data_classes,
        class_index=list(range(outputs)),
        training={
            "source": Path(where).name,
            "classifier": "the checkpoint's own" if classifier is None else classifier.name,
            "epochs": checkpoint.get("epoch"),
            "options": {name: options[name] for name in known},
            "ignored_options": sorted(set(options) - set(published.DEFAULT_OPTIONS) - set(published.REQUIRED_OPTIONS)),
            "left_out": [*left_out, *(f"option {name}" for name in paths)],
        },
    )
    return SaliencyModel(backbone=tapped, masker=masker).eval(), spec


def _class_names(outputs: int) -> tuple[list[str], list[str]]:
    """Names of the logits, and of the folders of a data set that has those classes: ImageNet's, where there are 1000."""
    if outputs != IMAGENET_CLASSES:
        names = [str(k) for k in range(outputs)]
        return names, names
    from timm.data.imagenet_info import ImageNetInfo
    from torchvision.models import ResNet50_Weights

    return list(ResNet50_Weights.IMAGENET1K_V1.meta["categories"]), list(ImageNetInfo("imagenet-1k").label_names())


def _read_classifier(path: Path) -> dict[str, Tensor]:
    from pipeline.weights import read_state_dict

    try:
        return read_state_dict(path)
    except UsageError as error:
        raise UsageError(str(error).replace("--weights", "--classifier", 1)) from error
    except TypeError as error:  # a dictionary whose methods the file has overwritten
        raise UsageError(f"--classifier {path}: holds no state dict; save model.state_dict() alone") from error


def _load(network: nn.Module, state: Any, what: str) -> None:
    """Load every tensor of ``state``, and nothing else; counters of batches, which old files lack, may be missing."""
    from torch import Tensor

    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in dict.values(state)):
        raise UsageError(f"{what} is no dictionary of tensors; download the checkpoint again")
    state = _plain_dictionary(state)
    own = network.state_dict()
    misfits = [
        f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    strange = [str(name) for name in state if name not in own]
    for trouble, names in (
        ("has unknown tensors", strange),
        ("lacks", missing),
        ("has other shapes", misfits),
        ("has tensors that are no finite numbers", _unusable(state) if not strange and not misfits else []),
    ):
        if names:
            listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise UsageError(f"{what} {trouble}: {listed}; its options (args) must be those it was trained with")
    network.load_state_dict(state, strict=False)


def _unusable(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold other than finite numbers; their shapes, and so their sizes, are known to be right."""
    return [
        name
        for name, value in state.items()
        if not _is_whole(value) or not _is_real(value) or not bool(value.isfinite().all())
    ]


def _is_real(value: Tensor) -> bool:
    """Whether it holds plain real numbers: not complex ones, nor ones of less than two bytes that stand for others."""
    plain = value.element_size() > 1 or not value.is_floating_point()
    return plain and not value.is_complex() and not value.is_quantized


def _is_whole(value: Tensor) -> bool:
    """Whether a tensor has a number in memory for each of its places: a file may claim a size without holding it."""
    import torch

    if value.layout != torch.strided or value.is_meta:
        return False
    return value.untyped_storage().nbytes() >= value.numel() * value.element_size()


if __name__ == "__main__":
    run(main, "pipeline.import_published")
