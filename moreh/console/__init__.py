"""Terminal output: text without escape sequences, and streams that cannot be written."""
