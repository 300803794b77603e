"""Checkpoints of sharded models: transformers model directories, and training states to resume from.

- `hf_save` writes a model byte for byte as `save_pretrained` of one worker does. `hf_save_plan` finds out the files and
  tensors, `safetensors_writer` writes them tensor by tensor.
- `training_state` saves a training run, and resumes it under any plan. `optimizer_state` is its part for optimizers,
  `dcp_tensors` describes shards to torch.distributed.checkpoint, `dcp_io` writes and reads them.
"""
