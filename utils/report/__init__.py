"""report.html of a run: one file that opens without a network, renewed while the run goes on."""
