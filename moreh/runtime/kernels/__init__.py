"""Faster computation of what a transformers model already does: kernels, precision, recomputation, memory reuse.

Nothing here changes results by more than rounding, and nothing knows of plans or ranks.
"""
