"""How to log in to a server: what goes into ``Authorization``, for each type of ``auth``.

Secrets are read where the settings point and stand in no message. OAuth2 lives in ``oauth2.py``, Azure's identities in
``azure_identity.py``.
"""

from __future__ import annotations

import base64
import unicodedata
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock

from courier import extras
from courier.settings import ServerSettings, SettingsError
from worker.pacs.transport import Credentials


@dataclass(frozen=True)
class Fixed:
    """Always the same value, or none at all."""

    value: str | None = None

    def authorization(self) -> str | None:
        return self.value

    def renew(self, refused: str | None) -> bool:  # noqa: ARG002  # the Protocol's name
        return False


class Bearer:
    """A token from a variable or a file. The file is read again after a 401, because others rotate it."""

    def __init__(self, server: ServerSettings) -> None:
        self._server, self._auth = server, server.auth
        self._lock = Lock()
        self._value = self._read()

    def authorization(self) -> str:
        return self._value

    def renew(self, refused: str | None) -> bool:
        with self._lock:
            if self._auth.token_file is not None:
                with suppress(OSError, SettingsError):  # without a better one the old one stays, and stays refused
                    self._value = self._read()
            return self._value != refused

    def _read(self) -> str:
        return f"Bearer {_secret(self._server, 'token')}"


def _read(server: ServerSettings, kind: str) -> str:
    try:
        return server.auth.secret(kind)
    except OSError as error:
        raise SettingsError(f"the {kind}_file of server {server.name} cannot be read: {error.strerror}") from error
    except ValueError:
        raise SettingsError(f"the {kind}_file of server {server.name} is no text in UTF-8") from None


def _secret(server: ServerSettings, kind: str) -> str:
    secret = _read(server, kind)
    if not secret.isprintable() or not secret.isascii():
        raise SettingsError(f"the {kind} of server {server.name} holds characters that no header can carry")
    return secret


def _basic(server: ServerSettings) -> str:
    """User name and password in UTF-8, composed (RFC 7617, 2.1). The settings let no colon into the name."""
    password = _read(server, "password")
    if not password.isprintable():
        raise SettingsError(
            f"the password of server {server.name} holds control characters, or is no text in UTF-8; correct it"
        )
    pair = unicodedata.normalize("NFC", f"{server.auth.username}:{password}")
    return "Basic " + base64.b64encode(pair.encode()).decode()


def credentials(server: ServerSettings) -> Credentials:
    """The credentials that ``server.auth`` describes.

    Raises
    ------
    SettingsError
        A secret is not where the settings say, or the extra that the type needs is not installed.
    """
    match server.auth.type:
        case "none":
            return Fixed()
        case "basic":
            return Fixed(_basic(server))
        case "bearer":
            return Bearer(server)
        case "oauth2":
            # Loading it takes 0.2 s, which only its users pay.
            from worker.pacs.oauth2 import ClientCredentials  # noqa: PLC0415

            return ClientCredentials(server, _read(server, "client_secret"))
        case "azure_identity":
            if not extras.AZURE_IDENTITY.is_installed:
                key = f"servers.{server.name}.auth.type"
                raise SettingsError(f"setting {key}: azure_identity cannot be used: {extras.AZURE_IDENTITY.remedy}")
            from worker.pacs.azure_identity import AzureIdentity  # noqa: PLC0415 (as above)

            return AzureIdentity(server)
