"""Tokenizers: reading, checking, training and copying them."""
