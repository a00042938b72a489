"""Which URLs a worker may fetch and which addresses it may connect to: tables of forms, nothing is opened."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from courier.errors import SourceNotAllowed
from courier.settings import SettingsError, SourceSettings
from worker.storage.policy import Policy, normal_host

ALLOWED = ("images.example.org", "*.blob.core.windows.net", "bücher.example", "ports.example:8080", "93.184.216.34")
EVERY_HOST = Policy(SourceSettings(allow_hosts=("*",)))
LISTED = Policy(SourceSettings(allow_hosts=ALLOWED))
PRIVATE_TOO = Policy(SourceSettings(allow_hosts=("*",), allow_private_networks=True))


def allows_address(policy: Policy, address: str) -> bool:
    try:
        policy.check_address(address, host="images.example.org")
    except SourceNotAllowed:
        return False
    return True


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("http://images.example.org/a", "images.example.org", 80),
        ("https://images.example.org/a", "images.example.org", 443),
        ("HTTPS://IMAGES.EXAMPLE.ORG/a", "images.example.org", 443),
        ("http://images.example.org./a", "images.example.org", 80),
        ("http://images.example.org", "images.example.org", 80),
        ("http://images.example.org?x=1", "images.example.org", 80),
        ("http://images.example.org:/a", "images.example.org", 80),
        ("https://acct.blob.core.windows.net/c/b?sig=x", "acct.blob.core.windows.net", 443),
        ("https://a.b.blob.core.windows.net/c", "a.b.blob.core.windows.net", 443),
        ("http://bücher.example/a", "xn--bcher-kva.example", 80),
        ("http://xn--bcher-kva.example/a", "xn--bcher-kva.example", 80),
        ("http://BÜCHER.example/a", "xn--bcher-kva.example", 80),
        ("http://ports.example:8080/a", "ports.example", 8080),
        ("http://93.184.216.34/a", "93.184.216.34", 80),
        ("http://images。example。org/a", "images.example.org", 80),
    ],
)
def test_a_listed_host_is_allowed_in_every_honest_spelling(url: str, host: str, port: int) -> None:
    target = LISTED.read(url)
    assert (target.host, target.port) == (host, port)


@pytest.mark.parametrize(
    "url",
    [
        # hosts that only look like a listed one
        "http://evil.example/",
        "http://images.example.org.evil.example/",
        "http://evilimages.example.org/",
        "http://sub.images.example.org/",
        "http://example.org/",
        "http://blob.core.windows.net/",
        "http://evilblob.core.windows.net/",
        "http://ports.example/",
        "http://ports.example:8081/",
        "http://іmages.example.org/",  # a Cyrillic i
        # userinfo
        "http://user@images.example.org/",
        "http://user:s3cret@images.example.org/",
        "http://images.example.org@evil.example/",
        "http://images.example.org:80@evil.example/",
        "http://evil.example@images.example.org/",
        "http://@images.example.org/",
        "http://evil.example%40images.example.org/",
        # parsers that disagree
        "http://images.example.org\\@evil.example/",
        "http://evil.example\\.images.example.org/",
        "http://images.example.org\\.evil.example/",
        "http://images.example.org%2eevil.example/",
        "http://images.example.org%00.evil.example/",
        "http://images.example.org\x00.evil.example/",
        "http://images.example.org\r\nHost: evil.example/",
        "http://images.example.org\t/",
        "http://images.example.org /",
        "http:// images.example.org/",
        "\nhttp://images.example.org/",
        "http://evil.example#@images.example.org/",
        "http://evil.example?@images.example.org/",
        # no host, or none that can be one
        "http:///a",
        "http://",
        "http:images.example.org/a",
        "http://./",
        "http://images..example.org/",
        "http://images.example.org../",
        "http://.images.example.org/",
        "http://-images.example.org/",
        "http://" + "a" * 64 + ".blob.core.windows.net/",
        "http://" + "a." * 130 + "blob.core.windows.net/",
        "http://xn--/",
        # ports
        "https://images.example.org:8443/a",
        "http://images.example.org:22/",
        "http://images.example.org:443/",
        "https://images.example.org:80/",
        "http://acct.blob.core.windows.net:25/",
        "http://93.184.216.34:6379/",
        "http://images.example.org:0/",
        "http://images.example.org:65536/",
        "http://images.example.org:-1/",
        "http://images.example.org:8o/",
        # other schemes
        "ftp://images.example.org/",
        "gopher://images.example.org/",
        "dict://images.example.org:11211/",
        "file://images.example.org/etc/passwd",
        "file:///etc/passwd",
        "jar:http://images.example.org!/",
        "javascript:alert(1)",
        "data:,x",
        "//images.example.org/",
        "images.example.org/a",
        "",
        # brackets
        "http://[images.example.org]/",
        "http://[::1/",
        "http://::1]/",
        "http://[::1]evil.example/",
        "http://[fe80::1%25eth0]/",
        "http://[v1.fe80::1]/",
    ],
)
def test_anything_else_is_refused_before_a_name_is_resolved(url: str) -> None:
    with pytest.raises(SourceNotAllowed):
        LISTED.read(url)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "127.0.1",
        "127.255.255.254",
        "2130706433",
        "0x7f000001",
        "0x7f.0.0.1",
        "0x7f.1",
        "0177.0.0.1",
        "017700000001",
        "127.0.0.01",
        "127.0.0.1.",
        "127.0.0.0x1",
        "4294967297",
        "0",
        "0.0.0.0",
        "0.0.0.1",
        "①②⑦.⓪.⓪.①",
        "127。0。0。1",
        "10.0.0.1",
        "10.255.255.255",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "100.64.0.1",
        "169.254.169.254",
        "169.254.0.1",
        "0xa9fea9fe",
        "2852039166",
        "169.254.43518",
        "0251.0376.0251.0376",
        "168.63.129.16",
        "100.100.100.200",
        "192.0.0.192",
        "192.0.2.1",
        "198.18.0.1",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "[::]",
        "[::1]",
        "[0:0:0:0:0:0:0:1]",
        "[::127.0.0.1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::FFFF:10.0.0.1]",
        "[::ffff:169.254.169.254]",
        "[::ffff:0:127.0.0.1]",
        "[64:ff9b::127.0.0.1]",
        "[64:ff9b::a9fe:a9fe]",
        "[64:ff9b:1::1]",
        "[2002:7f00:1::]",
        "[2002:a00:1::1]",
        "[2002:a9fe:a9fe::]",
        "[2001:0:53aa:64c:0:0:80ff:fffe]",  # Teredo to 127.0.0.1
        "[fe80::1]",
        "[fec0::1]",
        "[fc00::1]",
        "[fd00:ec2::254]",
        "[fd20:ce::254]",
        "[ff02::1]",
        "[2001:db8::1]",
        "[3fff::1]",
        "[3fff:fff:ffff::1]",
        "[100:0:0:1::1]",
        "[2001:2::1]",
        "198.19.255.255",
        "198.51.100.7",
        "203.0.113.7",
        "192.88.99.1",
        "192.0.0.8",
        "[::ffff:192.0.2.1]",
        "[64:ff9b::203.0.113.1]",
        "[100::1]",
        "[4000::1]",
        "[5f00::1]",
    ],
)
def test_an_address_of_the_inside_is_refused_in_every_spelling_even_where_every_host_is_listed(host: str) -> None:
    with pytest.raises(SourceNotAllowed):
        EVERY_HOST.read(f"http://{host}/latest/meta-data/")


@pytest.mark.parametrize(
    "address",
    [
        "93.184.216.34",
        "8.8.8.8",
        "172.15.255.255",
        "172.32.0.1",
        "192.167.255.255",
        "223.255.255.254",
        "2606:2800:220:1::1",
        "3ffe:ffff::1",
        "3000::1",
        "192.0.1.1",
        "198.20.0.1",
        "64:ff9b::808:808",
        "::ffff:8.8.8.8",
        "2002:808:808::1",
    ],
)
def test_a_public_address_may_be_connected_to(address: str) -> None:
    assert allows_address(EVERY_HOST, address)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "::1", "10.0.0.1", "192.168.1.1", "100.64.0.1", "fd00::1", "::ffff:127.0.0.1", "64:ff9b::10.0.0.1"],
)
def test_private_networks_are_open_to_those_who_open_them_and_to_nobody_else(address: str) -> None:
    assert allows_address(PRIVATE_TOO, address)
    assert not allows_address(EVERY_HOST, address)


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "169.254.1.1",
        "fe80::1",
        "fe80::1%eth0",
        "fd00:ec2::254",
        "168.63.129.16",
        "::ffff:169.254.169.254",
        "64:ff9b::169.254.169.254",
        "224.0.0.1",
        "ff02::1",
        "0.0.0.0",
        "::",
        "255.255.255.255",
        "240.0.0.1",
    ],
)
def test_no_setting_opens_metadata_services_link_local_multicast_or_reserved_addresses(address: str) -> None:
    assert not allows_address(PRIVATE_TOO, address)


@given(st.integers(0, 2**32 - 1))
def test_an_ipv4_address_gets_the_same_judgement_in_each_of_its_ipv6_spellings(number: int) -> None:
    plain = ipaddress.IPv4Address(number)
    mapped = ipaddress.IPv6Address(f"::ffff:{plain}")
    nat64 = ipaddress.IPv6Address(f"64:ff9b::{plain}")
    tunnelled = ipaddress.IPv6Address((0x2002 << 112) | (number << 80) | 1)
    judgements = {allows_address(EVERY_HOST, str(address)) for address in (plain, mapped, nat64, tunnelled)}
    assert len(judgements) == 1


@given(st.text(max_size=80))
def test_no_text_escapes_as_anything_but_a_refusal_or_a_listed_host(text: str) -> None:
    for url in (text, f"http://{text}/", f"http://images.example.org{text}"):
        try:
            target = LISTED.read(url)
        except SourceNotAllowed:
            continue
        names = [entry for entry in ALLOWED if not entry.startswith("*")]
        known = {normal_host(name.split(":", maxsplit=1)[0]) for name in names}
        assert target.host in known or target.host.endswith(".blob.core.windows.net")


def test_without_an_allow_list_nothing_is_allowed() -> None:
    with pytest.raises(SourceNotAllowed, match=r"sources\.allow_hosts"):
        Policy(SourceSettings()).read("http://images.example.org/")


def test_a_refusal_never_quotes_a_password_or_a_query() -> None:
    for url in (
        "http://user:s3cret@images.example.org/?sig=s3cret",
        "http://evil.example/s3cret?sig=s3cret#s3cret",
        "s3cret://images.example.org/s3cret-s3cret",
    ):
        with pytest.raises(SourceNotAllowed) as refused:
            LISTED.read(url)
        assert "s3cret" not in str(refused.value)


def test_path_and_query_go_onto_the_wire_as_they_were_written() -> None:
    target = LISTED.read("https://images.example.org/a%2Fb/%c3%a9/../c?sig=a%2Bb%3D&x=1#part")
    assert target.request == "/a%2Fb/%c3%a9/../c?sig=a%2Bb%3D&x=1"


@pytest.mark.parametrize(
    "entry", ["img*.example.org", "https://images.example.org", "a b", "u@h", "*.*.org", "h/p", ""]
)
def test_an_allow_list_entry_that_is_no_host_pattern_stops_the_start(entry: str) -> None:
    with pytest.raises(ValidationError, match="allow_hosts"):
        SourceSettings(allow_hosts=(entry,))


def test_an_allow_list_entry_that_can_be_no_host_names_its_setting() -> None:
    with pytest.raises(SettingsError, match=r"sources\.allow_hosts"):
        Policy(SourceSettings(allow_hosts=("-images-.example.org",)))


@pytest.mark.parametrize(
    ("entry", "url"),
    [
        ("[::1]:8080", "http://[::1]:8080/"),
        ("[::1]", "http://[0:0::1]/"),
        ("*:8080", "http://anything.example:8080/"),
        ("LOCALHOST", "http://localhost/"),
        ("LOCALHOST:*", "http://localhost:99/"),
        ("[::1]:*", "https://[::1]:99/"),
        ("*.example.org:*", "http://a.example.org:99/"),
        ("*:*", "https://anything.example:99/"),
        ("*", "https://anything.example/"),
        ("*", "https://anything.example:443/"),
        ("h.example:0080", "http://h.example/"),
    ],
)
def test_an_allow_list_entry_may_be_an_address_a_port_of_any_host_or_in_capitals(entry: str, url: str) -> None:
    policy = Policy(SourceSettings(allow_hosts=(entry,), allow_private_networks=True))
    assert policy.read(url).url


def test_a_url_longer_than_a_job_may_hold_is_not_taken_apart() -> None:
    assert EVERY_HOST.read("http://h.example/" + "a" * 8_000)
    with pytest.raises(SourceNotAllowed, match="8192"):
        EVERY_HOST.read("http://[" + "::" * 100_000 + "]/")


@pytest.mark.parametrize(
    "address",
    [
        "64:ff9b:1::a9fe:a9fe",  # 169.254.169.254 below the network's own NAT64 prefix of 96,
        "64:ff9b:1:0:a9:fea9:fe00:0",  # of 64,
        "64:ff9b:1:a9:fe:a9fe::",  # of 56,
        "64:ff9b:1:a9fe:a9:fe00::",  # and of 48 bits
        "64:ff9b:1::6464:64c8",  # 100.100.100.200
    ],
)
def test_metadata_services_stay_shut_behind_a_networks_own_translation(address: str) -> None:
    assert not allows_address(PRIVATE_TOO, address)


def test_a_networks_own_translation_of_anything_else_is_private() -> None:
    assert allows_address(PRIVATE_TOO, "64:ff9b:1::c000:201")
    assert not allows_address(EVERY_HOST, "64:ff9b:1::c000:201")


@pytest.mark.parametrize("entry", ["*", "images.example.org", "*.example.org", "images.example.org:8443"])
def test_an_entry_opens_no_port_that_it_does_not_name(entry: str) -> None:
    policy = Policy(SourceSettings(allow_hosts=(entry,)))
    for port in (22, 25, 6379, 8080, 65535):
        with pytest.raises(SourceNotAllowed, match=f"add images.example.org:{port} to"):
            policy.read(f"http://images.example.org:{port}/")


def test_a_refusal_names_the_entry_that_would_allow_the_url() -> None:
    for url, entry in (
        ("http://h.example/", "h.example"),
        ("https://h.example:80/", "h.example:80"),
        ("http://[2606:4700::1]:81/", "[2606:4700::1]:81"),
    ):
        with pytest.raises(SourceNotAllowed) as refused:
            LISTED.read(url)
        assert f"add {entry} to sources.allow_hosts" in refused.value.message
        assert Policy(SourceSettings(allow_hosts=(entry,))).read(url)
