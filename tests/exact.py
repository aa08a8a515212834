"""What ONNX Runtime's own kernels compute exactly on this processor."""

from lifecycle.engines.native.library import adds_bytes_exactly

WEIGHT_BITS = 8 if adds_bytes_exactly() else 7
"""Of row-wise and static weights; without VNNI sums of 8 bits overflow, which models are warned of."""
MOST = 2 ** (WEIGHT_BITS - 1) - 1
"""The largest magnitude of such a weight."""
