"""Which modules of a classifier the model-randomisation check randomises, at a chosen depth (paper, section 4)."""

from __future__ import annotations

from torch import nn


def randomisable_modules(model: nn.Module, depth: int = 2) -> list[str]:
    """Names of the modules that own parameters, cut off at ``depth`` levels of nesting, in the order of registration.

    Depth 1 gives the stages of a ResNet, depth 2 (the published choice) its blocks, depth 3 the layers within.  A
    module without children stands for itself at any depth.  The check goes through the list from its end, the output.
    """
    if depth < 1:
        raise ValueError(f"randomisation depth {depth}: use 1 or more")
    names = []
    for name, child in model.named_children():
        if not any(True for _ in child.parameters()):
            continue
        if depth == 1 or not any(True for _ in child.children()):
            names.append(name)
        else:
            names += [f"{name}.{inner}" for inner in randomisable_modules(child, depth - 1)]
    return names
