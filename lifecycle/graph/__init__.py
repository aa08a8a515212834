"""From a checkpoint to an ONNX graph: builder, quantisation, checks, hardware targets."""
