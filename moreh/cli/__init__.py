"""The command-line tools: moreh-smi, moreh-switch-model, moreh-plan.

They answer at once: none imports torch, but to ask for GPUs where a driver of GPUs is installed.
"""
