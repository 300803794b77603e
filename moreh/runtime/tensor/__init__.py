"""Tensor parallelism: ranks split the matrices of each layer, and with sequence parallelism the sequences between them.

- `blocks.py`: which matrices of a layer are split, from the family's record or transformers' plan.
- `partition.py`: what that makes of a model's parameters, and which models are refused.
- `apply.py`: the hooks that let a model compute with its rank's parts.
- `collectives.py`: the communication, with its transposes for the backward pass.
- `vocab_parallel.py`: token embedding, logits and loss of a split vocabulary.
"""
