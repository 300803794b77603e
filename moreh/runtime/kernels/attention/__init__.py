"""Attention of packed rows: over blocks of queries on the CPU, with variable-length kernels on GPUs."""
