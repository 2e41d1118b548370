"""Local kernels of the dispatch: one front (``ops``), a torch reference, faster backends beside it.

Import ``moe_locality.kernels.ops``; nothing is loaded here.
"""
