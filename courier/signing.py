"""Signed messages: who may have a worker do something, where the broker is not to be trusted.

Celery's own ``auth`` serializer signs (RSA, X.509); here stands what it leaves open: the body alone is signed, so the
task and the id are written into it, with the time. Celery is named here because the worker and every program that
enqueues sign alike. What signing does not cover is in docs/signing.md.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

from celery import Celery
from celery.exceptions import SecurityError
from kombu.serialization import registry

from courier import extras
from courier.celery_internals import EmbeddingAMQP, certificate, certificates, json_signer, private_key, signer_id
from courier.settings import SettingsError, SigningSettings

SERIALIZER: Final = "auth"
CONTENT_TYPE: Final = "application/data"
_SIGNED_FOR: Final = "signed_for"
#: The header in which a worker notes the certificate that has signed a message, for its own slots. What a sender writes
#: there is thrown away.
SENDER_HEADER: Final = "verified_sender"
#: How far the clocks of two machines may be apart.
_SKEW_S: Final = 300.0


class SigningAMQP(EmbeddingAMQP):
    """Writes into the body, which is signed, what stands in the headers, which are not."""

    def embedded(self, task_id: str, name: str) -> Mapping[str, Any]:
        return {_SIGNED_FOR: [name, task_id, int(time.time())]}


def install(app: Celery, settings: SigningSettings) -> None:
    """Have ``app`` sign what it sends, and read nothing that no trusted key has signed; results stay JSON.

    One key per process: the serializer is known to kombu by its name.

    Raises
    ------
    SettingsError
        A key or a certificate is missing, expired, of another kind than RSA, or not the other's; or the extra
        ``signing`` is not installed.
    """
    if not settings.on:
        return
    if not extras.SIGNING.is_installed:
        raise SettingsError(f"setting queue.signing cannot be followed: {extras.SIGNING.remedy}")
    signer = _signer(settings)
    _Senders.known = _Senders(signer, _names(settings))
    registry.register(  # type: ignore[no-untyped-call]  # kombu is untyped
        SERIALIZER, signer.serialize, signer.deserialize, content_type=CONTENT_TYPE, content_encoding="utf-8"
    )
    app.amqp_cls = f"{__name__}:{SigningAMQP.__name__}"
    app.conf.update(task_serializer=SERIALIZER, accept_content=[SERIALIZER], result_accept_content=["json"])


class _Senders:
    """Which certificate of the trusted folder has signed a message. One per process, as the serializer is."""

    known: ClassVar[_Senders | None] = None

    def __init__(self, signer: Any, names: Mapping[str, str]) -> None:
        self.signer, self.names = signer, names


def sender_of(body: str | bytes) -> str:
    """The certificate that the ``body`` of a message is signed with: its file in the trusted folder, without ``.crt``.

    To be asked of a message that has been read, and so verified; "" where messages are not signed.
    """
    senders = _Senders.known
    return "" if senders is None else senders.names.get(signer_id(senders.signer, body), "")


def _names(settings: SigningSettings) -> dict[str, str]:
    """By the id of each trusted certificate the name of its file.

    Raises
    ------
    SettingsError
        ``destructive_senders`` names one that is not there.
    """
    folder = settings.trusted_folder or Path()
    found = {certificate(path.read_text(encoding="utf-8")).get_id(): path.stem for path in sorted(folder.glob("*.crt"))}
    for name in settings.destructive_senders or ():
        if name not in found.values():
            known = ", ".join(sorted(found.values()))
            raise SettingsError(
                f"setting queue.signing.destructive_senders: {folder} holds no {name}.crt; it has {known}"
            )
    return found


def objection(headers: Mapping[str, Any], embedded: Mapping[str, Any], *, good_for_s: float) -> str | None:
    """Why a message whose signature is good is still not to be followed: it was signed for something else, or long ago.

    A copy of a message is harmless as long as the ledger remembers the job, so a signature is good for that long.
    """
    signed_for = embedded.get(_SIGNED_FOR)
    if not isinstance(signed_for, list) or len(signed_for) != 3 or signed_for[:2] != [headers["task"], headers["id"]]:
        return "it was signed for another task or id"
    signed_at_s = signed_for[2]
    if not isinstance(signed_at_s, int) or not -_SKEW_S <= time.time() - signed_at_s <= good_for_s:
        return "its signature is too old, or from the future"
    return None


def _signer(settings: SigningSettings) -> Any:
    def read(key: str, make: Any) -> Any:
        path: Path = getattr(settings, key)
        try:
            return make(path)
        except OSError as error:
            raise SettingsError(f"setting queue.signing.{key}: {path} cannot be read: {error.strerror}") from None
        except (SecurityError, ValueError) as error:
            reason = "has expired" if "Expired" in str(error) else "is no such file, in PEM and of an RSA key"
            raise SettingsError(f"setting queue.signing.{key}: {path} {reason}") from None

    key = read("key_file", lambda path: private_key(path.read_text(encoding="utf-8")))
    own = read("certificate_file", lambda path: certificate(path.read_text(encoding="utf-8")))
    trusted = read("trusted_folder", lambda path: certificates(str(path / "*.crt")))
    signer = json_signer(key, own, trusted)
    try:
        signer.deserialize(signer.serialize("ours"))
    except SecurityError:
        raise SettingsError(
            "setting queue.signing: what key_file signs does not verify; certificate_file has to be the certificate of "
            "that key, not expired, and lie in trusted_folder as *.crt"
        ) from None
    return signer
