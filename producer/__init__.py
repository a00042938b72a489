"""What another program imports: ``from producer import Courier``. Loads no DICOM library and no HTTP client.

Each name is loaded when it is first asked for (PEP 562): ``import producer`` loads nothing, `Courier` loads Celery, the
types of results load neither Celery nor pydantic.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from producer.client import Courier
    from producer.handle import Handle, Report
    from producer.results import (
        AuditResult,
        BatchResult,
        BatchStateResult,
        DatabaseResult,
        DeleteAllResult,
        DeleteResult,
        DownloadResult,
        FoundResult,
        StatusResult,
        StorageResult,
        StudiesResult,
        TraceResult,
        UploadResult,
    )
else:  # a type checker that saw `__getattr__` would take any name for one of ours
    from importlib import import_module

    #: Modules that ``import producer`` has always brought along, as in ``producer.errors.NotFound``.
    _MODULES = frozenset(
        ("batches", "client", "dead_letters", "errors", "handle", "inputs", "orders", "plans", "results")
    )
    _HOMES = {"Courier": "producer.client", "Handle": "producer.handle", "Report": "producer.handle"}

    def __getattr__(name):
        if name in _MODULES:
            return import_module(f"producer.{name}")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found = getattr(import_module(_HOMES.get(name, "producer.results")), name)
        return found

    def __dir__():
        return sorted({*globals(), *__all__, *_MODULES})


__all__ = [
    "AuditResult",
    "BatchResult",
    "BatchStateResult",
    "Courier",
    "DatabaseResult",
    "DeleteAllResult",
    "DeleteResult",
    "DownloadResult",
    "FoundResult",
    "Handle",
    "Report",
    "StatusResult",
    "StorageResult",
    "StudiesResult",
    "TraceResult",
    "UploadResult",
]
