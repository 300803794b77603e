"""The grid of ranks, the sharding of each parameter, and conversions between full tensors and shards.

- `mesh`: the ranks as a grid of pipeline, data and tensor parallelism, and the device of their messages.
- `spec`: how one parameter is sharded; `placement` makes the specs of a model from its plan.
- `shards`: the boxes of full tensors that each rank holds, and where its local tensors have them.
- `gather`: full tensors from shards.
- `local_weights`: models whose weights stay in the checkpoint's files until each rank has read its shards.
  `lazy_parameters` shows their parameters in the dtypes that they are to have.
- `user_view`: sharded parameters as the script and its optimizer see them, whole.
  `global_tensor` has their classes (`global_classes`) and what operations do (`global_ops`), `global_layout` says what
  a rank has of them.
- `rng`: random numbers that differ between ranks where they must, and are the same where they must be.
"""
