"""Code shared by the training scripts. It is part of the repository, not of the installed package."""
