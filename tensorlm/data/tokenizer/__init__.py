"""Tokenizers: read, checked, trained, copied."""
