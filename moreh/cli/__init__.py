"""The command-line tools: moreh-smi, moreh-switch-model, moreh-plan. They answer at once: none imports torch."""
