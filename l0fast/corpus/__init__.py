"""Passages that agents search: an index on disk, served in this process, or a retriever that runs elsewhere."""
