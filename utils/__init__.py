"""What the training scripts share and a reader of their loops need not see. Not installed: it belongs to the checkout."""
