"""Text and token ids: tokenizers, prompt templates, control tokens, and decoded answers."""
