"""Faster operations for the models of transformers: kernels, precision, recomputation, memory reuse.

Nothing here changes results by more than rounding. Nothing here depends on plans or ranks.
"""
