"""Where the nodes of an ONNX Runtime session run: what a provider has no kernel for goes to the next one without a word.

In the end that is the CPU, and images and maps then travel between the two memories in every run.  Arithmetic on sizes
alone stays on the CPU on purpose, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import UsageError

if TYPE_CHECKING:
    import onnx

RECORD_PLACEMENT = "session.record_ep_graph_assignment_info"
"""The entry of a session's options, "1", without which ONNX Runtime does not tell."""

_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_NAMED = 3


class Placed(NamedTuple):
    """A node and the provider that ONNX Runtime gave it to."""

    name: str
    operator: str
    provider: str
    """ONNX Runtime's name, such as `CPUExecutionProvider`."""


def placements(session: Any) -> list[Placed]:
    """Every node of a session made with `RECORD_PLACEMENT`, as the graph was when the providers shared it out."""
    return [
        Placed(node.name, node.op_type, part.ep_name)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]


def strays(placed: Iterable[Placed], provider: str, sizes: Collection[str]) -> list[Placed]:
    """The nodes that run elsewhere than on ``provider``.

    ``sizes``: names of the nodes that may (`size_arithmetic`).  What TensorRT leaves to CUDA stays on the card, and
    counts only when it is a multiplication.
    """
    elsewhere = [node for node in placed if node.provider != provider and node.name not in sizes]
    if provider == "TensorrtExecutionProvider":
        return [n for n in elsewhere if n.provider != "CUDAExecutionProvider" or n.operator in _PRODUCTS]
    return elsewhere


def size_arithmetic(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes whose results follow from the sizes of values, and not from what is in them."""
    known = {tensor.name for tensor in model.graph.initializer}
    names = set()
    for node in model.graph.node:  # in the order in which they run
        if node.op_type in ("Shape", "Size") or all(name in known for name in node.input if name):
            names.add(node.name)
            known.update(node.output)
    return names


def check_placement(session: Any, provider: str, path: Path, load: Callable[[], onnx.ModelProto]) -> None:
    """Make sure that all of a graph runs on ``provider`` (ONNX Runtime's name).

    ``load`` reads the graph, when there is a node to explain.

    Raises:
        UsageError: some node does not; names a few of them.
    """
    placed = placements(session)
    if all(node.provider == provider for node in placed):
        return
    found = strays(placed, provider, size_arithmetic(load()))
    if found:
        some = ", ".join(f"{node.operator} {node.name!r}" for node in found[:_NAMED])
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        where = " and ".join(sorted({node.provider for node in found}))
        raise UsageError(
            f"{path}: ONNX Runtime has no kernel on {provider} for {some}{more}, and runs them on {where}; use a graph "
            "of another precision, or --provider cpu"
        )
