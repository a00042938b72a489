"""The optional extras of the package whose absence is refused: what each one installs, and how to install it.

A program without an extra works until a setting or a URL needs the extra; then one sentence says what to install.
"""

from __future__ import annotations

import importlib.util
from typing import Final, NamedTuple


class Extra(NamedTuple):
    """``name`` is that in ``pacs-courier[name]``; ``package`` what it installs; ``module`` what is imported of it."""

    name: str
    package: str
    module: str

    @property
    def is_installed(self) -> bool:
        try:
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:  # not even the package that the module is in
            return False

    @property
    def remedy(self) -> str:
        """The end of a sentence."""
        return f"{self.package} is not installed; run pip install 'pacs-courier[{self.name}]'"


S3: Final = Extra("s3", "boto3", "boto3")
AZURE_BLOBS: Final = Extra("azure", "azure-storage-blob", "azure.storage.blob")
AZURE_IDENTITY: Final = Extra("azure", "azure-identity", "azure.identity")
SIGNING: Final = Extra("signing", "cryptography", "cryptography")
