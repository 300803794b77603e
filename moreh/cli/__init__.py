"""The command-line tools. They read and write the registry's files and never import torch, so they answer at once."""
