"""A DICOMweb server that finds its datasets by their UIDs, whatever texts they hold."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


@contextmanager
def odd_pacs(datasets: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Its URL. Halves of surrogate pairs go over the wire as JavaScript writes them: escaped."""

    class OddPacsHandler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = parse_qs(url.query)
            wanted = {uid for name, uids in query.items() if name.endswith("UID") for uid in uids}
            wanted |= {part for part in url.path.split("/") if part[:1].isdigit()}
            found = [one for one in datasets if wanted <= {str(element["Value"][0]) for element in one.values()}]
            body = json.dumps(found[int(query.get("offset", ["0"])[0]) :]).encode("ascii")
            self.send_response(200)
            self.send_header("Content-Type", "application/dicom+json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), OddPacsHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
