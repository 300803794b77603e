"""What reaches a terminal: text without escapes, and streams that cannot be written."""
