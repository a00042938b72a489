"""What a worker process runs."""

from courier import __version__

__all__ = ["__version__"]
