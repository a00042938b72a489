"""The parts of Celery that programs and workers use although its manual does not name them; its version has a ceiling.

What a message or a result says is not this module's business. ``tests/unit/test_celery_internals.py`` fails when one of
the parts changes. What workers alone use is in ``worker/runtime/celery_internals.py``.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import kombu.pools
from celery import Celery
from celery.app.amqp import AMQP
from celery.backends.redis import RedisBackend
from celery.exceptions import SecurityError
from kombu.utils.encoding import bytes_to_str

from courier.json_text import decode

#: What kombu's JSON marks values with that JSON has no kind for.
_MARK = b'"__type__"'

# --- the app of a program ---------------------------------------------------------------------------------------------


class GuestCelery(Celery):  # type: ignore[misc]  # celery is untyped
    """Our Celery app in a program that may have a Celery app of its own: neither app's settings reach the other.

    ``CELERY_BROKER_URL`` and its like in the environment are the program's, and name no broker of ours.
    """

    #: Celery's Django fix-up would make this app the default app of a Django program, and change ``sys.path``.
    builtin_fixups = frozenset[str]()

    def connection_for_read(self, url: str | None = None, **options: Any) -> Any:
        return super().connection_for_read(url or self.conf.get("broker_read_url"), **options)

    def connection_for_write(self, url: str | None = None, **options: Any) -> Any:
        return super().connection_for_write(url or self.conf.get("broker_write_url"), **options)

    @property
    def pool(self) -> Any:
        """Celery would resize the connection pools of all apps, because kombu has one limit per process."""
        self.conf.broker_pool_limit = kombu.pools.get_limit()  # type: ignore[no-untyped-call]  # kombu is untyped
        return super().pool


# --- the result back-end ----------------------------------------------------------------------------------------------


def read_results(backend: Any, job_ids: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """What ``backend`` has stored of those jobs that it has an entry of, read in one go."""
    keys = [backend.get_key_for_task(job_id) for job_id in job_ids]
    rows = backend.mget(keys) if keys else []
    if isinstance(rows, Mapping):  # a memcached has no order, and names without bytes
        to_text: Any = bytes_to_str
        named = {to_text(key): row for key, row in rows.items()}
        rows = [named.get(to_text(key)) for key in keys]
    return {job_id: _decoded(backend, row) for job_id, row in zip(job_ids, rows, strict=True) if row}


def _decoded(backend: Any, row: Any) -> Any:
    """What ``backend`` makes of an entry. kombu would look at each object of the JSON whether it stands for a value of
    another kind, which takes as long as all the rest; those are marked.
    """
    if backend.serializer == "json" and isinstance(row, bytes) and row[:1] == b"{" and _MARK not in row:
        with contextlib.suppress(ValueError):
            return backend.meta_from_decoded(decode(row))
    return backend.decode_result(row)


def forget_result(backend: Any, job_id: str) -> None:
    """Delete what ``backend`` has stored of a job."""
    backend.delete(backend.get_key_for_task(job_id))


def store_probe(backend: Any) -> None:
    """Have a Redis that keeps results keep one of no job for a second; raises what redis-py does. Of another kind of
    back-end nothing is asked.
    """
    if isinstance(backend, RedisBackend):
        backend.client.set(backend.get_key_for_task(f"probe-{uuid.uuid4()}"), "", ex=1)


def subscriber(backend: Any) -> Any:
    """A client of the Redis that keeps results, with the same options and connections of its own; None of another kind
    of back-end, which publishes no results.
    """
    return backend._create_client(**backend.connparams) if isinstance(backend, RedisBackend) else None


def result_channel(backend: Any, job_id: str) -> bytes:
    """Where a Redis that keeps results publishes what it stores of the job."""
    key = backend.get_key_for_task(job_id)
    return key if isinstance(key, bytes) else str(key).encode()


def disconnect(backend: Any) -> None:
    """End the connections to a Redis that keeps results; Celery's ``close`` leaves them."""
    if isinstance(backend, RedisBackend):
        backend.client.connection_pool.disconnect()


# --- messages ---------------------------------------------------------------------------------------------------------


class EmbeddingAMQP(AMQP):  # type: ignore[misc]  # celery is untyped
    """Celery's maker of messages (``app.amqp_cls``), which writes more into the third part of each body."""

    def embedded(self, task_id: str, name: str) -> Mapping[str, Any]:
        """What is written there, for the message of this task."""
        raise NotImplementedError

    def as_task_v2(self, task_id: str, name: str, *args: Any, **kwargs: Any) -> Any:
        message = super().as_task_v2(task_id, name, *args, **kwargs)
        message.body[2].update(self.embedded(task_id, name))
        return message


# --- signatures -------------------------------------------------------------------------------------------------------


def private_key(pem: str) -> Any:
    """Raises `SecurityError` or `ValueError` if it is none."""
    from celery.security.key import PrivateKey  # noqa: PLC0415 (only programs that sign need cryptography)

    return PrivateKey(pem)


def certificate(pem: str) -> Any:
    """Raises `SecurityError` or `ValueError` if it is none, or has expired."""
    from celery.security.certificate import Certificate  # noqa: PLC0415 (as above)

    return Certificate(pem)


def certificates(pattern: str) -> Any:
    """Those in the files that ``pattern`` matches; raises as `certificate` does."""
    from celery.security.certificate import FSCertStore  # noqa: PLC0415 (as above)

    return FSCertStore(pattern)


def json_signer(key: Any, own: Any, trusted: Any) -> Any:
    """What signs with ``key`` and the certificate of its ``own``, and reads what a key of ``trusted`` has signed.

    What is inside is JSON: its content type is not signed, so nothing else is ever read.
    """
    from celery.security.serialization import SecureSerializer  # noqa: PLC0415 (as above)

    class JsonSerializer(SecureSerializer):  # type: ignore[misc]  # celery is untyped
        def _unpack(self, payload: Any, **kwargs: Any) -> Any:
            fields = super()._unpack(payload, **kwargs)
            if (fields["content_type"], fields["content_encoding"]) != ("application/json", "utf-8"):
                raise SecurityError("not JSON")
            return fields

    return JsonSerializer(key, own, trusted, "sha256", serializer="json")


def signer_id(signer: Any, body: str | bytes) -> str:
    """The id (issuer and serial number) of the certificate that ``body`` says it is signed with.

    Whether that is so, reading it with ``signer`` says.
    """
    to_text: Any = bytes_to_str
    return str(to_text(signer._unpack(body)["signer"]))
