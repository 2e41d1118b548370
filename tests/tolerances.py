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

KERNEL_SUM = {"float32": (2e-6, 2e-6), "float16": (2e-3, 2e-3), "bfloat16": (1.6e-2, 1.6e-2)}
"""A kernel's sum of a few rows in float32 against float64: one rounding to the dtype at the end,
and Triton's interpreter truncates where a GPU rounds.
"""
