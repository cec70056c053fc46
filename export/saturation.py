"""Whether this processor's int8 sums are exact, found out by computing one."""

from __future__ import annotations

from functools import cache

import numpy as np

PRODUCTS = 64


@cache
def sums_saturate() -> bool:
    """Whether ONNX Runtime's CPU kernels clip pairs of int8 products at 16 bits here: on x86 without VNNI they do.

    Its answer to that, the session option ``session.x64quantprecision``, costs the others more than half of their speed,
    and it does not look at the processor itself.
    """
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(np.full((PRODUCTS, PRODUCTS), 127, np.int8), "weights")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["values", "weights"], ["sums"])],
        "saturation",
        [helper.make_tensor_value_info("values", TensorProto.UINT8, [1, PRODUCTS])],
        [helper.make_tensor_value_info("sums", TensorProto.INT32, [1, PRODUCTS])],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"values": np.full((1, PRODUCTS), 255, np.uint8)})
    return bool((np.asarray(sums) != 255 * 127 * PRODUCTS).any())
