"""Every setting: its default, what is allowed, and the three ways to give it."""

from __future__ import annotations

import dataclasses
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudpubsub._address import Address
from cloudpubsub._errors import OptionError
from cloudpubsub._message import Will
from cloudpubsub._options import Options
from cloudpubsub._proxy import Proxy, parse_proxy
from cloudpubsub._tls import TLS

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
URL = "mqtt://broker.example"


def options(**settings: Any) -> Options:
    return Options(**{"broker": URL, **settings})


def test_defaults_fit_a_small_gateway(tmp_path: Path) -> None:
    made = options(client_id="gateway-17", spool=tmp_path)
    values = {item.name: getattr(made, item.name) for item in dataclasses.fields(made)}
    assert values == {
        "broker": ("mqtt://broker.example:1883",), "client_id": "gateway-17", "subscribe_client_id": "gateway-17-sub",
        "username": None, "password": None, "tls": None, "will": None, "protocol": "3.1.1", "keep_alive": 60,
        "proxy": None, "spool": str(tmp_path), "durability": "process", "sync_interval": 1.0, "ring_bytes": 4 * MIB,
        "ring_dir": None,
        "segment_bytes": 8 * MIB, "max_spool_bytes": GIB, "max_spool_messages": None, "max_payload_bytes": 256 * KIB,
        "on_full": "drop_oldest", "block_timeout": None, "spill_after": 10.0, "spill_timeout": 10.0,
        "max_inflight": 10_000, "max_inflight_bytes": MIB, "max_publish_rate": None, "ack_timeout": 30.0,
        "connect_timeout": 30.0, "reconnect_min": 1.0, "reconnect_max": 60.0, "connect_first": False,
        "session_expiry": 86_400, "clean_session": False, "handler_retries": 3, "handler_queue": 1_000,
        "on_handler_failure": "ack", "on_connect": None, "on_disconnect": None, "on_publish": None, "on_drop": None,
        "on_dead_letter": None, "addresses": (Address("mqtt", "broker.example", 1883, False),),
        "order": "strict", "live_share": 50,
        "ttl": None, "preset": None, "max_publish_bytes_rate": None, "poison_window": 10.0, "message_ids": False,
        "dns_timeout": 10.0, "tcp_timeout": 10.0, "tls_timeout": 20.0, "connack_timeout": 20.0, "payload_hook": None,
        "client_id_derived": False, "adopt": False, "min_stable": 5.0, "min_free_bytes": 16 << 20, "sync_bytes": None,
    }  # fmt: skip


WRONG: dict[str, list[Any]] = {
    "broker": [None, 5, b"mqtt://h", [], "", "h", ["mqtt://a", "b"], [5]],
    "client_id": ["", 5, "a\0", "x" * 65_536, "\ud800", b"x"],
    "subscribe_client_id": ["", 5, "a\0"],
    "username": ["", 5, "a\0"],
    "password": ["", 5, b"x"],
    "tls": [True, {}],
    "proxy": [5, b"x", "", "host:1080", "socks5://h", "socks5h://h:1", "https://h:1", "socks4://u:p@h:1", "http://h:1/x",
              "socks5://u@h:1", f"socks5://u:{'p' * 128}@h:1", "http://a%3Ab:p@h:1", "http://h:x"],
    "will": ["x", ("a", b"")],
    "protocol": ["4", "3.1", 5, None],
    "preset": ["", "aws", 5],
    "ttl": [0, -1, "5", float("nan"), True],
    "max_publish_bytes_rate": [0, -1, "x"],
    "poison_window": [0, -1, "x"],
    "order": ["newest", None, 1],
    "live_share": [0, 100, 5.5, None],
    "message_ids": [1, "yes", None, True],
    "dns_timeout": [0, None], "tcp_timeout": [0, None], "tls_timeout": [0, None], "connack_timeout": [0, None],
    "payload_hook": [5],
    "keep_alive": [0, 65_536, 60.0, "60", True, None],
    "spool": ["", 5, b"/x", "a\0"],
    "adopt": [1, "yes", None],
    "min_free_bytes": [-1, 1.0, "1", True, None],
    "sync_bytes": [0, -1, 1.5, "1", True, (1 << 30) + 1],
    "durability": ["", "none", 1],
    "sync_interval": [0, -1, "1", float("nan"), float("inf"), True, None, 10**400],
    "ring_bytes": [32 * KIB, 3 * MIB, 2 * GIB, 4.0 * MIB, "4MiB", None],
    "ring_dir": ["", 5],
    "segment_bytes": [KIB, 64 * KIB + 1, 2 * GIB, 1.5],
    "max_spool_bytes": [0, 255 * KIB, -1, None],
    "max_spool_messages": [0, -1, 1.5],
    "max_payload_bytes": [0, GIB, "1"],
    "on_full": ["", "drop", None],
    "block_timeout": [-1, "x", float("nan")],
    "spill_after": [-1, None],
    "spill_timeout": [-1, None],
    "max_inflight": [0, 65_535, 1.0],
    "max_inflight_bytes": [0, -1, 2 * GIB],
    "max_publish_rate": [0, -1, "x"],
    "ack_timeout": [0, None],
    "connect_timeout": [0, None],
    "reconnect_min": [0, None, 61],
    "reconnect_max": [0, 86_401],
    "min_stable": [-1, None, "5", 86_401],
    "connect_first": [1, "yes", None],
    "session_expiry": [-1, 1 << 32, 1.0],
    "clean_session": [1, "no"],
    "handler_retries": [-1, 1_001, None],
    "handler_queue": [0, None],
    "on_handler_failure": ["", "drop"],
    "on_connect": [5], "on_disconnect": ["x"], "on_publish": [b""], "on_drop": [1], "on_dead_letter": [{}],
}  # fmt: skip


def test_every_setting_has_wrong_values_tried() -> None:
    assert set(WRONG) == {item.name for item in dataclasses.fields(Options) if item.init}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_value_is_refused_by_name(name: str, value: Any) -> None:
    settings = {"username": "u"} if name == "password" else {}
    with pytest.raises(OptionError) as caught:
        options(**{"client_id": "c", "spool": "/s", **settings, name: value})
    assert caught.value.field == name
    assert caught.value.allowed
    assert isinstance(caught.value, ValueError)


anything = st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=5), st.binary())


@given(st.sampled_from(sorted(WRONG)), anything)
def test_any_value_is_taken_or_refused_as_an_option_error(name: str, value: Any) -> None:
    try:
        made = options(**{name: value})
    except OptionError:
        return
    assert hash(made) == hash(pickle.loads(pickle.dumps(made)))


@given(
    st.integers(16, 30).map(lambda power: 1 << power),
    st.integers(256 * KIB, 1 << 40),
    st.none() | st.integers(16, GIB // (4 * KIB)).map(lambda pages: pages * 4 * KIB),
    st.none() | st.integers(1, 256 * MIB),
    st.integers(KIB, GIB),
)
def test_sizes_in_force_always_fit_each_other(
    ring: int, quota: int, segment: int | None, payload: int | None, inflight: int
) -> None:
    try:
        made = options(ring_bytes=ring, max_spool_bytes=quota, segment_bytes=segment, max_payload_bytes=payload,
                       max_inflight_bytes=inflight)  # fmt: skip
    except OptionError:
        assert segment is not None or payload is not None
        return
    assert 64 * KIB <= made.segment_bytes <= quota // 4
    assert made.segment_bytes % (4 * KIB) == 0
    record_max = min(made.ring_bytes, made.segment_bytes) // 4
    assert 1 <= made.max_payload_bytes <= record_max - 32 - 1_024
    assert made.max_inflight_bytes == min(inflight, ring // 2)
    assert segment in (None, made.segment_bytes)
    assert payload in (None, made.max_payload_bytes)


def test_sizes_not_given_shrink_to_fit() -> None:
    small = options(ring_bytes=64 * KIB, max_spool_bytes=256 * KIB)
    assert (small.segment_bytes, small.max_payload_bytes) == (64 * KIB, 16 * KIB - 1_056)
    assert small.max_inflight_bytes == 32 * KIB


def test_sizes_given_that_conflict_are_refused() -> None:
    with pytest.raises(OptionError, match=r"^segment_bytes: .*max_spool_bytes=1048576"):
        options(max_spool_bytes=MIB, segment_bytes=MIB)
    with pytest.raises(OptionError, match=r"^max_payload_bytes: 262144 .*ring_bytes=1048576"):
        options(ring_bytes=MIB, max_payload_bytes=256 * KIB)


def test_credentials_move_from_the_url_to_their_fields() -> None:
    made = options(broker=["mqtts://us%40er:s3cret%2F@a", "mqtts://b:1"], client_id="c")
    assert made.broker == ("mqtts://a:8883", "mqtts://b:1")
    assert made.credentials() == ("us@er", "s3cret/")
    assert made.tls == TLS()


@pytest.mark.parametrize(
    "settings",
    [
        {"broker": ["mqtt://u:s3cret@a", "mqtt://v:s3cret@b"]},
        {"broker": "mqtt://u:s3cret@a", "password": "s3cret2"},
        {"broker": "mqtt://u:s3cret@a", "username": "other"},
        {"password": "s3cret"},
        {"username": "u", "password": "s3cret\0"},
        {"broker": "mqtt://u:s3cret@a", "keep_alive": 0},
        {"broker": "mqtt://u:s3cret@a:port"},
        {"proxy": "socks5://u:s3cret@h"},
        {"proxy": "socks4://u:s3cret@h:1"},
        {"proxy": "ftp://u:s3cret@h:1"},
        {"proxy": "http://u:s3/cret@h:1"},
        {"proxy": "http://u:s3cret"},
    ],
)
def test_no_error_shows_a_password(settings: dict[str, Any]) -> None:
    complete = {"broker": URL, **settings}
    for make in (lambda: Options(**complete), lambda: Options.build(settings=complete, environ={})):
        with pytest.raises(OptionError) as caught:
            make()
        assert "s3cret" not in str(caught.value) + repr(caught.value)


def test_repr_shows_no_secret() -> None:
    tls = TLS(cert="c", key_password="s3cret")
    assert "s3cret" not in repr(options(broker="mqtts://u:s3cret@h", tls=tls))
    assert "s3cret" not in repr(options(username="u", password="s3cret"))
    assert "s3cret" not in repr(options(proxy="http://u:s3cret@h:1")) + repr(parse_proxy("http://u:s3cret@h:1"))


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("socks5://h:1080", Proxy("socks5", "h", 1080)),
        ("SOCKS5://us%40er:s%2Fp@[::1]:1/", Proxy("socks5", "::1", 1, "us@er", "s/p")),
        ("socks4://u@h:1080", Proxy("socks4", "h", 1080, "u")),
        ("http://h:3128", Proxy("http", "h", 3128)),
        ("http://u:@h:3128", Proxy("http", "h", 3128, "u", "")),
    ],
)
def test_proxies_are_taken_apart(url: str, proxy: Proxy) -> None:
    assert parse_proxy(url) == proxy
    assert options(proxy=url).proxy == url


def test_without_pysocks_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "socks", None)
    for url in ("socks5://u:s3cret@h:1", "socks4://h:1"):
        with pytest.raises(OptionError, match=r"cloudpubsub\[proxy\]") as caught:
            options(proxy=url)
        assert caught.value.field == "proxy" and "s3cret" not in str(caught.value)
    assert options(proxy="http://h:1").proxy


def test_credentials_are_asked_for_each_time_and_checked() -> None:
    tokens = iter(["one", "two", "", 5])
    made = options(username=lambda: "u", password=lambda: next(tokens))
    assert [made.credentials(), made.credentials()] == [("u", "one"), ("u", "two")]
    for _ in range(2):
        with pytest.raises(OptionError, match=r"^password: "):
            made.credentials()


def test_tls_must_have_something_to_protect() -> None:
    with pytest.raises(OptionError, match=r"^tls: "):
        options(tls=TLS())
    assert options(broker=["mqtt://a", "mqtts://b"], tls=TLS(insecure=True)).tls == TLS(insecure=True)


def test_a_client_id_not_given_is_stable_for_a_spool(tmp_path: Path) -> None:
    first, again, other = (options(spool=tmp_path / name) for name in ("a", "a", "b"))
    assert first.client_id == again.client_id != other.client_id
    assert first.client_id.startswith("cloudpubsub-")
    assert first.client_id_derived
    assert first.session_expiry == 86_400


def test_a_client_id_not_given_is_random_without_a_spool() -> None:
    assert options().client_id != options().client_id
    assert (options().session_expiry, options().clean_session) == (0, True)
    with pytest.raises(OptionError, match=r"^session_expiry: .*client_id"):
        options(session_expiry=60)
    assert options(client_id="c").session_expiry == 86_400


def test_the_two_client_ids_differ() -> None:
    with pytest.raises(OptionError, match=r"^subscribe_client_id: "):
        options(client_id="c", subscribe_client_id="c")
    with pytest.raises(OptionError, match=r"^subscribe_client_id: "):
        options(client_id="c" * 65_535)
    assert options(client_id="c", subscribe_client_id="d").subscribe_client_id == "d"


@pytest.mark.parametrize(
    ("given_values", "expiry"),
    [({"clean_session": True}, 0), ({"clean_session": False}, 86_400), ({"session_expiry": 0}, 0),
     ({"session_expiry": 5}, 5),
     ({"session_expiry": 5, "clean_session": False}, 5), ({"session_expiry": 0, "clean_session": True}, 0)],
)  # fmt: skip
def test_clean_session_is_short_for_session_expiry(given_values: dict[str, Any], expiry: int) -> None:
    made = options(client_id="c", **given_values)
    assert (made.session_expiry, made.clean_session) == (expiry, expiry == 0)


@pytest.mark.parametrize(("expiry", "clean"), [(5, True), (0, False)])
def test_contradicting_session_settings_are_refused(expiry: int, clean: bool) -> None:
    with pytest.raises(OptionError, match=r"^clean_session: "):
        options(client_id="c", session_expiry=expiry, clean_session=clean)


def test_durability_promises_nothing_without_a_spool() -> None:
    assert options().durability == "memory"
    for level in ("process", "power"):
        with pytest.raises(OptionError, match=r"^durability: "):
            options(durability=level)
        assert options(spool="/s", durability=level).durability == level


def test_the_spool_path_does_not_follow_the_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert options(spool="s").spool == str(tmp_path / "s")


def test_options_are_frozen_and_can_be_replaced() -> None:
    made = options(client_id="c", spool="/s")
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.keep_alive = 5  # type: ignore[misc]
    assert dataclasses.replace(made, keep_alive=5).keep_alive == 5
    assert dataclasses.replace(made) == made


def test_environment_is_read_with_its_types() -> None:
    made = Options.from_env({
        "CLOUDPUBSUB_BROKER": "mqtts://u:p@a, mqtts://b:1", "CLOUDPUBSUB_CLIENT_ID": "c",
        "CLOUDPUBSUB_RING_BYTES": "1MiB", "CLOUDPUBSUB_MAX_SPOOL_BYTES": "2_000_000",
        "CLOUDPUBSUB_CONNECT_FIRST": "Yes", "CLOUDPUBSUB_SPILL_AFTER": "2.5",
        "CLOUDPUBSUB_MAX_SPOOL_MESSAGES": "none", "CLOUDPUBSUB_ON_FULL": "raise", "CLOUDPUBSUB_SPOOL": "/s",
        "CLOUDPUBSUB_PROXY": "http://u:p@h:1",
        "CLOUDPUBSUB_TLS_CA": "/ca.pem", "CLOUDPUBSUB_TLS_ALPN": "x, y", "CLOUDPUBSUB_TLS_INSECURE": "0",
        "CLOUDPUBSUB_WILL_TOPIC": "w", "CLOUDPUBSUB_WILL_RETAIN": "1", "CLOUDPUBSUB_KEEP_ALIVE": "", "OTHER": "x",
    })  # fmt: skip
    assert made == Options(
        broker=["mqtts://a", "mqtts://b:1"], username="u", password="p", client_id="c", ring_bytes=MIB,
        max_spool_bytes=2_000_000, connect_first=True, spill_after=2.5, on_full="raise", spool="/s",
        tls=TLS(ca="/ca.pem", alpn=("x", "y")), will=Will("w", retain=True), proxy="http://u:p@h:1",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text"),
    [("RING_BYTES", "4MB"), ("RING_BYTES", "x"), ("RING_BYTES", "1__0"), ("KEEP_ALIVE", "1MiB"), ("KEEP_ALIVE", "-5"),
     ("CONNECT_FIRST", "maybe"), ("SPILL_AFTER", "nan"), ("SPILL_AFTER", "ten"), ("KEEP_ALIVE", "none"),
     ("ON_DROP", "f"),
     ("WILL_RETAIN", "x"), ("KEEP_ALIVE", "9" * 5_000)],
)  # fmt: skip
def test_a_wrong_variable_is_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(OptionError, match=f"^CLOUDPUBSUB_{name}: "):
        Options.from_env({"CLOUDPUBSUB_BROKER": URL, f"CLOUDPUBSUB_{name}": text})


def test_an_unknown_variable_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    Options.from_env({"CLOUDPUBSUB_BROKER": URL, "CLOUDPUBSUB_RING_BYTE": "1"})
    assert "CLOUDPUBSUB_RING_BYTE is no setting; did you mean ring_bytes?" in caplog.text


def test_a_missing_broker_is_named() -> None:
    for make in (lambda: Options.from_env({}), lambda: Options.build(None, {}, {})):
        with pytest.raises(OptionError, match=r"^broker: "):
            make()


def test_explicit_settings_win_over_the_environment() -> None:
    environ = {"CLOUDPUBSUB_KEEP_ALIVE": "5", "CLOUDPUBSUB_SPILL_AFTER": "5", "CLOUDPUBSUB_USERNAME": "env",
               "CLOUDPUBSUB_PASSWORD": "env"}  # fmt: skip
    made = Options.build("mqtt://u:p@h", {"keep_alive": 6, "spool": None}, environ)
    assert (made.keep_alive, made.spill_after, made.credentials()) == (6, 5.0, ("u", "p"))
    assert Options.build("mqtt://u@h", {}, environ).credentials() == ("u", "env")


def test_credentials_of_one_broker_never_go_to_another() -> None:
    made = Options.build("mqtt://other", {}, {"CLOUDPUBSUB_BROKER": "mqtt://u:p@h"})
    assert made.credentials() == (None, None)


def test_an_unknown_setting_is_refused_with_a_hint() -> None:
    with pytest.raises(OptionError, match=r"did you mean ring_bytes"):
        Options.build(URL, {"ring_byte": 5}, {})


class TestToml:
    @pytest.fixture(autouse=True)
    def _needs_toml(self) -> None:
        if sys.version_info < (3, 11):
            pytest.importorskip("tomli")

    def read(self, tmp_path: Path, text: str) -> Options:
        (tmp_path / "o.toml").write_text(text)
        return Options.from_toml(tmp_path / "o.toml")

    TEXT = """
        broker = ["mqtts://u:p@a", "mqtts://b"]
        client_id = "c"
        ring_bytes = 1_048_576
        [tls]
        ca = "/ca.pem"
        alpn = ["x"]
        [will]
        topic = "w"
        payload = "gone"
    """

    def test_a_file_is_read_with_or_without_a_table(self, tmp_path: Path) -> None:
        wanted = Options(broker=["mqtts://u:p@a", "mqtts://b"], client_id="c", ring_bytes=MIB,
                         tls=TLS(ca="/ca.pem", alpn=("x",)), will=Will("w", "gone"))  # fmt: skip
        assert self.read(tmp_path, self.TEXT) == wanted
        nested = self.TEXT.replace("[tls]", "[cloudpubsub.tls]").replace("[will]", "[cloudpubsub.will]")
        assert self.read(tmp_path, "[cloudpubsub]\n" + nested + "\n[another]\nx = 1") == wanted

    @pytest.mark.parametrize(
        ("text", "named"),
        [("x = ", "o.toml"), ("client_id = 'c'", "broker"), ("brokers = 'x'", "brokers"), ("broker = 5", "broker"),
         ("broker = 'mqtt://h'\nkeep_alive = '5'", "keep_alive"), ("broker = 'mqtt://h'\non_drop = 'f'", "on_drop"),
         ("broker = 'mqtts://h'\n[tls]\nco = 1", "tls.co"),
         ("broker = 'mqtt://h'\n[will]\nretain = true", "will.topic"),
         ("cloudpubsub = 5", "cloudpubsub")],
    )  # fmt: skip
    def test_a_wrong_file_is_refused_by_name(self, tmp_path: Path, text: str, named: str) -> None:
        with pytest.raises(OptionError) as caught:
            self.read(tmp_path, text)
        assert caught.value.field.endswith(named)

    def test_an_absent_file_is_an_os_error(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            Options.from_toml(tmp_path / "absent.toml")


def test_without_a_toml_reader_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", None)
    with pytest.raises(ImportError, match="tomli"):
        Options.from_toml("/absent.toml")
