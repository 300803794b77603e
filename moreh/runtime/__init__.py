"""The runtime, which runs a plan on the workers.

`engine` is what the hook calls. It uses, from the top down: `batch` (micro-batches), `tensor` and `pipeline`
(parallelism), `checkpoint`, `launch` (the workers), `sharding` (who holds which part of a parameter) and `kernels`.
"""
