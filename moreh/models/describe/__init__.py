"""The architecture of a model, from its name, its configuration or the built model.

- `from_source.py`: from what a user gives: a file, a directory or a name.
- `from_config.py`: from a configuration, for families that are planned without transformers.
- `from_module.py`, `from_layer.py`: from a built model.
- `with_lora.py`: with LoRA adapters, from the architecture without.
"""
