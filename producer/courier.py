"""The name that `producer.client` and `producer.handle` had in version 0.1, whose package did not export `Report`."""

from producer.client import Courier
from producer.handle import Handle, Report, Status

__all__ = ["Courier", "Handle", "Report", "Status"]
