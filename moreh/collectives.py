"""Collectives of torch.distributed that have other names in releases before 2.13."""

from typing import Any

import torch.distributed as dist

# `getattr` with a default: torch 2.11 and 2.12 have only the older names, with the same arguments.
all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Gathers a tensor of each rank into one tensor."""
reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""Sums a tensor over the ranks, and leaves each rank its part."""
