"""Pipeline parallelism: a stage computes some layers of a model through the model's own forward pass.

- `stage.py`: a stage. While it computes, stubs replace the model's other parts.
- `stubs.py`: the stubs.
- `lean_stage.py`: torch's PipelineStage with receive buffers only for the micro-batches in flight.
"""
