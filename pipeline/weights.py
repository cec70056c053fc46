"""A classifier's own weights: from a file, from an object store, or from the hub of its library."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data import store
from pipeline.errors import UsageError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
MOST_BYTES = 64 << 30
"""A larger object is no classifier's state dict."""


def is_weight_file(weights: str) -> bool:
    """Whether ``weights`` names a file or an object, and not weights of a hub."""
    return store.is_remote(weights) or Path(weights).suffix in SUFFIXES or Path(weights).exists()


def weights_of(source: str, name: str, weights: str) -> dict[str, Tensor]:
    """The state dict that ``weights`` names: a file, a URI such as ``s3://bucket/my.pt``, or hub weights of the model.

    Raises:
        UsageError: it cannot be had, or is no state dict.
    """
    return read_state_dict(weights) if is_weight_file(weights) else hub_weights(source, name, weights)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a file or a URI: safetensors, or a PyTorch file read with ``weights_only=True``.

    Raises:
        UsageError: no such file, or it holds something else.
        StoreError: the object store does not answer.
    """
    if store.is_remote(str(path)):
        place = store.place_of(str(path))
        with tempfile.TemporaryDirectory() as folder:
            here = fetched(place, Path(folder))
            try:
                return {name: value.clone() for name, value in read_state_dict(here).items()}
            except UsageError as error:
                raise UsageError(str(error).replace(str(here), place)) from error
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"--weights {path}: no such file; give a .safetensors or .pt state dict")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(
            f"--weights {path}: not a readable state dict ({str(error).splitlines()[0]}); save one with "
            "safetensors.torch.save_file(model.state_dict(), ...)"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UsageError(f"--weights {path}: holds no state dict; save model.state_dict() alone")
    return {name.removeprefix("module."): value for name, value in loaded.items()}


def fetched(place: str, folder: Path) -> Path:
    """A file in ``folder`` with the content of an object.

    Raises:
        UsageError: there is none, or it is not allowed.
        StoreError: the store does not answer.
    """
    path = folder / f"weights{Path(place).suffix}"
    try:
        path.write_bytes(store.read_bytes(place, most=MOST_BYTES))
    except store.ReadError as error:
        raise UsageError(f"--weights {place}: cannot be read ({error}); check the name and the permissions") from error
    return path


def load_weights(classifier: nn.Module, state: Mapping[str, Tensor], *, where: str) -> list[str]:
    """Load ``state``; a head of another size is left out and named in the returned list.

    Raises:
        UsageError: a tensor is missing, unknown, or of another shape elsewhere than in the head.
    """
    own = classifier.state_dict()
    linear = [name for name, module in classifier.named_modules() if isinstance(module, nn.Linear)]
    head = tuple(f"{linear[-1]}.{part}" for part in ("weight", "bias")) if linear else ()
    left_out = [name for name in head if name in state and name in own and state[name].shape != own[name].shape]
    usable = {name: value for name, value in state.items() if name not in left_out}
    wrong = [
        f"{name} has shape {tuple(value.shape)} instead of {tuple(own[name].shape)}"
        for name, value in usable.items()
        if name in own and value.shape != own[name].shape
    ]
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in own]
    for trouble, names in (("misfits", wrong), ("lacks", missing), ("has unknown", unknown)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UsageError(
                f"{where} {trouble} {names[0]}{more}; check that --init and --init-arg name its architecture"
            )
    classifier.load_state_dict(usable, strict=False)
    return left_out


def hub_weights(source: str, name: str, weights: str) -> dict[str, Tensor]:
    """Weights from the model hub of torchvision (``weights``: a name of its enumeration, or ``DEFAULT``) or timm.

    Raises:
        UsageError: no such weights, or the hub cannot be reached.
    """
    try:
        if source == "timm":
            import timm

            arguments: dict[str, Any] = {} if weights == "DEFAULT" else {"pretrained_cfg": weights}
            return dict(timm.create_model(name, pretrained=True, **arguments).state_dict())
        from torchvision.models import get_model_weights

        return dict(get_model_weights(name)[weights].get_state_dict(progress=True, check_hash=True))
    except KeyError as error:
        raise UsageError(f"--weights {weights}: {source} has no such weights for {name}") from error
    except Exception as error:
        raise UsageError(
            f"--weights {weights}: cannot be fetched from {source}'s hub ({str(error).splitlines()[0]}); "
            "download the state dict elsewhere and give its file"
        ) from error
