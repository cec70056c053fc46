"""From a bundle to an ONNX graph, through PyTorch's exporter."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING

from pipeline.errors import UsageError

if TYPE_CHECKING:
    import onnx

    from export.graph import GraphConfig
    from pipeline.bundle import Bundle

DEFAULT_OPSET = 20
"""Newer ones gain nothing for fp32, fp16 and int8, and ONNX Runtime's static quantiser reads at most this one."""
OPSETS = range(18, 24)
MOST_DYNAMIC = 65536
LEAST_SIDE = 64
"""Smallest height and width with ``--dynamic-size``: two cells of a network of stride 32."""


def trace(bundle: Bundle, config: GraphConfig, opset: int) -> onnx.ModelProto:
    """The bundle's deployable graph as a checked ONNX model, tidied (`export.tidy`).

    Raises:
        UsageError: the classifier cannot be exported as asked.
    """
    import onnx
    import torch

    from export.graph import DeployableGraph, example_images
    from export.tidy import tidy

    graph = DeployableGraph(model=bundle.model, spec=bundle.spec, config=config).eval()
    names = ("batch", "height", "width")
    dynamic = {0: torch.export.Dim("batch", min=1, max=MOST_DYNAMIC)}
    if config.resize or config.dynamic_size:
        least = 1 if config.resize else LEAST_SIDE
        dynamic |= {axis: torch.export.Dim(names[axis], min=least, max=MOST_DYNAMIC) for axis in (1, 2)}
    try:
        with quiet():
            program = torch.onnx.export(
                graph,
                (example_images(bundle.spec, config),),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=["image"],
                output_names=config.output_names,
                dynamic_shapes={"image": dynamic},
            )
        assert program is not None
        model = tidy(program.model_proto)
        fixed = [names[axis] for axis, dim in enumerate(shape_of_image(model)) if axis in dynamic and not dim.dim_param]
        if fixed:
            raise ValueError(f"it only works for one {' and one '.join(fixed)}")
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the exporter, the decompositions and the checker each raise their own
        name = f"{bundle.spec.backbone.source}:{bundle.spec.backbone.name}"
        reason = " ".join(str(error).split())[:300]
        hint = "leave --dynamic-size out" if config.dynamic_size else "try another --opset, or another backbone"
        raise UsageError(f"{name} cannot be exported ({type(error).__name__}: {reason}); {hint}") from error
    model.producer_name, model.doc_string = "onepass-saliency", ""
    return model


def shape_of_image(model: onnx.ModelProto) -> list[onnx.TensorShapeProto.Dimension]:
    """The dimensions of the graph's input."""
    return list(model.graph.input[0].type.tensor_type.shape.dim)


@contextmanager
def quiet():
    """Silence what the exporter reports of its own steps; errors still come as exceptions."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
