"""What the paper's own code calls things: run options, final settings, checkpoint keys (paper, sections 2 and 3)."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, Literal, NamedTuple

from pipeline.errors import UsageError
from pipeline.masker import Upsampling
from pipeline.objectives import SideConfig
from pipeline.spec import MaskerSpec

CHECKPOINT_KEYS = (
    "epoch",
    "state_dict_classifier",
    "state_dict_masker",
    "optimizer_classifier",
    "optimizer_masker",
    "args",
)
LEGACY_MASKER_KEY = "state_dict_decoder"
"""Name of ``state_dict_masker`` in the predecessor's files; the tensors inside have the same names."""

LEARNED_TAU = "final.tau"
"""Name of a learned temperature among a masker's tensors; the release never makes one."""
CHANNELS = {0: 64, 1: 256, 2: 512, 3: 1024, 4: 2048}
"""Channels of ResNet-50's maps."""

REQUIRED_OPTIONS = ("train_json", "val_json", "output_path")
DEFAULT_OPTIONS: dict[str, Any] = {
    "name": "random",
    "log_buffer": 10,
    "workers": 4,
    "epochs": 60,
    "batch_size": 128,
    "perc_of_training": 0.2,
    "do_val": False,
    "lr": 0.001,
    "lr_casme": 0.001,
    "lrde": 20,
    "momentum": 0.9,
    "weight_decay": 0.0001,
    "upsample": "nearest",
    "fixed_classifier": False,
    "prob_historic": 0.5,
    "save_freq": 1000,
    "actual_save_freq": 1,
    "f_size": 30,
    "resnet_path": None,
    "lambda_r": None,
    "lambda_tv": None,
    "masker_use_layers": "0,1,2,3,4",
    "mask_in_criterion": "none",
    "mask_in_criterion_config": "",
    "mask_in_objective_direction": "maximize",
    "mask_in_objective_type": "entropy",
    "mask_in_weight": 1.0,
    "mask_in_lambda_r": 10,
    "mask_in_lambda_tv": None,
    "mask_out_criterion": "none",
    "mask_out_criterion_config": "",
    "mask_out_objective_direction": "maximize",
    "mask_out_objective_type": "entropy",
    "mask_out_weight": 1.0,
    "mask_out_lambda_r": 10,
    "mask_out_lambda_tv": None,
    "reproduce": "",
    "add_prob_layers": False,
    "prob_sample_low": 0.25,
    "prob_sample_high": 0.75,
    "prob_loss_func": "l1",
    "add_class_ids": False,
    "apply_gumbel": False,
    "apply_gumbel_tau": 0.1,
    "gumbel_output_mode": "hard",
    "casms_path": "",
    "log_path": "",
    "infiller_model": None,
    "do_infill_for_mask_in": 0,
    "do_infill_for_mask_out": 0,
}

_FINAL = {
    "batch_size": 72,
    "mask_out_criterion": "crossentropy",
    "mask_out_criterion_config": "",
    "mask_out_objective_direction": "maximize",
    "mask_out_objective_type": "entropy",
    "mask_in_criterion": "crossentropy",
    "mask_in_criterion_config": "",
    "mask_in_objective_direction": "maximize",
    "mask_in_objective_type": "classification",
    "mask_in_lambda_r": 1.0,
    "lambda_tv": 0.001,
}
FINAL_OPTIONS: dict[Literal["fix", "ca"], dict[str, Any]] = {
    "fix": {
        **_FINAL,
        "mask_out_lambda_r": 10.0,
        "fixed_classifier": True,
        "prob_historic": 0.0,
        "save_freq": 100_000_000,
    },
    "ca": {**_FINAL, "mask_out_lambda_r": 15.0, "fixed_classifier": False, "prob_historic": 0.5, "save_freq": 100},
}
"""Option files of the paper's final models (rows I and J of its table)."""
FINAL_COMMAND_LINE = {"masker_use_layers": "3,4", "epochs": 60, "lrde": 20}
"""What their command lines added."""


class Sides(NamedTuple):
    """The criteria of a published run; None where a side is off."""

    mask_in: SideConfig | None
    mask_out: SideConfig | None


def published_sides(options: Mapping[str, Any]) -> Sides:
    """The criteria that run options ask for; options that are not named have the published defaults."""
    return Sides(_side(options, "in"), _side(options, "out"))


def _side(options: Mapping[str, Any], side: Literal["in", "out"]) -> SideConfig | None:
    chosen = {**DEFAULT_OPTIONS, **options}
    if chosen[f"mask_{side}_criterion"] == "none":
        return None
    # lambda_r and lambda_tv without a side's name are for both sides
    lambda_tv = chosen["lambda_tv"] if chosen["lambda_tv"] is not None else chosen[f"mask_{side}_lambda_tv"]
    return SideConfig(
        side=side,
        objective=chosen[f"mask_{side}_objective_type"],
        direction=chosen[f"mask_{side}_objective_direction"],
        lambda_area=chosen["lambda_r"] if chosen["lambda_r"] is not None else chosen[f"mask_{side}_lambda_r"],
        lambda_tv=lambda_tv or 0.0,
        area_distance=chosen["prob_loss_func"],
    )


def published_layers(options: Mapping[str, Any]) -> tuple[int, ...]:
    """The tapped layers of ResNet-50, 0 the finest.

    Raises:
        UsageError: the option names no such layers.
    """
    text = str({**DEFAULT_OPTIONS, **options}["masker_use_layers"])
    try:
        layers = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        layers = ()
    if not layers or not set(layers) <= set(CHANNELS):
        raise UsageError(
            f"masker_use_layers {text!r} names no layers of ResNet-50; expected numbers 0 to 4 such as '3,4'"
        )
    return layers


def published_masker(options: Mapping[str, Any], *, tensors: Container[str] = ()) -> MaskerSpec:
    """The masker that run options ask for; ``tensors``: names in its state dict.

    Raises:
        UsageError: an option has a value that the published code does not know.
    """
    chosen = {**DEFAULT_OPTIONS, **options}
    modes: tuple[Upsampling, ...] = ("nearest", "bilinear")
    if chosen["upsample"] not in modes:
        raise UsageError(f"upsample {chosen['upsample']!r} is not known; expected nearest or bilinear")
    concrete = None
    if chosen["apply_gumbel"]:
        if chosen["gumbel_output_mode"] not in ("hard", "soft", "sigmoid", "logits"):
            raise UsageError(f"gumbel_output_mode {chosen['gumbel_output_mode']!r} is not known; expected hard")
        tau = chosen["apply_gumbel_tau"]
        try:
            tau = float(DEFAULT_OPTIONS["apply_gumbel_tau"] if tau is None else tau)
        except (TypeError, ValueError):
            tau = 0.0
        if not (tau > 0 or tau == -1):
            raise UsageError(
                f"apply_gumbel_tau {chosen['apply_gumbel_tau']!r} is no temperature; expected a number above 0, or -1"
            )
        learned = tau == -1 and LEARNED_TAU in tensors
        if tau == -1 and not learned:
            # The release takes -1 for a temperature like any other: there is no learned one.  Its trained masks, other than
            # soft ones, do not depend on it.
            if chosen["gumbel_output_mode"] == "soft":
                raise UsageError(
                    "apply_gumbel_tau -1 without a learned temperature (final.tau) is a temperature of -1, which soft masks "
                    "cannot have; give a checkpoint that was trained with another"
                )
            tau = DEFAULT_OPTIONS["apply_gumbel_tau"]
        concrete = {
            "mode": chosen["gumbel_output_mode"],
            "temperature": None if learned else tau,
            "shown": "mode",
        }
    return MaskerSpec(
        target_area=bool(chosen["add_prob_layers"]),
        class_conditional=bool(chosen["add_class_ids"]),
        concrete=concrete,
        upsampling=chosen["upsample"],
    )
