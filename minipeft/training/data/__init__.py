"""Training data: sources to rows, rows to tokens, tokens to batches in a known order."""
