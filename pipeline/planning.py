"""From the command line of `pipeline.train` to a `TrainingPlan`: everything that can be wrong is found here, before a worker starts."""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import statistics
from pathlib import Path
from typing import Any

from pipeline.backbone import create_classifier, default_normalisation
from pipeline.data import store
from pipeline.data.annotations import Annotations
from pipeline.data.decode import ImageError
from pipeline.data.images import Images
from pipeline.data.packed import PackedStrings, packed_numbers
from pipeline.data.splits import Split, read_split
from pipeline.errors import UsageError, WorkError
from pipeline.settings import configure
from pipeline.training import TrainingPlan, build
from pipeline.validation import NEED_BOXES, NEED_MASKS
from pipeline.weights import is_weight_file, read_state_dict

LARGEST_DEFAULT = 224
MOST = 2**31 - 1
"""No number of a command line is larger."""
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def plan_training(arguments: argparse.Namespace) -> TrainingPlan:
    """The plan for the parsed ``arguments`` of `pipeline.train`.

    Raises:
        UsageError: what is wrong, where, and what to do.
    """
    check_ranges(arguments)
    settings = [*arguments.set]
    if arguments.size_target is not None:
        settings.append(f"price.target={arguments.size_target}")
    if arguments.fill:
        settings.append(f"fill={arguments.fill}")
    if arguments.layers:
        settings.append(f"layers={parse_layers(arguments.layers)}")
    preset = configure(arguments.preset, settings)
    source, name = parse_init(arguments.init)
    init_arguments = dict(parse_argument(text) for text in arguments.init_arg)
    split = read_split(arguments.data, "train", per_class=arguments.per_class, seed=arguments.seed)
    class_map = read_class_map(arguments.class_map, split.classes) if arguments.class_map else None
    outputs = max(len(split.classes), 2)
    if class_map is not None:
        known = read_class_names(arguments.class_names) if arguments.class_names else None
        outputs = len(known) if known else head_size(source, name, init_arguments, arguments.weights)
        index = [class_map[folder] for folder in split.classes]
        beyond = [k for k in index if k >= outputs]
        if beyond:
            raise UsageError(
                f"--class-map {arguments.class_map}: index {beyond[0]}, but the classifier has {outputs} outputs"
            )
        names = known or [f"class {k}" for k in range(outputs)]
        if not known:
            for folder, k in class_map.items():
                names[k] = folder
    else:
        index, names = list(range(len(split.classes))), [*split.classes, "(unused)"][:outputs]
        if len(split.classes) >= 2:
            names = list(split.classes)
    size = arguments.image_size or default_image_size(split)
    mean, std = normalisation(arguments, source, name, init_arguments)
    batch = arguments.batch_size or preset.batch_size
    if batch < 2:
        raise UsageError(f"--batch-size {batch}: BatchNorm needs at least 2 images a step")
    steps = arguments.steps or max(1, round(arguments.epochs * len(split.paths) / batch))
    validate_seconds, validate_steps = validation_interval(arguments, split, batch)
    plan = TrainingPlan(
        preset=preset.name,
        data=split.root,
        paths=PackedStrings(split.paths),
        labels=packed_numbers(index[label] for label in split.labels),
        data_classes=tuple(split.classes),
        class_index=tuple(index),
        class_names=tuple(names),
        source=source,
        name=name,
        arguments=init_arguments,
        weights=resolve_weights(arguments.weights),
        mean=mean,
        std=std,
        batchnorm=arguments.batchnorm or ("eval" if arguments.weights else "sync"),
        input_size=size,
        geometry=arguments.geometry,
        steps=steps if arguments.budget is None or arguments.steps else 10**9,
        budget=parse_time(arguments.budget, "--budget") if arguments.budget else None,
        batch_size=batch,
        seed=arguments.seed,
        settings=tuple(settings),
        precision=arguments.precision,
        checkpoint_seconds=parse_time(arguments.checkpoint_every, "--checkpoint-every"),
        validate_seconds=validate_seconds,
        validate_steps=validate_steps,
    )
    build(plan)  # whatever is wrong with the classifier, its weights or its layers is said now and not by a worker
    return plan


def check_ranges(arguments: argparse.Namespace) -> None:
    """Refuse numbers that no run can have.

    Raises:
        UsageError: which one.
    """
    least = {"steps": 1, "batch_size": 1, "seed": 0, "per_class": 1, "image_size": 8, "cpus_per_worker": 1}
    for name, smallest in least.items():
        value = getattr(arguments, name)
        if value is not None and value < smallest:
            raise UsageError(f"--{name.replace('_', '-')} {value}: give a number of at least {smallest}")
        if value is not None and value > MOST:
            raise UsageError(f"--{name.replace('_', '-')} {value}: give a number of at most {MOST}")
    if not 0 < arguments.epochs <= MOST:
        raise UsageError(f"--epochs {arguments.epochs:g}: give a number above 0 and of at most {MOST}")


def validation_interval(arguments: argparse.Namespace, split: Split, batch: int) -> tuple[float | None, int | None]:
    """Seconds or steps between validations; none of both where none is asked for.

    Raises:
        UsageError: there is nothing to validate on, or a figure to select by and no validation.
    """
    if arguments.validate_every is None:
        if arguments.select:
            raise UsageError(f"--select {arguments.select}: nothing is validated; add --validate-every epoch, or 10m")
        return None, None
    if arguments.validation_images < 1:
        raise UsageError(f"--validation-images {arguments.validation_images}: give a number of at least 1")
    by_epoch = arguments.validate_every == "epoch"
    seconds = None if by_epoch else parse_time(arguments.validate_every, "--validate-every")
    shown = read_split(split.root, "val", classes=split.classes)
    known = Annotations.of(split.root)
    if arguments.select in NEED_BOXES and not any(path in known.box_table for path in shown.paths):
        raise UsageError(
            f"--select {arguments.select}: {split.root} has no boxes.csv with pictures of val; add it, or select by top1"
        )
    if arguments.select in NEED_MASKS and (known.mask_folder is None or not known.mask_folder.is_dir()):
        raise UsageError(f"--select {arguments.select}: {split.root} has no folder masks/; add it, or select by top1")
    return seconds, max(1, round(len(split.paths) / batch)) if by_epoch else None


def parse_layers(text: str) -> str:
    """``3,4`` -> ``[3, 4]``; ``all`` and ``deep`` as they are."""
    if text in ("all", "deep"):
        return text
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise UsageError(f"--layers {text}: give numbers such as 3,4, or all, or deep")
    return f"[{text}]"


def parse_init(text: str) -> tuple[str, str]:
    """``resnet50`` -> (torchvision, resnet50); ``timm:NAME`` -> (timm, NAME)."""
    source, _, name = text.rpartition(":")
    if source not in ("", "torchvision", "timm") or not name:
        raise UsageError(f"--init {text}: give a torchvision name such as resnet50, or timm:NAME")
    return source or "torchvision", name


def parse_argument(text: str) -> tuple[str, Any]:
    """``K=V`` with V read as JSON where it is JSON, else as a string."""
    key, found, value = text.partition("=")
    if not found or not key.isidentifier():
        raise UsageError(f"--init-arg {text}: give NAME=VALUE, such as pad_type=same")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def parse_time(text: str, flag: str) -> float:
    """``90s``, ``30m``, ``2h``, ``1d`` or plain seconds -> seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if not match or float(match[1]) <= 0:
        raise UsageError(f"{flag} {text}: give a time such as 90s, 30m or 2h")
    return float(match[1]) * _UNITS[match[2] or "s"]


def parse_triple(text: str, flag: str) -> tuple[float, float, float]:
    """``R,G,B``."""
    try:
        r, g, b = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{flag} {text}: give three numbers such as 0.5,0.5,0.5") from error
    return r, g, b


def normalisation(
    arguments: argparse.Namespace, source: str, name: str, init_arguments: dict[str, Any]
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation: as given, else what the model's own weights were trained with."""
    default = default_normalisation(source, create_classifier(source, name, outputs=2, arguments=init_arguments))
    mean = parse_triple(arguments.mean, "--mean") if arguments.mean else default[0]
    std = parse_triple(arguments.std, "--std") if arguments.std else default[1]
    if min(std) <= 0 or max(*mean, *std) > 1.5:
        raise UsageError(f"--mean {mean} --std {std}: both are on the scale 0..1 and --std is above 0")
    return mean, std  # pyright: ignore[reportReturnType]


def resolve_weights(weights: str | None) -> str | None:
    """A file's absolute path; a URI, or the name of hub weights, as it is."""
    if weights and "://" in weights:
        return store.place_of(weights)
    return str(Path(weights).resolve()) if weights and Path(weights).exists() else weights


def head_size(source: str, name: str, init_arguments: dict[str, Any], weights: str | None) -> int:
    """Number of outputs of the classifier that ``weights`` belong to; 1000 where nothing tells."""
    if weights and is_weight_file(weights):
        state = read_state_dict(weights)
        classifier = create_classifier(source, name, outputs=1000, arguments=init_arguments)
        matrices = [
            k
            for k in classifier.state_dict()
            if k.endswith(".weight") and state.get(k) is not None and state[k].ndim == 2
        ]
        if matrices:
            return state[matrices[-1]].shape[0]
    return 1000


def read_class_map(path: str, folders: list[str]) -> dict[str, int]:
    """``folder,index`` rows of a CSV file; every folder of the training set must be there.

    Raises:
        UsageError: unreadable, a row without a number, or a folder without a row.
    """
    try:
        text = store.read_bytes(store.place_of(path)).decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except (store.ReadError, WorkError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(
            f"--class-map {path}: cannot be read ({error}); give a CSV with the columns folder,index"
        ) from error
    found: dict[str, int] = {}
    for line, row in enumerate(rows, start=2):
        folder, index = row.get("folder"), (row.get("index") or "").strip()
        if folder is None or not index.isdecimal():
            raise UsageError(
                f"--class-map {path}, line {line}: needs a folder and an index of 0 or more in the columns folder,index"
            )
        found[folder.strip()] = int(index)
    missing = [folder for folder in folders if folder not in found]
    if missing:
        raise UsageError(f"--class-map {path}: no row for the folder {missing[0]!r} of the training set; add it")
    return {folder: found[folder] for folder in folders}


def read_class_names(path: str) -> list[str]:
    """Names by output index: a JSON list, a JSON object by index (values: a name, or an object with `name`), or lines.

    Raises:
        UsageError: unreadable, or an index is missing.
    """
    try:
        text = store.read_bytes(store.place_of(path)).decode("utf-8-sig")
        values = json.loads(text) if Path(path).suffix == ".json" else text.splitlines()
        if isinstance(values, dict):
            values = [values[str(k)] for k in range(len(values))]
        names = [value["name"] if isinstance(value, dict) else str(value) for value in values]
    except (store.ReadError, WorkError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--class-names {path}: not a list of names ({error!r}); give JSON or one name a line"
        ) from error
    if len(names) < 2:
        raise UsageError(f"--class-names {path}: {len(names)} names; a classifier has at least 2 outputs")
    return names


def default_image_size(split: Split) -> int:
    """224, or the multiple of 32 nearest to the pictures' typical longer side where they are smaller.

    Raises:
        UsageError: none of the looked-at pictures can be decoded.
    """
    sides, last, images = [], None, Images(split.root)
    for k in range(0, len(split.paths), max(1, len(split.paths) // 32)):
        try:
            sides.append(max(images.image(split.paths[k]).shape[:2]))
        except ImageError as error:
            last = f"{split.paths[k]}: {error}"
    if not sides:
        raise UsageError(f"no picture of {split.root} can be decoded ({last}); check --data")
    typical = statistics.median(sides)
    return LARGEST_DEFAULT if typical >= LARGEST_DEFAULT else max(32, round(typical / 32) * 32)
