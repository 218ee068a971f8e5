"""Rows become prompts, tokens, splits and batches; the only room that knows shifting, -100 and padding."""
