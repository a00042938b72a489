"""The parts of boto's clients that we set or replace although its manual does not name them; boto has a ceiling.

A function that takes a client takes one of S3 that has sent nothing yet. boto is not loaded with this module.
``tests/unit/test_botocore_internals.py`` fails when one of the parts changes.
"""

from __future__ import annotations

import functools
import http.client
import ssl
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from worker.runtime.urllib3_internals import answer_with


def new_session() -> Any:
    """A session of boto's that has read no credentials yet; what clients are made of is read once per process."""
    from botocore.session import Session  # noqa: PLC0415 (a worker that never sees S3 does not pay for it)

    session = Session()
    session.register_component("data_loader", _models())
    return session


@functools.cache
def _models() -> Any:
    """The descriptions of S3 and of its endpoints. To read them takes ten times as long as to make a client of them."""
    from botocore.session import Session  # noqa: PLC0415 (as above)

    return Session().get_component("data_loader")


def trust(client: Any, context: ssl.SSLContext) -> None:
    """Have ``client`` speak TLS by ``context``, through a proxy too; boto adds authorities of its own to it."""
    session = client._endpoint.http_session
    session._get_ssl_context = lambda: context
    session._manager.connection_pool_kw["ssl_context"] = context


def read_credentials_within(client: Any, around: Callable[[], AbstractContextManager[None]]) -> None:
    """Have ``client`` read its credentials, which may have to be renewed, within ``around``: for each request that it
    signs.
    """
    credentials = client._request_signer._credentials
    if credentials is None:
        return
    read = credentials.get_frozen_credentials

    def frozen() -> Any:
        with around():
            return read()

    credentials.get_frozen_credentials = frozen


def make_answers(client: Any, answer: Callable[..., http.client.HTTPResponse]) -> None:
    """Have the answers to ``client`` made by ``answer``, as http.client's ``response_class`` is called."""
    pools = client._endpoint.http_session._pool_classes_by_scheme
    pools.update({scheme: answer_with(pool, answer) for scheme, pool in pools.items()})


def keep_to_one_store(client: Any) -> None:
    """Keep ``client`` from what one endpoint of another maker may not know.

    A redirect to another region is not followed: one to itself would be until Python's stack is full. A checksum is
    not asked for; one that the store gives is compared all the same.
    """
    client.meta.events.register("before-call.s3", _to_one_store)


def _to_one_store(params: dict[str, Any], context: dict[str, Any], **_: Any) -> None:
    context["s3_redirect"] = {**context.get("s3_redirect", {}), "redirected": True}
    params["headers"].pop("x-amz-checksum-mode", None)


def unreadable_answer() -> type[Exception]:
    """What boto raises of an answer that it cannot read."""
    from botocore.parsers import ResponseParserError  # noqa: PLC0415 (as above)

    return ResponseParserError  # type: ignore[no-any-return]  # boto is untyped
