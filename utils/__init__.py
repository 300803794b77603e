"""What the training scripts share and the reader of a loop need not see. Not installed: it belongs to the checkout."""
