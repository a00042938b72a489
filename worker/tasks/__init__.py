"""The doors: one Celery task per operation. A door reads the message, calls one function, returns plain JSON.

One module per kind of work; ``door.py`` is what they share. Importing this package registers them all.
"""

from worker.tasks import audits, batches, deletions, downloads, lookups, servers, studies, trace, uploads

__all__ = ["audits", "batches", "deletions", "downloads", "lookups", "servers", "studies", "trace", "uploads"]
