"""The MoAI Accelerator: its flavors, the registry of accelerators and jobs, the CUDA face and the memory ledger.

`flavors`, `state_files`, `registry` and `job_status` do not import torch, so that the command-line tools start at once.
"""
