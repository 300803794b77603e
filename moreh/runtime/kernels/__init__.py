"""Faster computation of what a transformers model already does: kernels, precision, recomputation, memory reuse.

Nothing here changes results by more than rounding. Nothing here depends on plans or ranks.
"""
