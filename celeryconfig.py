"""Re-exports ``courier/celery_settings.py``. Neither worker nor producer loads a module of this name."""

from courier.celery_settings import *  # noqa: F403
