"""Knowledge of transformers' models: architectures, families, parts, and unsupported models."""
