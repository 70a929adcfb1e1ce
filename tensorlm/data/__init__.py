"""Data: prepare documents into shards, pack them into rows, serve batches."""
