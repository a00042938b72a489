"""What of a URL and of a job may be shown. No logging is set up here."""

from __future__ import annotations

import pytest

from worker.logs import shown_job, shown_text, shown_url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://host.example/a.dcm?sig=x#y", "https://host.example/a.dcm"),
        ("https://user:secret@host.example/a@b.dcm", "https://host.example/a@b.dcm"),
        ("//user:secret@host.example/a.dcm", "//host.example/a.dcm"),
        ("user:secret@host.example/a.dcm", "host.example/a.dcm"),
        ("https://user:sec/ret@host.example/a.dcm", "https://…"),
        ("https://user:sec?ret@host.example/a.dcm", "https://…"),
        ("a.dcm?next=https://user:secret@host.example/", "a.dcm"),
        ("https://[2001:db8::1]:8080/a.dcm", "https://[2001:db8::1]:8080/a.dcm"),
        ("file:///images/a.dcm", "file:///images/a.dcm"),
        ("s3://bucket/key", "s3://bucket/key"),
        ("", ""),
    ],
)
def test_a_url_is_shown_without_what_may_be_a_credential(url: str, shown: str) -> None:
    assert shown_url(url) == shown


def test_a_signed_url_is_hidden_wherever_in_a_job_it_stands() -> None:
    signed = "https://user:secret@host.example/a?sig=secret"
    job = {"image_url": [signed, {"deep": signed}], "extra": {"deep": signed}, signed: 1, "filters": {signed: "x"}}
    assert "secret" not in shown_job(job)
    assert "https://host.example/a" in shown_job(job)


@pytest.mark.parametrize("text", ["\ud800", "a\nb", "\u2028", "\x7f", "\u202e"])
def test_what_cannot_stand_in_a_line_is_replaced(text: str) -> None:
    assert shown_text(text, limit=10).isprintable()
    assert shown_job({"server": text}).encode()
