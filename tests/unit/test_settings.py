"""Settings: read once, overridable, and wrong ones stop the start with one sentence that names the key."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery.app.backends import BACKEND_ALIASES
from kombu.transport import TRANSPORT_ALIASES
from pydantic import BaseModel, ValidationError

from courier.settings import BACKENDS, BROKERS, AuthSettings, ServerSettings, Settings, SettingsError

SERVER = '[[servers]]\nname = "msdicom"\ntype = "msdicom"\nurl = "http://localhost:8080/v2/"\n'
AZURE = "[downloads.azure]\naccount_url = 'https://account.example'\n"
DOCS = (Path(__file__).parents[2] / "docs" / "settings.md").read_text(encoding="utf-8")


def load(tmp_path: Path, text: str, **environ: str) -> Settings:
    file = tmp_path / "pacs.toml"
    file.write_text(text, encoding="utf-8")
    return Settings.load({"PACS_CONFIG": str(file), **environ})


BAD_PREFIXES = ["", " ", ":", "courier", "cou rier:", "courier:\n", "courier:*:", "c?:", "[c]:", "ü:", "c':", "c\\:"]


@pytest.mark.parametrize("prefix", [*BAD_PREFIXES, "{}:", "{a}{b}:", "{a:", "a}:", "x" * 64 + ":"])
def test_a_bad_prefix_of_keys_is_one_sentence_that_names_the_key(tmp_path: Path, prefix: str) -> None:
    with pytest.raises(SettingsError, match=r"^setting queue\.key_prefix: a prefix of keys has .*[^.]$"):
        Settings.load({"PACS__QUEUE__KEY_PREFIX": prefix})


@pytest.mark.parametrize("prefix", ["courier:", "{courier-a}:", "a:b.c_d:", "x:{y:z}:w:", "x" * 63 + ":"])
def test_a_prefix_of_keys_may_hold_a_hash_tag(prefix: str) -> None:
    assert Settings.load({"PACS__QUEUE__KEY_PREFIX": prefix}).queue.key_prefix == prefix
    assert Settings.load({}).queue.model_copy(update={"key_prefix": prefix}).at().key_prefix == prefix


def test_nothing_set_gives_the_defaults() -> None:
    assert Settings.load({}) == Settings()


def test_the_file_is_read_and_the_environment_lies_over_it(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        SERVER + '[routing]\npolicy = "weighted"\n',
        PACS__ROUTING__POLICY="balanced",
        PACS__SERVERS__0__WEIGHT="3",
        PACS__SOURCES__ALLOW_HOSTS='["a.example", "*.b.example"]',
        BROKER_URL="amqp://rabbit",
    )
    assert settings.routing.policy == "balanced"
    assert settings.servers[0].weight == 3
    assert settings.servers[0].url == "http://localhost:8080/v2"
    assert settings.sources.allow_hosts == ("a.example", "*.b.example")
    assert settings.queue.broker_url == "amqp://rabbit"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[routing]\npolicy = 'random'", r"setting routing\.policy: .*'preferred'"),
        ("[jobs]\nlease_s = 'soon'", r"setting jobs\.lease_s: "),
        ("[jobs]\nlease_s = 0", r"setting jobs\.lease_s: .*greater than 0"),
        ("[rooting]\npolicy = 'preferred'", r"setting rooting: there is no such key; did you mean routing\?"),
        (SERVER + SERVER, r"setting servers: two servers are called msdicom"),
        (SERVER.replace("msdicom", "both", 1), r"setting servers\.both\.name: 'both' is the name of a mode"),
        (SERVER.replace("http://localhost", "http://me:secret@localhost"), r"setting servers\.msdicom\.url"),
        ("[[servers]]\ntype = 'msdicom'\nurl = 'http://a'", r"setting servers\.0\.name: Field required"),
        (
            SERVER + "urll = 'http://secret'",
            r"setting servers\.msdicom\.urll: there is no such key; did you mean url\?",
        ),
        (
            SERVER + "[servers.auth]\nuser = 'secret'",
            r"servers\.msdicom\.auth\.user: .*did you mean username\?",
        ),
        (
            "[sources.s3]\nBuckets = ['a']",
            r"sources\.s3\.Buckets: there is no such key; did you mean buckets\?",
        ),
        ("[jobs]\nx = 1", r"setting jobs\.x: there is no such key; known are backoff_base_s, backoff_cap_s, "),
        ("[server]\nname = 'a'", r"setting server: there is no such key; did you mean servers\?"),
        (SERVER + "viewer = 'http://v/secret'", r"setting servers\.msdicom\.viewer: a link has \{study\} in it"),
        (SERVER + "viewer = 'http://v/{StudyInstanceUID}'", r"setting servers\.msdicom\.viewer: .*no other names"),
        (SERVER + "viewer = 'http://v/{study}/{serie}'", r"setting servers\.msdicom\.viewer: .*no other names"),
        (SERVER + 'auth = { type = "oauth2" }', r"servers\.msdicom\.auth: auth type 'oauth2' needs token_url"),
        (
            "[sources.azure]\ncontainers = ['a']",
            r"setting sources\.azure: account_url or a connection string is needed",
        ),
        (AZURE + "account_key_env = 'A'\nsas_token_file = 'b'", r"name one credential, not account_key and sas_token"),
        (AZURE + "connection_string_env = 'A'", r"setting downloads\.azure: the connection string says where"),
        (AZURE.replace("https://", "https://me:secret@"), r"setting downloads\.azure\.account_url"),
        (AZURE.replace(".example", ".example/?sig=secret"), r"setting downloads\.azure\.account_url"),
        ("[routing\n", r"is not valid TOML"),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_the_key(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        (
            "PACS__SERVERS__9__URL",
            "http://PLANTED",
            r"PACS__SERVERS__9__URL names '9' of .* 0 \(msdicom\)$",
        ),
        ("PACS__SERVERS__X__URL", "http://PLANTED", r"the variable PACS__SERVERS__X__URL names 'x' of a list that has"),
        ("PACS__SERVERS__-1__URL", "http://PLANTED", r"names '-1' of a list that has 0 \(msdicom\)$"),
        ("PACS__SERVERS__²__URL", "http://PLANTED", r"names '²' of a list"),
        ("PACS__SERVERS__MSDICOM__URLL", "PLANTED", r"setting servers\.msdicom\.urll: .*did you mean url\?"),
        ("PACS__SERVERS__MSDICOM__TYPE", "PLANTED", r"setting servers\.msdicom\.type: "),
        ("PACS__JOBS__LEASE_S__X", "1", r"the variable PACS__JOBS__LEASE_S__X stands for no key: lease_s is a value"),
        (
            "PACS__SOURCES__ALLOW_HOSTS",
            "['PLANTED']",
            r"setting sources\.allow_hosts: the variable PACS__SOURCES",
        ),
        ("PACS__SERVERS", '[{"name": "PLANTED"', r"setting servers: the variable PACS__SERVERS is not JSON"),
        ("PACS__JOBS", "{lease_s: 1}", r"setting jobs: the variable PACS__JOBS is not JSON"),
        ("PACS__RUOTING__POLICY", "x", r"setting ruoting: there is no such key; did you mean routing\?"),
        ("PACS__QUEUE__BROKER", "x", r"setting queue\.broker: there is no such key; did you mean broker_url\?"),
    ],
)
def test_a_variable_that_stands_for_nothing_is_one_sentence_that_names_it(
    tmp_path: Path, variable: str, value: str, sentence: str
) -> None:
    with pytest.raises(SettingsError, match=sentence) as caught:
        load(tmp_path, SERVER + "[jobs]\nlease_s = 5\n", **{variable: value})
    assert "\n" not in str(caught.value)
    assert "PLANTED" not in "".join(traceback.format_exception(caught.value))


def test_a_server_of_no_list_is_one_sentence() -> None:
    with pytest.raises(
        SettingsError, match=r"^setting servers: it is a list: write \[\[servers\]\] tables in the file"
    ):
        Settings.load({"PACS__SERVERS__0__URL": "http://a"})


def test_a_variable_names_a_server_by_its_name_or_its_number(tmp_path: Path) -> None:
    by_name = load(tmp_path, SERVER, PACS__SERVERS__MSDICOM__WEIGHT="3", PACS__SERVERS__0__READ_TIMEOUT_S="7")
    assert (by_name.servers[0].weight, by_name.servers[0].read_timeout_s) == (3, 7)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (SERVER.encode() + b"# f\xfcr alle\n", r"pacs\.toml is not UTF-8 \(line \d+\); save it in that encoding$"),
        (SERVER.encode("utf-16"), r"pacs\.toml is not UTF-8 \(line 1\)"),
    ],
)
def test_a_file_in_another_encoding_is_one_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "pacs.toml").write_bytes(content)
    with pytest.raises(SettingsError, match=sentence):
        Settings.load({"PACS_CONFIG": str(tmp_path / "pacs.toml")})


def test_a_file_of_the_windows_editor_is_read(tmp_path: Path) -> None:
    (tmp_path / "pacs.toml").write_bytes(SERVER.replace("\n", "\r\n").encode("utf-8-sig"))
    assert Settings.load({"PACS_CONFIG": str(tmp_path / "pacs.toml")}).servers[0].name == "msdicom"


@pytest.mark.parametrize("variable", ["BROKER_URL", "RESULT_BACKEND", "LEDGER_URL"])
@pytest.mark.parametrize(
    "url",
    [
        "redis://:PLANTED/x@host:6379/0",
        "redis://:PLANTED#x@host:6379/0",
        "redis://:PLANTED?x@host:6379/0",
        "redis://:PLANTED[x@host:6379/0",
        "redis://:PLANTED\u2100@host:6379/0",
        "redis://user:123/PLANTED@host:6379/0",
        "redis://user:123#PLANTED@host:6379/0",
        "redis://:PLANTED@host:port/0",
        "redis://:PLANTED@host:99999/0",
        "rediss://:PLANTED/x@host:6379/0",
        "redis:/:PLANTED@host/0",
        "amqp://user:PLANTED/x@host:5672//",
        "sentinel://a:26379;sentinel://:PLANTED/x@b:26379",
    ],
)
def test_a_malformed_url_of_the_queue_is_named_and_none_of_it_is_told(variable: str, url: str) -> None:
    key = {"BROKER_URL": "broker_url", "RESULT_BACKEND": "result_backend", "LEDGER_URL": "ledger_url"}[variable]
    with pytest.raises(SettingsError, match=rf"setting queue\.{key}: it is no URL") as caught:
        Settings.load({variable: url})
    assert "PLANTED" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost:6379/0",
        "redis://",
        "redis://:6379/0",
        "redis://[::1]:6379/0",
        "redis://user:a%2Fb%40c@host/0",
        "redis://:a;b@host:6379/0",
        "rediss://:secret@host:6379/0?ssl_cert_reqs=required&ssl_ca_certs=/etc/ca@site.pem",
        "amqp://guest:guest@one:5672//;amqp://two:5672//",
        "amqp://one,two//",
        "pyamqp://guest@localhost//",
        "memory://",
        "localhost",
        "sqs://key:secret@",
        "azureservicebus://policy:a/b=@space",
        "mongodb://one:27017,two:27017/jobs",
    ],
)
def test_urls_that_celery_understands_are_taken_as_they_are(url: str) -> None:
    assert Settings.load({"BROKER_URL": url}).queue.broker_url == url
    if re.split("[:+]", url)[0] in BACKENDS:
        assert Settings.load({"RESULT_BACKEND": url}).queue.result_backend == url


@pytest.mark.parametrize(
    "url", ["db+postgresql://me:secret@host/results", "file:///var/results@1", "cache+memory://", "rpc://"]
)
def test_results_may_lie_where_messages_cannot(url: str) -> None:
    assert Settings.load({"RESULT_BACKEND": url}).queue.result_backend == url
    with pytest.raises(SettingsError, match="Celery knows no such broker") as caught:
        Settings.load({"BROKER_URL": url})
    assert "secret" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("url", ["redis://:a;b@host:6379/0", "rediss://host", "unix:///run/redis.sock?db=2"])
def test_a_ledger_is_in_any_redis(url: str) -> None:
    assert Settings.load({"LEDGER_URL": url}).queue.ledger_url == url


SOCKET = "/run/redis@1.sock"


@pytest.mark.parametrize(
    ("url", "for_celery", "for_redis_py"),
    [
        (f"unix://{SOCKET}?db=2", f"redis+socket://{SOCKET}?virtual_host=2", f"unix://{SOCKET}?db=2"),
        (f"unix://{SOCKET}", f"redis+socket://{SOCKET}?virtual_host=0", f"unix://{SOCKET}?db=0"),
        (f"redis+socket://{SOCKET}?virtual_host=2", f"redis+socket://{SOCKET}?virtual_host=2", f"unix://{SOCKET}?db=2"),
        (
            f"Socket://:a%2Fb@{SOCKET}?db=2",
            f"redis+socket://:a%2Fb@{SOCKET}?virtual_host=2",
            f"unix://:a%2Fb@{SOCKET}?db=2",
        ),
        (
            f"unix://{SOCKET}?password=a%2Fb",
            f"redis+socket://:a%2Fb@{SOCKET}?virtual_host=0",
            f"unix://:a%2Fb@{SOCKET}?db=0",
        ),
        ("redis://host?db=3", "redis://host/3", "redis://host/3"),
        ("redis://host/?db=3", "redis://host/3", "redis://host/3"),
        ("redis://host/3?db=3", "redis://host/3", "redis://host/3"),
        ("redis://host/03", "redis://host/3", "redis://host/3"),
        ("REDIS://me:x@[::1]:7/3", "redis://me:x@[::1]:7/3", "redis://me:x@[::1]:7/3"),
        ("redis://host/3?username=a@b&password=%C3%BC", "redis://a%40b:%C3%BC@host/3", "redis://a%40b:%C3%BC@host/3"),
        (
            "rediss://host?db=1&ssl_ca_certs=/etc/ca.pem",
            "rediss://host/1?ssl_ca_certs=/etc/ca.pem",
            "rediss://host/1?ssl_ca_certs=/etc/ca.pem",
        ),
    ],
)
def test_each_form_of_a_url_of_redis_is_read_by_all_three(url: str, for_celery: str, for_redis_py: str) -> None:
    queue = Settings.load({"BROKER_URL": url, "RESULT_BACKEND": url, "LEDGER_URL": url}).queue
    assert (queue.broker_url, queue.result_backend, queue.ledger_url) == (for_celery, for_celery, for_redis_py)
    assert queue.at(ledger_url=url) == queue


@pytest.mark.parametrize("variable", ["BROKER_URL", "RESULT_BACKEND", "LEDGER_URL"])
@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("redis://:PLANTED@host/jobs", "a database of Redis is a number"),
        ("redis://:PLANTED@host?db=-1", "a database of Redis is a number"),
        ("unix:///run/redis.sock?password=PLANTED&db=", "a database of Redis is a number"),
        ("redis://:PLANTED@host/1?db=2", "it names two databases"),
        ("redis://:PLANTED@host/1?socket_timeout=5", "no URL of a Redis has the option 'socket_timeout'"),
        ("redis://:PLANTED@host/1?ssl_cert_reqs=none", "the option 'ssl_cert_reqs' needs rediss://"),
        ("unix://run/redis.sock?password=PLANTED", "the path of the socket follows three slashes"),
        ("unix://?password=PLANTED", "the path of the socket follows three slashes"),
    ],
)
def test_a_url_that_redis_py_or_celery_cannot_read_is_one_sentence(variable: str, url: str, sentence: str) -> None:
    with pytest.raises(SettingsError, match=rf"^setting queue\.\w+: {sentence}") as caught:
        Settings.load({variable: url})
    assert "\n" not in str(caught.value)
    assert "PLANTED" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("url", ["amqp://user:PLANTED@host//", "PLANTED"])
def test_a_ledger_is_in_a_redis_only(url: str) -> None:
    with pytest.raises(SettingsError, match=r"setting queue\.ledger_url: it is no URL of a Redis") as caught:
        Settings.load({"LEDGER_URL": url})
    assert "PLANTED" not in str(caught.value)


@pytest.mark.parametrize("variable", ["BROKER_URL", "RESULT_BACKEND", "LEDGER_URL"])
@pytest.mark.parametrize(
    "url",
    [
        "sentinel://:PLANTED@a:26379/0",
        "sentinel://:PLANTED@a:26379;sentinel://:PLANTED@b:26379/0",
        "redis://:PLANTED@a/0;sentinel://b:26379",
        "Sentinel://:PLANTED@a:26379;b:26379",
        "sentinel+rediss://:PLANTED@a:26379/0",
        "redis+sentinel://:PLANTED@a:26379/mymaster/0",
        "redis://a/0;redis+SENTINEL://:PLANTED/x@b:26379",
    ],
)
def test_sentinels_are_refused_in_one_sentence_as_long_as_the_ledger_cannot_follow_them(
    variable: str, url: str
) -> None:
    with pytest.raises(SettingsError, match=r"^setting queue\.\w+: Redis Sentinel is not supported") as caught:
        Settings.load({variable: url})
    assert "\n" not in str(caught.value)
    assert "PLANTED" not in "".join(traceback.format_exception(caught.value))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.toml"):
        Settings.load({"PACS_CONFIG": "nowhere.toml"})


def test_a_secret_is_read_where_the_settings_point(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("from the file\n", encoding="utf-8")
    by_file = AuthSettings(type="bearer", token_file=file)
    by_name = AuthSettings(type="bearer", token_env="TOKEN")
    assert by_file.secret("token", {}) == "from the file"
    assert by_name.secret("token", {"TOKEN": "from the environment"}) == "from the environment"
    with pytest.raises(SettingsError, match="TOKEN"):
        by_name.secret("token", {})


def sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from sections(inner, f"{path}{name}.")
        elif name != "servers":
            yield path, name


def test_every_setting_stands_in_the_documentation() -> None:
    keys = [name for _, name in [*sections(Settings), *sections(ServerSettings)]]
    assert [name for name in keys if not re.search(rf"`{name}`", DOCS)] == []


@pytest.mark.parametrize(
    ("type_", "url", "aet", "valid"),
    [
        ("dcm4chee", "http://arc:8080/dcm4chee-arc/aets/DCM4CHEE/rs", "AS_RECEIVED", True),
        ("dcm4chee", "http://arc:8080/dcm4chee-arc/aets/DCM4CHEE/rs", "A/../B", False),
        ("dcm4chee", "http://arc:8080/dcm4chee-arc/aets/DCM4CHEE/rs", "LONGER_THAN_TITLES", False),
        ("dcm4chee", "http://proxy/pacs", "AS_RECEIVED", False),
        ("orthanc", "http://orthanc:8042/dicom-web", "AS_RECEIVED", False),
    ],
)
def test_only_a_dcm4chee_has_another_application_entity_to_retrieve_from(
    type_: Any, url: str, aet: str, valid: bool
) -> None:
    given = {"name": "ward", "type": type_, "url": url, "retrieve_aet": aet}
    if valid:
        assert ServerSettings.model_validate(given).retrieve_aet == aet
        return
    with pytest.raises(ValidationError, match="retrieve_aet"):
        ServerSettings.model_validate(given)


def test_every_broker_that_celery_knows_is_known() -> None:
    assert set(TRANSPORT_ALIASES) == BROKERS
    assert set(BACKEND_ALIASES) == BACKENDS


def test_an_unknown_result_back_end_is_one_sentence() -> None:
    with pytest.raises(SettingsError, match=r"queue\.result_backend: Celery knows no such result back-end") as caught:
        Settings.load({"RESULT_BACKEND": "postgresql://me:PLANTED@host/results"})
    assert "PLANTED" not in str(caught.value)
