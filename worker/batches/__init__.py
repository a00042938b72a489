"""Batches as a worker does them: one coordinator, one module per kind of batch."""
