"""Text and token ids: tokenizers, the template of a prompt, control tokens in texts, and the text of an answer."""
