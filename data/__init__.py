"""The synthetic worlds; chat rows as tokens and loss mask; the tokenizer."""
