"""TLS, ACL users and passwords that appear nowhere; a server of our own that others cannot enter."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

import msgspec
import pytest
import redis
from faults import wait_until
from tls import tls_before

from esper.bus import open_bus
from esper.bus.config import EmbeddedConfig, RedisConfig
from esper.bus.discovery import invite
from esper.bus.server.connection import Address, connect
from esper.bus.server.embedded import EmbeddedServer, Note
from esper.errors import UserError
from esper.messages import Metrics, TickEnded

SECRET = "correct-horse-battery"
RIGHTS = next(
    line.strip()
    for line in (Path(__file__).resolve().parents[3] / "docs" / "operations.md").read_text().splitlines()
    if line.strip().startswith("~esper:*")
)


@pytest.fixture
def secured(server, tmp_path):
    """A TLS port that asks for client certificates, and users of whom one has just the rights that docs/operations.md names."""
    with connect(server.address, 1) as owner:
        owner.execute_command("ACL", "SETUSER", "esper", "reset", "on", f">{SECRET}", *RIGHTS.split())
        owner.execute_command("ACL", "SETUSER", "reader", "reset", "on", f">{SECRET}", "~esper:*", "+ping")
    with tls_before(server.address.tcp_port, tmp_path) as port:
        yield port


def config(port, folder, **changes):
    paths = {"tls_ca": "authority.crt", "tls_cert": "client.crt", "tls_key": "client.key"} | changes
    return RedisConfig(
        url=f"rediss://127.0.0.1:{port}/0",
        timeout_s=1,
        **{name: str(folder / path) if path else "" for name, path in paths.items()},
    )


@pytest.fixture
def login(monkeypatch):
    monkeypatch.setenv("ESPER_BUS_USER", "esper")
    monkeypatch.setenv("ESPER_BUS_PASSWORD", SECRET)


def test_messages_travel_over_tls_with_a_user_that_has_only_the_rights_needed(secured, login, tmp_path):
    bus = open_bus(config(secured, tmp_path), tmp_path)
    producer, consumer = bus.producer("events", "run"), bus.consumer("events", "run", "group", "one")
    producer.publish(TickEnded(tick=1))
    assert producer.flush(60)
    producer.publish(Metrics(tick=1, values={f"metric/{number}": float(number) for number in range(5000)}))  # as plain commands
    assert producer.flush(60)
    deliveries = consumer.read(1, 2)
    consumer.keep(deliveries)
    deliveries += consumer.read(1, 2)
    consumer.ack(deliveries)
    assert len(deliveries) == 2
    assert bus.dead_letters("run") == []
    assert bus.counts()["retries"] == 0
    with pytest.raises(redis.exceptions.NoPermissionError):
        bus.client.config_get("*")
    bus.close()


def test_a_server_whose_certificate_nobody_vouches_for_is_refused(secured, login, tmp_path):
    with pytest.raises(UserError, match=r"no bus answers at rediss://127.0.0.1") as refused:
        open_bus(config(secured, tmp_path, tls_ca="stranger.crt"), tmp_path)
    assert SECRET not in str(refused.value)


def test_a_client_without_a_certificate_is_refused(secured, login, tmp_path):
    with pytest.raises(UserError, match="no bus answers"):
        open_bus(config(secured, tmp_path, tls_cert="", tls_key=""), tmp_path)


def test_a_wrong_password_is_a_sentence_without_the_password(secured, monkeypatch, tmp_path):
    monkeypatch.setenv("ESPER_BUS_USER", "esper")
    monkeypatch.setenv("ESPER_BUS_PASSWORD", "wrong-" + SECRET)
    with pytest.raises(UserError, match="does not accept this login") as refused:
        open_bus(config(secured, tmp_path), tmp_path)
    assert SECRET not in str(refused.value)


def test_a_user_without_rights_is_told_so(secured, monkeypatch, tmp_path):
    monkeypatch.setenv("ESPER_BUS_USER", "reader")
    monkeypatch.setenv("ESPER_BUS_PASSWORD", SECRET)
    bus = open_bus(config(secured, tmp_path), tmp_path)
    with pytest.raises(UserError, match=r"may not do what esper needs: .*docs/operations\.md"):
        bus.producer("events", "run")
    bus.close()


@pytest.mark.parametrize(
    "url",
    [
        *("redis://me:secret@host/0", "rediss://:secret@host", "redis://me:sec/secret@host", "http://host", "redis://host/x"),
        *("redis://127.0.0.1:99999/0", "redis://127.0.0.1:abc/0", "redis://127.0.0.1:0/0", "redis://[::1/0"),
    ],
)
def test_urls_with_credentials_or_without_sense_are_refused_and_credentials_not_repeated(url, tmp_path):
    with pytest.raises(UserError) as refused:
        open_bus(RedisConfig(url=url), tmp_path)
    assert "bus.url" in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_password_is_never_sent_in_the_clear_to_another_machine(login, tmp_path):
    with pytest.raises(UserError, match="use rediss://"):
        open_bus(RedisConfig(url="redis://192.0.2.1:6379/0"), tmp_path)


def test_no_credential_is_in_logs_notes_or_representations(server, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    bus = open_bus(EmbeddedConfig(timeout_s=0.2, retry_s=0.1), tmp_path)
    password = bus.server.note.password
    invite(tmp_path, "run", bus.config, {})
    producer = bus.producer("events", "run")
    bus.server.process.kill()
    producer.publish(TickEnded(tick=1))
    assert wait_until(lambda: bus.incidents)
    private = {"address.json", "valkey.conf"}
    said = caplog.text + repr(bus.address) + str(bus.incidents) + repr(bus.config)
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.name not in private:
            said += path.read_bytes().decode(errors="replace")
    assert password not in said
    for name in private:
        assert stat.S_IMODE((tmp_path / "bus" / "server" / name).stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "bus" / "server").stat().st_mode) == 0o700
    bus.close()


def test_the_embedded_server_listens_on_loopback_and_asks_for_its_password(server):
    stranger = connect(Address("127.0.0.1", server.address.tcp_port), 1)
    with pytest.raises(redis.AuthenticationError):
        stranger.ping()
    with connect(server.address, 1) as owner:
        assert owner.config_get("bind")["bind"] == "127.0.0.1"


def test_nobody_answering_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"no bus answers at redis://127.0.0.1:1/0.*bus=embedded"):
        open_bus(RedisConfig(url="redis://127.0.0.1:1/0", timeout_s=0.2), tmp_path)


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("where", ["password", "folder"])
def test_nothing_in_a_folder_from_elsewhere_becomes_a_directive_of_the_server(where, tmp_path):
    """A directive such as ``loadmodule`` runs code; ``databases`` shows whether one was read."""
    injected = "x\ndatabases 3\n#" if where == "password" else 'x"\ndatabases 3\n#'
    folder = tmp_path / (injected if where == "folder" else "server")
    folder.mkdir()
    (folder / "address.json").write_bytes(msgspec.json.encode(Note(0, injected)))
    server = EmbeddedServer(folder)
    try:
        with connect(server.address, 1) as owner:
            assert owner.config_get("databases")["databases"] == "16"
            assert owner.config_get("dir")["dir"] == str(folder)
    finally:
        server.stop()


@pytest.mark.usefixtures("processes")
def test_stored_commands_of_a_folder_from_elsewhere_load_no_module(tmp_path):
    server = EmbeddedServer(tmp_path / "server")
    with connect(server.address, 1) as owner:
        owner.set("key", "value")
    server.stop()
    (stored,) = (tmp_path / "server" / "appendonlydir").glob("*.incr.aof")
    words = ["MODULE", "LOAD", str(tmp_path / "evil.so")]
    stored.write_bytes(stored.read_bytes() + f"*{len(words)}\r\n".encode() + b"".join(f"${len(w)}\r\n{w}\r\n".encode() for w in words))
    with pytest.raises(UserError, match="did not start"):
        server.start()
    log = (tmp_path / "server" / "server.log").read_text()
    assert "unknown command" in log.lower() and "failed to load" not in log.lower()
