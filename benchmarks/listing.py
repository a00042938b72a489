"""A list of images as long as it has to be, for benchmarks of batches."""

from __future__ import annotations

import hashlib


def listed(number: int) -> str:
    """An item's text, of the length and the kind of a bucket's URL: 500 to a folder, a name that nobody can guess."""
    name = hashlib.sha256(str(number).encode()).hexdigest()[:16]
    return f"s3://radiology-archive/2025/{number // 500:05}/{name}.dcm"
