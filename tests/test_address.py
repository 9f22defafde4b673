"""Broker URLs and TLS settings."""

from __future__ import annotations

import ssl
from pathlib import Path
from urllib.parse import quote

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from cloudpubsub._address import Address, parse_url, redact
from cloudpubsub._errors import OptionError, TLSFileError
from cloudpubsub._tls import TLS


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("mqtt://host", Address("mqtt", "host", 1883, False)),
        ("mqtts://host/", Address("mqtts", "host", 8883, True)),
        ("MQTT://10.0.0.1:1", Address("mqtt", "10.0.0.1", 1, False)),
        ("mqtt://[::1]", Address("mqtt", "::1", 1883, False)),
        ("mqtts://[fe80::1%25eth0]:65535", Address("mqtts", "fe80::1%eth0", 65_535, True)),
        ("mqtt://u@büro.example", Address("mqtt", "büro.example", 1883, False)),
        ("ws://host", Address("ws", "host", 80, False, "/mqtt")),
        ("wss://u:p@host", Address("wss", "host", 443, True, "/mqtt")),
        ("wss://[::1]:8443/$hub/a%20b/", Address("wss", "::1", 8443, True, "/$hub/a%20b/")),
        ("WS://host:9001/", Address("ws", "host", 9001, False, "/")),
    ],
)
def test_urls_give_address_and_default_port(url: str, address: Address) -> None:
    assert parse_url(url).address == address
    assert parse_url(address.url).address == address


@pytest.mark.parametrize(
    "url",
    ["", "host", "host:1883", "http://h", "mqtt:/h", "mqtt://", "mqtt://:1883", "mqtt://h:", "mqtt://h:0", "mqtt://h:65536",
     "mqtt://h:x", "mqtt://h:１", "mqtt://h:-1", "mqtt://::1", "mqtt://[::1", "mqtt://[::1]x", "mqtt://[h]", "mqtt://h/p",
     "mqtt://h?q", "mqtt://h#f", "mqtt://a b", "mqtt://h\n", "mqtt://@h", "mqtt://:p@h", "mqtt://u:%zz@h", "mqtt://u:%ff@h",
     "mqtt://u:a/b@h", "mqtt://a..b", "mqtt://h!", "mqtt://" + "a." * 130 + "a", "ws://", "ws:///mqtt", "ws://h:x/p",
     "ws://h/p?q", "ws://h/p#f", "ws://h?q", "ws://h/ü", "ws://h/%zz", "ws://h/a b", "ws://h/a\\b", "ws://u:1/a@h"],
)  # fmt: skip
def test_wrong_urls_are_refused_by_name(url: str) -> None:
    with pytest.raises(OptionError, match=r"^broker: ") as caught:
        parse_url(url)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("value", [None, 5, b"mqtt://h"])
def test_a_url_of_another_type_is_refused(value: object) -> None:
    with pytest.raises(OptionError, match=r"^broker: "):
        parse_url(value)  # type: ignore[arg-type]


@given(st.text(min_size=1), st.text())
def test_credentials_are_percent_decoded(user: str, password: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in user + password):
        return
    parsed = parse_url(f"mqtt://{quote(user, safe='')}:{quote(password, safe='')}@h:1")
    assert (parsed.username, parsed.password) == (user, password)


@pytest.mark.parametrize(
    "url",
    ["mqtt://u:s3cret@", "mqtt://u:s3cret", "mqtt://u:s3/cret@h", "u:s3cret@h", "u:s3cret", "mqtt://u:a@s3cret@h:x",
     "http://u:s3cret@h", "mqtt://u:s3cret%@h", "mqtt://u:s3cret@h:99999", "mqtt://u: s3cret@h", "mqtt://u:s3://cret@h",
     "ws://u:s3cret@h/p?q", "ws://u:s3/cret@h", "wss://u:80/s3cret@h", "ws://u:s3cret@h/ü", "ws://u:s3cret"],
)  # fmt: skip
def test_no_error_shows_a_password(url: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_url(url)
    for text in (str(caught.value), repr(caught.value), redact(url)):
        assert "s3" not in text
        assert "cret" not in text


@pytest.mark.parametrize(
    ("url", "host", "origin"),
    [
        ("ws://host", "host", "http://host"),
        ("wss://host:443/x", "host", "https://host"),
        ("ws://host:443", "host:443", "http://host:443"),
        ("wss://büro.example:8443", "xn--bro-hoa.example:8443", "https://xn--bro-hoa.example:8443"),
        ("ws://[fe80::1%25eth0]:9001", "[fe80::1]:9001", "http://[fe80::1]:9001"),
    ],
)
def test_the_headers_of_a_websocket_name_the_host(url: str, host: str, origin: str) -> None:
    assert parse_url(url).address.http_headers == {"Host": host, "Origin": origin}


def test_repr_of_a_parsed_url_shows_no_credentials() -> None:
    assert "s3cret" not in repr(parse_url("mqtt://user:s3cret@h"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    for name in ("one", "two"):
        made = ca.issue_cert(f"{name}.example")
        made.cert_chain_pems[0].write_to_path(str(folder / f"{name}.pem"))
        made.private_key_pem.write_to_path(str(folder / f"{name}.key"))
    (folder / "nonsense.pem").write_text("nonsense")
    return folder


class TestTLS:
    def test_verification_is_on_by_default(self) -> None:
        context = TLS().context()
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.check_hostname
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2

    def test_insecure_turns_both_checks_off(self) -> None:
        context = TLS(insecure=True).context()
        assert context.verify_mode is ssl.CERT_NONE
        assert not context.check_hostname

    def test_given_ca_is_the_only_one_trusted(self, files: Path) -> None:
        assert len(TLS(ca=files / "ca.pem").context().get_ca_certs()) == 1

    def test_files_are_read_again_for_each_context(self, files: Path, tmp_path: Path) -> None:
        tls = TLS(ca=tmp_path / "late.pem")
        with pytest.raises(TLSFileError):
            tls.context()
        (tmp_path / "late.pem").write_bytes((files / "ca.pem").read_bytes())
        assert tls.context() is not tls.context()

    def test_client_certificate_is_loaded(self, files: Path) -> None:
        TLS(ca=files / "ca.pem", cert=files / "one.pem", key=files / "one.key", alpn=("mqtt",)).context()

    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"ca": "absent.pem"}, "absent.pem"),
            ({"ca": "nonsense.pem"}, "nonsense.pem"),
            ({"cert": "absent.pem"}, "absent.pem"),
            ({"cert": "one.pem", "key": "absent.key"}, "absent.key"),
            ({"cert": "one.pem", "key": "two.key"}, "two.key"),
            ({"cert": "one.pem", "key": "nonsense.pem"}, "nonsense.pem"),
        ],
    )
    def test_a_wrong_file_is_named(self, files: Path, settings: dict[str, str], named: str) -> None:
        tls = TLS(**{name: str(files / file) for name, file in settings.items()})  # type: ignore[arg-type]
        with pytest.raises(TLSFileError, match=named) as caught:
            tls.context()
        assert named in str(caught.value.filename)

    def test_an_encrypted_key_without_password_never_asks(self, files: Path, tmp_path: Path) -> None:
        from cryptography.hazmat.primitives import serialization as form

        key = form.load_pem_private_key((files / "one.key").read_bytes(), None)
        kept = form.BestAvailableEncryption(b"s3cret")
        (tmp_path / "k").write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, kept))
        with pytest.raises(TLSFileError, match="key_password is not set"):
            TLS(cert=files / "one.pem", key=tmp_path / "k").context()
        with pytest.raises(TLSFileError, match="password") as caught:
            TLS(cert=files / "one.pem", key=tmp_path / "k", key_password="wr0ng").context()
        assert "wr0ng" not in str(caught.value)
        right = TLS(cert=files / "one.pem", key=tmp_path / "k", key_password="s3cret")
        right.context()
        assert "s3cret" not in repr(right)

    @pytest.mark.parametrize(
        ("settings", "field"),
        [
            ({"ca": 3}, "tls.ca"), ({"ca": ""}, "tls.ca"), ({"ca": b"x"}, "tls.ca"), ({"cert": "a\0"}, "tls.cert"),
            ({"key": "k"}, "tls.cert"), ({"key_password": "k"}, "tls.cert"), ({"insecure": 1}, "tls.insecure"),
            ({"alpn": "mqtt"}, "tls.alpn"), ({"alpn": ("",)}, "tls.alpn"), ({"alpn": ("ä",)}, "tls.alpn"),
            ({"alpn": 5}, "tls.alpn"), ({"cert": "c", "key_password": 5}, "tls.key_password"),
        ],
    )  # fmt: skip
    def test_wrong_settings_are_refused_by_name(self, settings: dict[str, object], field: str) -> None:
        with pytest.raises(OptionError) as caught:
            TLS(**settings)  # type: ignore[arg-type]
        assert caught.value.field == field
