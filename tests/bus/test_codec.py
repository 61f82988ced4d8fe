"""The wire format: everything comes back, old bytes stay readable, and nothing corrupted is taken for a message."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import BODIES, ENVELOPES

from esper import messages
from esper.bus import codec
from esper.bus.codec import Refused, decode, encode
from tests.examples import examples

DATA = Path(__file__).parent / "data"


def mutate(wire: bytes, generator: random.Random) -> bytes:
    """One to four random edits: bit flips, bytes set, cut, repeated, inserted, or the end lost."""
    data = bytearray(wire)
    for _ in range(generator.randint(1, 4)):
        place = generator.randrange(len(data) + 1)
        kind = generator.randrange(6)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << generator.randrange(8)
        elif kind == 1 and place < len(data):
            data[place] = generator.randrange(256)
        elif kind == 2:
            del data[place : place + generator.randint(1, 8)]
        elif kind == 3:
            data[place:place] = data[place : place + generator.randint(1, 16)]
        elif kind == 4:
            data[place:place] = generator.randbytes(generator.randint(1, 8))
        else:
            del data[place:]
    return bytes(data)


def test_there_is_a_sample_of_every_kind_of_message():
    assert {type(body) for body in BODIES} == set(messages.MESSAGES)


@pytest.mark.parametrize("envelope", ENVELOPES, ids=lambda envelope: type(envelope.body).__name__)
def test_every_message_comes_back_equal(envelope):
    assert decode(encode(envelope)) == envelope


@pytest.mark.parametrize("version", range(1, codec.SCHEMA_VERSION + 1))
def test_bytes_of_every_past_version_are_read(version):
    data, found = (DATA / f"version_{version}.bin").read_bytes(), []
    while data:
        (length,) = struct.unpack_from("<I", data)
        found.append(decode(data[4 : 4 + length]))
        data = data[4 + length :]
    assert len(found) == {1: 23}[version] and found == ENVELOPES[: len(found)], "kinds that came later stand at the end"


def test_an_older_version_is_read_and_a_newer_one_refused_by_name(monkeypatch):
    monkeypatch.setattr(codec, "SCHEMA_VERSION", 7)
    wire = encode(ENVELOPES[0])
    monkeypatch.setattr(codec, "SCHEMA_VERSION", 8)
    assert decode(wire) == ENVELOPES[0]
    monkeypatch.setattr(codec, "SCHEMA_VERSION", 6)
    with pytest.raises(Refused, match=r"version 7.*up to 6") as refused:
        decode(wire)
    assert refused.value.reason == "newer"


@given(st.binary(max_size=300))
@settings(max_examples=examples(500))
def test_random_bytes_are_refused(data):
    with pytest.raises(Refused):
        decode(data)


def test_no_mutated_message_is_accepted_or_crashes():
    generator = random.Random(0)
    wires = [encode(envelope) for envelope in ENVELOPES]
    tried = 0
    while tried < 10_000:
        wire = generator.choice(wires)
        mutated = mutate(wire, generator)
        if mutated == wire:
            continue
        tried += 1
        with pytest.raises(Refused):
            decode(mutated)


def sealed(payload: bytes) -> bytes:
    """A hostile sender knows how to make a checksum."""
    import zlib

    header = codec.MAGIC + bytes([codec.SCHEMA_VERSION, 0])
    return header + zlib.crc32(payload, zlib.crc32(header)).to_bytes(4, "little") + payload


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        msgspec.msgpack.encode(["run", "main", 1, 1, 0.0, [], {"kind": "os.system", "command": "true"}]),
        msgspec.msgpack.encode(["run", "main", 1, 1, 0.0, [], {"kind": "TickEnded"}]),
        msgspec.msgpack.encode(["run", "main", 1, 1, 0.0, [], {"kind": "TickEnded", "tick": "1"}]),
        msgspec.msgpack.encode(["run", "main", -1, 1, 0.0, [], {"kind": "TickEnded", "tick": 1}]),
        msgspec.msgpack.encode(["run", "main", 1, 1, float("nan"), [], {"kind": "TickEnded", "tick": 1}]),
        msgspec.msgpack.encode(["run", "main", 1, 1, 1e300, [], {"kind": "TickEnded", "tick": 1}]),
        msgspec.msgpack.encode(["run", "main", 1, 1, 0.0, ["nobody"], {"kind": "TickEnded", "tick": 1}]),
        msgspec.msgpack.encode(["run", "main", 1, 1, 0.0, [], {"kind": "Cancel", "id": "c", "select": {"site": "fc", "unless": "kept"}}]),
    ],
)
def test_a_well_sealed_hostile_message_is_refused_as_malformed(payload):
    with pytest.raises(Refused) as refused:
        decode(sealed(payload))
    assert refused.value.reason == "malformed"


@pytest.mark.parametrize("envelope", ENVELOPES, ids=lambda envelope: type(envelope.body).__name__)
def test_an_older_reader_passes_over_what_a_newer_sender_added(envelope):
    fields = [*msgspec.structs.astuple(envelope)[:-1], codec.to_plain(envelope.body)]
    fields[-1]["added"] = {"later": [1, 2]}
    newer = sealed(msgspec.msgpack.encode([*fields, "a new part of the envelope"]))
    assert decode(newer) == envelope


def test_a_message_over_the_limit_is_refused_unread():
    with pytest.raises(Refused) as refused:
        decode(bytes(100), limit=99)
    assert refused.value.reason == "oversized"
