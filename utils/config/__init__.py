"""The settings of a run: what they are (`schema`), how they are read (`yaml_file`) and how they are documented."""
