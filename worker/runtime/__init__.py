"""Celery's inner parts: how a worker takes messages, watches itself and ends. Knows no PACS and no job."""
