"""From a source of prompt-response pairs to batches: records -> pairs -> token ids and labels -> padded batches."""
