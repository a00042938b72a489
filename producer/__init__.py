"""What another program imports: ``from producer import Courier``. Loads no DICOM library and no HTTP client."""

from producer.courier import Courier, Handle

__all__ = ["Courier", "Handle"]
