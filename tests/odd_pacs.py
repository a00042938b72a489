"""A DICOMweb server that finds its datasets by their UIDs, whatever texts they hold."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.servers.loopback import LoopbackHandler, serving


@contextmanager
def odd_pacs(datasets: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Its URL. Halves of surrogate pairs go over the wire as JavaScript writes them: escaped."""

    class OddPacsHandler(LoopbackHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = parse_qs(url.query)
            wanted = {uid for name, uids in query.items() if name.endswith("UID") for uid in uids}
            wanted |= {part for part in url.path.split("/") if part[:1].isdigit()}
            found = [one for one in datasets if wanted <= {str(element["Value"][0]) for element in one.values()}]
            body = json.dumps(found[int(query.get("offset", ["0"])[0]) :]).encode("ascii")
            self.answer(200, body, "application/dicom+json")

    with serving(OddPacsHandler) as url:
        yield url
