"""What an operator can set: one frozen tree, read once from ``pacs.toml`` and the environment.

Only shapes, defaults and limits live here; no module below reads the environment. Documented in
``docs/settings.md``, which a test compares with these classes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from courier import redis_urls, setting_files

SettingsError = setting_files.SettingsError
ServerType = Literal["msdicom", "dcm4chee", "orthanc", "dicomweb"]
MODES = ("both", "either")
#: What the keys of the ledger begin with, unless `QueueSettings.key_prefix` says otherwise.
PREFIX: Final = "courier:"
#: What of a link to a viewer is filled with UIDs (`worker.dicom.viewer`).
VIEWER_PLACEHOLDERS: Final = frozenset(("study", "series", "image"))
_PLACEHOLDER: Final = re.compile(r"\{(\w*)\}").findall
AZURE_CREDENTIALS = ("connection_string", "account_key", "sas_token")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AuthSettings(_Section):
    """How to log in to a server. Secrets are named (``…_env``, ``…_file``), never written here."""

    type: Literal["none", "basic", "bearer", "oauth2", "azure_identity"] = "none"
    username: str | None = None
    password_env: str | None = None
    password_file: Path | None = None
    token_env: str | None = None
    token_file: Path | None = None
    token_url: Annotated[str, Field(pattern=r"^https?://[^\s/@]+(/\S*)?$")] | None = None
    client_id: str | None = None
    client_secret_env: str | None = None
    client_secret_file: Path | None = None
    scope: str | None = None

    @field_validator("username")
    @classmethod
    def _of_basic(cls, username: str | None) -> str | None:
        if username and (":" in username or not username.isprintable()):
            raise ValueError("a user name has no colon and no control characters in it (RFC 7617)")
        return username

    @model_validator(mode="after")
    def _complete(self) -> AuthSettings:
        needed = {
            "none": (),
            "basic": (("username",), ("password_env", "password_file")),
            "bearer": (("token_env", "token_file"),),
            "oauth2": (("token_url",), ("client_id",), ("client_secret_env", "client_secret_file")),
            "azure_identity": (("scope",),),
        }[self.type]
        for choices in needed:
            if not any(getattr(self, choice) for choice in choices):
                raise ValueError(f"auth type {self.type!r} needs {' or '.join(choices)}")
        if self.type == "azure_identity" and not _AZURE_SCOPE(str(self.scope)):
            raise ValueError("scope of azure_identity is one, such as https://dicom.healthcareapis.azure.com/.default")
        return self

    def secret(self, kind: str, environ: Mapping[str, str] = os.environ) -> str:
        """The secret called ``kind`` (``password``, ``token``, ``client_secret``), read where the settings point."""
        variable, file = getattr(self, f"{kind}_env"), getattr(self, f"{kind}_file")
        if file is not None:
            return Path(file).read_text(encoding="utf-8").strip()
        if variable not in environ:
            raise SettingsError(f"the environment variable {variable} (servers.auth.{kind}_env) is not set")
        return environ[variable]


_AZURE_SCOPE = re.compile(r"[^\s/]\S*/\.default", re.ASCII).fullmatch


class ServerSettings(_Section):
    """One PACS. The order of the list is the order of preference."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
    type: ServerType
    url: Annotated[str, Field(pattern=r"^https?://[^\s/@]+(/\S*)?$")]
    viewer: str = ""
    weight: Annotated[float, Field(ge=0)] = 1
    max_concurrency: Annotated[int, Field(ge=1)] = 8
    deletions: Literal["allow", "hide", "never"] = "allow"
    connect_timeout_s: Annotated[float, Field(gt=0)] = 5
    read_timeout_s: Annotated[float, Field(gt=0)] = 120
    ca_file: Path | None = None
    client_cert_file: Path | None = None
    client_key_file: Path | None = None
    retrieve_aet: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,16}$")] | None = None
    auth: AuthSettings = AuthSettings()

    @model_validator(mode="after")
    def _entities_of_dcm4chee(self) -> ServerSettings:
        if self.retrieve_aet and (self.type != "dcm4chee" or "/aets/" not in urlsplit(self.url).path):
            raise ValueError("retrieve_aet needs the type dcm4chee and a url with /aets/…/rs: leave it out")
        return self

    @model_validator(mode="after")
    def _certificate_of_tls(self) -> ServerSettings:
        if self.client_key_file and not self.client_cert_file:
            raise ValueError("client_key_file needs client_cert_file, the certificate that belongs to the key")
        if self.client_cert_file and not self.url.startswith("https://"):
            raise ValueError("client_cert_file needs a url with https: without TLS no certificate is sent")
        return self

    @field_validator("name")
    @classmethod
    def _not_a_mode(cls, name: str) -> str:
        if name in MODES:
            raise ValueError(f"{name!r} is the name of a mode")
        return name

    @field_validator("viewer")
    @classmethod
    def _template(cls, viewer: str) -> str:
        named = set(_PLACEHOLDER(viewer))
        if (viewer and not named) or named - VIEWER_PLACEHOLDERS:
            raise ValueError("a link has {study} in it, and perhaps {series} and {image}; no other names in braces")
        return viewer

    @field_validator("url")
    @classmethod
    def _bare(cls, url: str) -> str:
        return url.rstrip("/")


class RoutingSettings(_Section):
    policy: Literal["preferred", "weighted", "balanced"] = "preferred"
    claim_s: Annotated[float, Field(gt=0)] = 7 * 86_400


class S3Settings(_Section):
    """``buckets`` are those that may be used; none are without an entry, ``*`` stands for all.

    ``addressing_style``: where a request names the bucket, in the path or in the host.
    """

    buckets: tuple[str, ...] = ()
    endpoint_url: str | None = None
    region: str | None = None
    addressing_style: Literal["auto", "path", "virtual"] = "auto"


class AzureSettings(_Section):
    """One storage account. ``containers`` are those that may be used; none are without an entry, ``*`` stands for all.

    At most one credential, and named (``…_env``, ``…_file``), never written here; without one only public containers
    can be read.
    """

    containers: tuple[str, ...] = ()
    account_url: Annotated[str, Field(pattern=r"^https?://[^\s/@?#]+(/[^\s?#]*)?$")] | None = None
    connection_string_env: str | None = None
    connection_string_file: Path | None = None
    account_key_env: str | None = None
    account_key_file: Path | None = None
    sas_token_env: str | None = None
    sas_token_file: Path | None = None

    @model_validator(mode="after")
    def _complete(self) -> AzureSettings:
        kinds = [kind for kind in AZURE_CREDENTIALS if self._names(kind)]
        if len(kinds) > 1:
            raise ValueError(f"name one credential, not {' and '.join(kinds)}")
        if kinds == ["connection_string"] and self.account_url:
            raise ValueError("the connection string says where the account is; leave account_url out")
        if (self.containers or kinds) and not self.account_url and kinds != ["connection_string"]:
            raise ValueError("account_url or a connection string is needed")
        return self

    def credential(self, environ: Mapping[str, str] = os.environ) -> tuple[str, str]:
        """The kind of the credential (one of `AZURE_CREDENTIALS`) and the credential; two empty words if none is named.

        Raises
        ------
        SettingsError
            It is not where the settings point.
        """
        for kind in AZURE_CREDENTIALS:
            if variable := getattr(self, f"{kind}_env"):
                if variable not in environ:
                    raise SettingsError(f"the environment variable {variable} (azure.{kind}_env) is not set")
                return kind, environ[variable].strip()
            if file := getattr(self, f"{kind}_file"):
                try:
                    return kind, Path(file).read_text(encoding="utf-8").strip()
                except (OSError, ValueError):
                    raise SettingsError(f"the file {file} (azure.{kind}_file) cannot be read") from None
        return "", ""

    def _names(self, kind: str) -> bool:
        return bool(getattr(self, f"{kind}_env") or getattr(self, f"{kind}_file"))


#: A host, everything below one (``*.example.org``), an address (IPv6 in brackets) or ``*``. Then ``:`` and a port, or
#: ``*`` for every port; without that the scheme's own port is meant.
HostPattern = Annotated[str, Field(pattern=r"^(\*|(\*\.)?[^\s*/:@\[\]?#]+|\[[0-9A-Fa-f:.]+\])(:([0-9]{1,5}|\*))?$")]


class SourceSettings(_Section):
    allow_hosts: tuple[HostPattern, ...] = ()
    allow_private_networks: bool = False
    folders: tuple[Path, ...] = ()
    max_bytes: Annotated[int, Field(gt=0)] = 4_294_967_296
    connect_timeout_s: Annotated[float, Field(gt=0)] = 5
    idle_timeout_s: Annotated[float, Field(gt=0)] = 30
    total_timeout_s: Annotated[float, Field(gt=0)] = 900
    max_redirects: Annotated[int, Field(ge=0)] = 5
    ca_file: Path | None = None
    #: With a user name and password, if the proxy wants them; a secret then.
    proxy: Annotated[str | None, Field(repr=False)] = None
    s3: S3Settings = S3Settings()
    azure: AzureSettings = AzureSettings()

    @field_validator("proxy")
    @classmethod
    def _of_a_proxy(cls, proxy: str | None) -> str | None:
        """Refused in words of our own, which quote none of it."""
        if proxy is not None and not _is_proxy(proxy):
            raise ValueError(
                "it is no URL of a proxy; write http://host:port, or http://user:password@host:port with the user name"
                " and password percent-encoded and in ASCII"
            )
        return proxy


def _is_proxy(text: str) -> bool:
    try:
        parts = urlsplit(text)
        _ = parts.port  # raises where it is no number
    except ValueError:
        return False
    account = unquote(f"{parts.username or ''}{parts.password or ''}")
    bare = parts.path in ("", "/") and not parts.query and not parts.fragment and parts.netloc.count("@") <= 1
    plain = text.isascii() and account.isascii() and account.isprintable() and not re.search(r"\s", text)
    return parts.scheme == "http" and bool(parts.hostname) and bare and plain


class DownloadSettings(_Section):
    """Where downloads may go: below ``folders``, into buckets of ``s3``, into containers of ``azure``; nowhere else."""

    folders: tuple[Path, ...] = ()
    s3: S3Settings = S3Settings()
    azure: AzureSettings = AzureSettings()


def places_of(settings: SourceSettings | DownloadSettings) -> list[str]:
    """The folders, buckets and containers that the settings name, as URLs; not those that a pattern stands for."""
    named = [f"s3://{bucket}/" for bucket in settings.s3.buckets]
    named += [f"az://{container}/" for container in settings.azure.containers]
    folders = [Path(os.path.abspath(folder)).as_uri().rstrip("/") + "/" for folder in settings.folders]
    return folders + [place for place in named if not set("*?[") & set(place)]


class DeletionSettings(_Section):
    """What an order that deletes needs, on all servers. What one server allows is in its own ``deletions``."""

    max_studies_per_order: Annotated[int, Field(ge=1)] | None = None


class ResultSettings(_Section):
    metadata: Literal["full", "uids", "none"] = "full"
    expires_s: Annotated[int, Field(gt=0)] = 86_400


class SigningSettings(_Section):
    """Whose messages a worker takes: without these three keys, those of every program that reaches the broker."""

    key_file: Path | None = None
    certificate_file: Path | None = None
    trusted_folder: Path | None = None
    destructive_senders: Annotated[tuple[str, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _complete(self) -> SigningSettings:
        missing = [name for name in ("key_file", "certificate_file", "trusted_folder") if not getattr(self, name)]
        if 0 < len(missing) < 3:
            raise ValueError(f"signing also needs {' and '.join(missing)}")
        if self.destructive_senders is not None and missing:
            raise ValueError("destructive_senders needs signing: set key_file, certificate_file and trusted_folder")
        return self

    @property
    def on(self) -> bool:
        return self.key_file is not None


#: The schemes of brokers that Celery knows (``kombu.transport.TRANSPORT_ALIASES``), which is not imported down here.
BROKERS = frozenset(
    [
        "SLMQ",
        "SQS",
        "amqp",
        "amqps",
        "azureservicebus",
        "azurestoragequeues",
        "confluentkafka",
        "consul",
        "etcd",
        "filesystem",
        "gcpubsub",
        "kafka",
        "librabbitmq",
        "memory",
        "mongodb",
        "pgmq",
        "pyamqp",
        "pyro",
        "qpid",
        "redis",
        "rediss",
        "sentinel",
        "slmq",
        "sqla",
        "sqlalchemy",
        "sqs",
        "zookeeper",
    ]
)

#: The same of result back-ends (``celery.app.backends.BACKEND_ALIASES``).
BACKENDS = frozenset(
    [
        "arangodb",
        "azureblockblob",
        "cache",
        "cassandra",
        "consul",
        "cosmosdbsql",
        "couchbase",
        "couchdb",
        "database",
        "db",
        "disabled",
        "dynamodb",
        "elasticsearch",
        "file",
        "gs",
        "mongodb",
        "redis",
        "rediss",
        "riak",
        "rpc",
        "s3",
        "sentinel",
    ]
)


class QueueSettings(_Section):
    """Where messages, results and the ledger live. Three databases, so that none can flush another's keys."""

    broker_url: str = "redis://localhost:6379/0"
    result_backend: str = "redis://localhost:6379/1"
    ledger_url: str = "redis://localhost:6379/2"
    key_prefix: str = PREFIX
    read_old_queues: bool = False
    signing: SigningSettings = SigningSettings()

    @field_validator("broker_url", "result_backend", "ledger_url")
    @classmethod
    def _readable(cls, url: str) -> str:
        """Refused here in words of our own: a library that reads a malformed URL later quotes its password."""
        if any(_malformed(one) for one in _NEXT_URL.split(url)):
            raise ValueError("it is no URL; write : / ? # @ [ ] ; in a user name or password percent-encoded")
        return url

    @field_validator("broker_url", "result_backend", "ledger_url")
    @classmethod
    def _without_sentinels(cls, url: str) -> str:
        """Broker, results and ledger would have to follow a fail-over together, and the ledger does not yet."""
        if any("sentinel" in one.lower().partition(":")[0].split("+") for one in _NEXT_URL.split(url)):
            raise ValueError(
                "Redis Sentinel is not supported: broker, results and ledger would have to follow a fail-over together;"
                " name one Redis server (redis:// or rediss://) in all three URLs"
            )
        return url

    @field_validator("broker_url")
    @classmethod
    def _of_a_broker(cls, url: str) -> str:
        urls = [redis_urls.canonical(one, "celery") for one in _NEXT_URL.split(url)]
        if any("://" in one and one.partition("://")[0].partition("+")[0] not in BROKERS for one in urls):
            raise ValueError("Celery knows no such broker; for Redis write redis:// or rediss://")
        return ";".join(urls)

    @field_validator("result_backend")
    @classmethod
    def _of_results(cls, url: str) -> str:
        url = redis_urls.canonical(url, "celery")
        if "://" in url and url.partition("://")[0].partition("+")[0] not in BACKENDS:
            raise ValueError("Celery knows no such result back-end; for Redis write redis:// or rediss://")
        return url

    @field_validator("key_prefix")
    @classmethod
    def _of_keys(cls, prefix: str) -> str:
        """Lua scripts hold it as it stands. A hash tag without a name is none to Redis."""
        if len(prefix) > 64 or not _KEY_PREFIX(prefix):
            raise ValueError(
                "a prefix of keys has at most 64 characters: letters, digits, '_', '-', '.', ':', perhaps one name in"
                " braces, and ':' at the end, such as courier: or {courier-a}:"
            )
        return prefix

    @model_validator(mode="after")
    def _old_queues_of_redis(self) -> QueueSettings:
        if self.read_old_queues and not self.broker_url.lower().startswith(("redis:", "rediss:", "redis+")):
            raise ValueError(
                "read_old_queues needs a broker that is Redis; on another one let workers of version 0.1 empty their"
                " queues before you stop them (docs/upgrade.md)"
            )
        return self

    @field_validator("ledger_url")
    @classmethod
    def _of_redis(cls, url: str) -> str:
        if redis_urls.scheme_of(url) not in redis_urls.SCHEMES:
            raise ValueError("it is no URL of a Redis: redis://, rediss:// or unix://")
        return redis_urls.canonical(url, "redis-py")

    @property
    def for_celery(self) -> dict[str, Any]:
        """Broker and result back-end as Celery's configuration names them."""
        over_tcp = not redis_urls.is_socket(self.result_backend)  # redis-py knows no keep-alive of a Unix socket
        return {
            "broker_url": self.broker_url,
            "result_backend": self.result_backend,
            "redis_socket_keepalive": over_tcp,
        }

    def at(self, **urls: str | None) -> QueueSettings:
        """The same with other URLs, as far as they are given.

        Raises
        ------
        SettingsError
            One of them cannot be read; none of it is quoted.
        """
        given = {name: url for name, url in urls.items() if url}
        try:
            return QueueSettings.model_validate({**self.model_dump(), **given})
        except ValidationError as error:
            raise SettingsError(setting_files.sentence(error, QueueSettings, given, {})) from None


_KEY_PREFIX = re.compile(r"(?=[^:])[\w:.-]*(\{[\w:.-]+\}[\w:.-]*)?:", re.ASCII).fullmatch
#: Several may stand behind one another: those of sentinels, or of brokers that take each other's place.
_NEXT_URL = re.compile(r";(?=[\w+.-]+://)")
#: What is read as RFC 3986 says. Celery knows more kinds of URL, some of which have a grammar of their own.
_PLAIN_SCHEMES = frozenset(("redis", "rediss", "sentinel", "amqp", "amqps", "pyamqp"))


def _malformed(url: str) -> bool:
    """Whether something stands in ``url`` where no URL has it, most likely a bare slash of a password."""
    if "://" not in url:
        return "@" in url
    if url.partition("://")[0].lower() not in _PLAIN_SCHEMES:
        return False
    try:
        parts = urlsplit(url)
        for host in re.split("[,;]", parts.netloc.rpartition("@")[2]):
            _ = urlsplit(f"//{host}").port  # raises where it is no number
    except ValueError:
        return True
    return "@" in parts.path + parts.fragment


class BreakerSettings(_Section):
    """When the circuit of a server that fails opens, and for how long."""

    failures: Annotated[int, Field(ge=1)] = 5
    window_s: Annotated[float, Field(gt=0)] = 900
    pause_s: Annotated[float, Field(gt=0)] = 5
    pause_cap_s: Annotated[float, Field(gt=0)] = 60


class JobSettings(_Section):
    """How long a job is held, how often it is tried."""

    lease_s: Annotated[float, Field(gt=0)] = 30
    grace_s: Annotated[float, Field(gt=0)] = 60
    sweep_s: Annotated[float, Field(gt=0)] = 1
    max_attempts: Annotated[int, Field(ge=1)] = 12
    max_deaths: Annotated[int, Field(ge=1)] = 3
    pending_wait_s: Annotated[float, Field(gt=0)] = 20
    backoff_base_s: Annotated[float, Field(gt=0)] = 1
    backoff_cap_s: Annotated[float, Field(gt=0)] = 60
    retry_after_cap_s: Annotated[float, Field(gt=0)] = 600
    max_wait_s: Annotated[float, Field(gt=0)] = 86_400


class WorkerSettings(_Section):
    """How a worker that gets nowhere is noticed."""

    watchdog_s: Annotated[float, Field(ge=0)] = 120
    hung_s: Annotated[float, Field(gt=0)] = 1200
    health_file: Path | None = None


class TelemetrySettings(_Section):
    """Where traces go and metrics are served; neither without an entry. ``OTEL_…`` names are OpenTelemetry's own."""

    otlp_endpoint: Annotated[str, Field(pattern=r"^https?://[^\s/@?#]+(/[^\s?#]*)?$")] | None = None
    service_name: Annotated[str, Field(min_length=1)] = "pacs-courier"
    metrics_port: Annotated[int, Field(ge=0, le=65_535)] = 0
    metrics_host: Annotated[str, Field(min_length=1)] = "127.0.0.1"


class LogSettings(_Section):
    """``auto``: text on a terminal, JSON otherwise."""

    format: Literal["auto", "json", "text"] = "auto"


class Settings(_Section):
    servers: tuple[ServerSettings, ...] = ()
    routing: RoutingSettings = RoutingSettings()
    sources: SourceSettings = SourceSettings()
    downloads: DownloadSettings = DownloadSettings()
    deletions: DeletionSettings = DeletionSettings()
    results: ResultSettings = ResultSettings()
    queue: QueueSettings = QueueSettings()
    jobs: JobSettings = JobSettings()
    worker: WorkerSettings = WorkerSettings()
    logs: LogSettings = LogSettings()
    breaker: BreakerSettings = BreakerSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @field_validator("servers")
    @classmethod
    def _unique(cls, servers: tuple[ServerSettings, ...]) -> tuple[ServerSettings, ...]:
        names = [server.name for server in servers]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two servers are called {', '.join(sorted(twice))}")
        return servers

    @classmethod
    def load(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read the file that ``PACS_CONFIG`` names, then lay ``PACS__SECTION__KEY`` variables over it.

        ``BROKER_URL``, ``RESULT_BACKEND`` and ``LEDGER_URL`` are short names of the three keys of ``[queue]``, and the
        ``OTEL_…`` variables of `SHORT_NAMES` those of ``[telemetry]``.

        Raises
        ------
        SettingsError
            The file is missing or not TOML, or a value is wrong; the sentence names the key.
        """
        tree = setting_files.read(environ)
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise SettingsError(setting_files.sentence(error, cls, tree, environ)) from None
