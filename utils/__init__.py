"""Code that the training scripts share. It is not installed with moreh: it belongs to the checkout."""
