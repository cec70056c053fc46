"""From a model bundle to one deployable graph, to ONNX and TensorRT, behind a parity gate."""
