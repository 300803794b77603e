"""Pipeline parallelism: a stage computes some layers of a model through the model's own forward pass.

- `stage.py`: a stage, with the model's other parts replaced by stubs while it computes.
- `stubs.py`: the stubs.
- `lean_stage.py`: torch's PipelineStage with receive buffers only for micro-batches in flight.
"""
