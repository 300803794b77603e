"""A check of this package on one GPU in a few minutes: `make gpu-check`, or `make gpu-smoke` for a shorter one.

python benchmarks/gpu_check [--dry] [--smoke] [--only PART ...]

It needs a checkout, torch and transformers: nothing is installed, nothing is fetched. Rows are docstrings of Python's
standard library, and models have random weights. Each part is a process of its own, so that an error of the device
ends that part only. `--dry` runs the same code with tiny sizes on the CPU.

- `__main__.py`: the command, the parts in their order, the time that is left.
- `isolation.py`: a part in its process, started again without the case that ended it.
- `child.py`: that process: it runs the cases of a part and writes a record of each.
- `report.py`: the records as JSON and as a table in Markdown.
- `settings.py`: sizes. `rows.py`: rows of docstrings.
- `parts/`: what is checked and measured.
- `stand_ins/`: used only where a package is missing.
"""
