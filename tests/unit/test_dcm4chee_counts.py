"""Whether DCM4CHEE has a study is told by a count of its images: what counts as an answer, and what does not."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from urllib3 import HTTPResponse

from courier.errors import InvalidUid, PacsMisanswered
from courier.settings import ServerSettings
from worker.pacs.dcm4chee import Dcm4chee
from worker.pacs.protocol import Found
from worker.pacs.transport import Request, Transport


class CountWire(Transport):
    """A transport that gives one answer and keeps what it was asked."""

    def __init__(self, body: bytes) -> None:
        super().__init__(ServerSettings(name="ward", type="dcm4chee", url="http://ward/aets/A/rs"), None)  # type: ignore[arg-type]
        self.asked: list[str] = []
        self._body = body

    def _open(self, request: Request) -> Any:
        self.asked.append(f"{request.method} {request.target}")
        answer = HTTPResponse(io.BytesIO(self._body), {}, 200, preload_content=False)
        answer.reader = SimpleNamespace(deadline_s=0.0)  # type: ignore[attr-defined]
        return answer


def test_a_study_with_images_is_found_by_one_count() -> None:
    wire = CountWire(b'{"count":3}')
    assert Dcm4chee(wire).find("study", "1.2") == [Found("study", "1.2")]
    assert wire.asked == ["GET /aets/A/rs/studies/1.2/instances/count"]


def test_a_study_without_images_that_are_shown_is_not_found() -> None:
    assert Dcm4chee(CountWire(b'{"count":0}')).find("study", "1.2") == []


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{}", b"[]", b"0", b"null", b"<html>It works!</html>", b'{"errorMessage":"No such'),
        *(b'{"count":null}', b'{"count":"0"}', b'{"count":false}', b'{"count":-1}', b'{"count":0.0}', b'{"Count":0}'),
    ],
)
def test_what_is_no_count_never_says_that_a_study_is_not_there(body: bytes) -> None:
    with pytest.raises(PacsMisanswered):
        Dcm4chee(CountWire(body)).find("study", "1.2")


@pytest.mark.parametrize("uid", ["*", "1.2*", "1.2,1.3", "1.2/series", "?", "", "%2A"])
def test_a_wildcard_would_count_other_studies_and_is_never_asked_for(uid: str) -> None:
    wire = CountWire(b'{"count":3}')
    with pytest.raises(InvalidUid):
        Dcm4chee(wire).find("study", uid)
    assert wire.asked == []
