"""The parts of boto's clients that its manual does not name do what our clients of S3 take them to do.

A test that fails with a new version of boto names the function of ours that has to be looked at, in
``worker/runtime/botocore_internals.py``.
"""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from botocore.awsrequest import AWSHTTPConnectionPool, AWSHTTPSConnectionPool
from botocore.config import Config
from botocore.exceptions import ClientError
from botocore.loaders import JSONFileLoader
from botocore.parsers import create_parser

from tests.servers.peer import OK, peer
from worker.runtime import botocore_internals as internals

MOVED = (
    b"HTTP/1.1 301 Moved Permanently\r\nx-amz-bucket-region: eu-west-1\r\nContent-Length: 77\r\n\r\n"
    b"<Error><Code>PermanentRedirect</Code><Message>elsewhere</Message></Error>    "
)


def client(port: int = 9, *, keyed: bool = True, proxies: dict[str, str] | None = None) -> Any:
    keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret"} if keyed else {}
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 1},
        s3={"addressing_style": "path"},
        proxies=proxies or {},
    )
    url = f"http://127.0.0.1:{port}"
    return internals.new_session().create_client("s3", endpoint_url=url, region_name="us-east-1", config=config, **keys)


@pytest.fixture(autouse=True)
def _no_credentials_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nowhere")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def test_trust_depends_on_where_a_client_takes_its_tls_context_from() -> None:
    context = ssl.create_default_context()
    s3 = client(proxies={"https": "http://127.0.0.1:9"})
    internals.trust(s3, context)
    session = s3._endpoint.http_session
    direct = session._manager.connection_from_url("https://a.host.invalid")
    through = session._get_proxy_manager("http://127.0.0.1:9").connection_from_url("https://a.host.invalid")
    assert direct.conn_kw["ssl_context"] is context, "a client's connections trust others"
    assert through.conn_kw["ssl_context"] is context, "a client's connections through a proxy trust others"


def test_trust_depends_on_what_sends_a_clients_requests() -> None:
    sent: list[str] = []
    s3 = client()
    session = s3._endpoint.http_session

    def send(request: Any) -> Any:
        sent.append(request.url)
        raise InterruptedError

    session.send = send
    with pytest.raises(InterruptedError):
        s3.head_bucket(Bucket="one")
    assert sent == ["http://127.0.0.1:9/one"]


def test_read_credentials_within_depends_on_who_reads_them_for_each_request() -> None:
    entered: list[int] = []

    @contextmanager
    def around() -> Iterator[None]:
        entered.append(1)
        yield

    with peer(OK, OK) as server:
        s3 = client(server.port)
        internals.read_credentials_within(s3, around)
        s3.head_bucket(Bucket="one")
        s3.head_bucket(Bucket="one")
        s3.close()
    assert len(entered) == 2
    assert "Credential=key/" in server.heads[1]


def test_read_credentials_within_depends_on_how_a_client_without_credentials_says_so() -> None:
    internals.read_credentials_within(client(keyed=False), lambda: pytest.fail("there are none to be read"))


def test_make_answers_depends_on_which_pools_a_client_connects_by() -> None:
    made: list[http.client.HTTPResponse] = []

    def answer(*args: Any, **kwargs: Any) -> http.client.HTTPResponse:
        made.append(http.client.HTTPResponse(*args, **kwargs))
        return made[-1]

    with peer(OK) as server:
        s3 = client(server.port)
        classes = s3._endpoint.http_session._pool_classes_by_scheme
        assert classes == {"http": AWSHTTPConnectionPool, "https": AWSHTTPSConnectionPool}
        internals.make_answers(s3, answer)
        s3.head_bucket(Bucket="one")
        through = s3._endpoint.http_session._get_proxy_manager("http://127.0.0.1:9")
        s3.close()
    assert len(made) == 1
    assert through.pool_classes_by_scheme is classes, "the connections through a proxy are of other classes"


@pytest.mark.parametrize("kept", [True, False])
def test_keep_to_one_store_depends_on_how_a_redirect_is_marked_as_followed(kept: bool) -> None:
    with peer(MOVED, MOVED, MOVED) as server:
        s3 = client(server.port)
        if kept:
            internals.keep_to_one_store(s3)
        with pytest.raises(ClientError):
            s3.get_object(Bucket="one", Key="a")
        s3.close()
    assert (len(server.heads) == 1) is kept, (
        "keep_to_one_store does nothing any more" if kept else "boto does not follow"
    )


@pytest.mark.parametrize("kept", [True, False])
def test_keep_to_one_store_depends_on_how_a_checksum_is_asked_for(kept: bool) -> None:
    with peer(OK) as server:
        s3 = client(server.port)
        if kept:
            internals.keep_to_one_store(s3)
        s3.get_object(Bucket="one", Key="a")["Body"].close()
        s3.close()
    assert ("x-amz-checksum-mode" not in server.heads[0].lower()) is kept


def test_unreadable_answer_is_what_boto_raises_of_one() -> None:
    shape = client().meta.service_model.operation_model("ListObjectsV2").output_shape
    with pytest.raises(internals.unreadable_answer()):
        create_parser("rest-xml").parse({"status_code": 200, "headers": {}, "body": b"<html>no S3</html><"}, shape)


def test_new_session_depends_on_where_a_session_keeps_what_clients_are_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> Any:
        return internals.new_session().create_client("s3", region_name="us-east-1")

    first = made()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "later")
    monkeypatch.setattr(JSONFileLoader, "load_file", lambda *_: pytest.fail("a file of boto's is read again"))
    second = made()
    assert first._request_signer._credentials is None
    assert second._request_signer._credentials.access_key == "later", "a session knows the credentials of another"
