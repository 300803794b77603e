"""What is known of transformers' models: architectures, families, parts, what cannot be computed in parts."""
