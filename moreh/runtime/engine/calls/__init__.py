"""Calls of a model and the use of their results: logits, and `backward()` once, several times or never."""
