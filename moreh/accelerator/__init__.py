"""The MoAI Accelerator: its flavors, the registry of accelerators and jobs, and the memory that a job uses.

- `devices`, `flavors`: kinds of devices and sizes of accelerators, from data sheets
- `gpus`, `this_machine`: the GPUs that torch sees, and the accelerator that they are
- `registry`, `registry_content`, `state_files`: which accelerators there are, and which job runs on which
- `job_status`: what a running job reports of itself
- `job`: the job that this process is
- `job_device`: this process's job as the device that the CUDA face shows
- `memory`: the memory ledger and the simulated out-of-memory error

Only `job`, `job_device` and `memory` import torch, and `gpus` where a driver of GPUs is installed, so that the
command-line tools start at once.
"""
