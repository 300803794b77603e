"""The settings of a run: their declaration (`schema`), reader (`yaml_file`) and documentation (`markdown`)."""
