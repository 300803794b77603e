"""What is known of transformers' models: architectures, families, parts, and models that cannot be split into parts."""
