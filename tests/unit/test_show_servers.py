"""How it looks on a terminal how the servers are."""

from __future__ import annotations

import pytest

from producer.cli.servers import status_table
from producer.cli.studies import _end
from producer.terminal import console


def test_what_a_server_that_is_up_lacks_stands_in_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_width", 300)
    entry = {"server_name": "plain", "server_type": "dicomweb", "status": "up", "latency_ms": 3.0, "error": None}
    known = {"ready": True, "product": "unknown", "version": "unknown", "note": "It answers queries."}
    with console.capture() as shown:
        console.print(status_table([entry | known | {"warnings": ["It finds no images at its root."]}]))
    assert "It answers queries. It finds no images at its root." in " ".join(shown.get().split())


@pytest.mark.parametrize(
    ("status", "may_be_cut", "end"),
    [("complete", False, "all"), ("complete", True, "as far as it lists"), ("more", True, "and more")],
)
def test_a_list_that_may_be_cut_is_not_called_all(status: str, may_be_cut: bool, end: str) -> None:
    assert _end({"status": status, "error": None, "may_be_cut": may_be_cut}) == end
