"""The MoAI Accelerator: its flavors, the registry of accelerators and jobs, and the memory that a job uses.

- `devices`, `flavors`: kinds of devices and sizes of accelerators, from data sheets
- `registry`, `state_files`: which accelerators there are, and which job runs on which
- `job_status`: what a running job reports of itself
- `job`: the job that this process is
- `job_device`: this process's job as the device that the CUDA face shows
- `memory`: the memory ledger and the simulated out-of-memory error

`devices`, `flavors`, `registry`, `state_files` and `job_status` import no torch, so that the command-line tools start
at once.
"""
