"""The engine: plans and shards a model, and computes the script's calls.

A call of a model goes from `hook` (one worker) or `multi_worker_hook` (several) through `fast_path` or `sharded.call`
to `model_runner`, which cuts the batch and lets `schedule` compute it on a `parallel_model`.
"""
