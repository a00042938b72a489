"""What another program imports: ``from producer import Courier``. Loads no DICOM library and no HTTP client."""

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
