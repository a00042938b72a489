"""What is written without PACS Courier: the six steps of an upload with dicomweb-client, requests and pydicom.

Nothing is guaranteed: whatever goes wrong between two steps is neither noticed nor made up for. `store_image` is called
by a script, one image after the other, or by a Celery task: ``celery -A benchmarks.naive worker``, with the URLs of
broker, results and servers in ``NAIVE_BROKER``, ``NAIVE_RESULTS`` and ``NAIVE_SERVERS``.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Sequence
from typing import Any

import pydicom
import requests
from celery import Celery
from dicomweb_client.api import DICOMwebClient

app = Celery("naive", broker=os.environ.get("NAIVE_BROKER"), backend=os.environ.get("NAIVE_RESULTS"))
app.conf.update(worker_hijack_root_logger=False, broker_connection_retry_on_startup=True)
_own = threading.local()


def store_image(url: str, session: requests.Session, clients: Sequence[DICOMwebClient]) -> dict[str, Any]:
    """Bring one image to the first server, unless one of them has it."""
    body = session.get(url, timeout=60).content
    ds = pydicom.dcmread(io.BytesIO(body))
    for client in clients:
        if client.search_for_instances(search_filters={"SOPInstanceUID": ds.SOPInstanceUID}):
            return {"status": "exists"}
        client.search_for_studies(search_filters={"StudyInstanceUID": ds.StudyInstanceUID})
    clients[0].store_instances([ds])
    metadata = clients[0].retrieve_instance_metadata(ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID)
    return {"status": "stored", "sha256": hashlib.sha256(body).hexdigest(), "metadata": metadata}


@app.task(name="naive.upload", shared=False)  # type: ignore[untyped-decorator]  # celery is untyped
def upload(url: str) -> dict[str, Any]:
    """One image; connections are kept, by each thread its own."""
    if not hasattr(_own, "session"):
        _own.session = requests.Session()
        _own.clients = [DICOMwebClient(server) for server in os.environ["NAIVE_SERVERS"].split()]
    return store_image(url, _own.session, _own.clients)
