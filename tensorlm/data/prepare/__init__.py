"""Preparing data: documents from files and the Hugging Face Hub are encoded into shards."""
