"""One table of numerical bounds. Relaxing a row is a reviewed change, never a local fix in a test.

``(rtol, atol)`` per dtype name, for ``torch.testing.assert_close``.
"""

LAYER = {"float32": (1e-5, 1e-6), "bfloat16": (2e-2, 2e-2)}
"""Layer output and gradients against stock DeepSpeed: the order of sums inside a GEMM may differ
by row count.
"""

LOSS = {"float32": (1e-5, 1e-6), "bfloat16": (1e-2, 1e-2)}
"""Training losses of two runs that compute the same function."""

LOGITS = {"float32": (1e-4, 1e-5), "bfloat16": (3e-2, 3e-2)}
"""Logits of a whole small model before and after a change of placement."""
