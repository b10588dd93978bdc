"""Files of records: any record is found again, and damage is found and named."""

import collections
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from metajax.data.sources import _records

RECORDS = [np.random.default_rng(length).bytes(length) for length in (0, 1, 300, 5000, 20, 700)]


def framed(record):
    length = len(record).to_bytes(8, "little")
    return length + _records._masked(length) + record + _records._masked(record)


@pytest.fixture(params=["array_record", "tfrecord"])
def path(request, tmp_path):
    """A file of RECORDS, written by the library of its format."""
    path = tmp_path / f"some.{request.param}"
    if request.param == "tfrecord":
        tf = pytest.importorskip("tensorflow", reason="writes TFRecord files")
        with tf.io.TFRecordWriter(str(path)) as writer:
            for record in RECORDS:
                writer.write(record)
    else:
        module = pytest.importorskip("array_record.python.array_record_module", reason="writes ArrayRecord files")
        writer = module.ArrayRecordWriter(str(path), "group_size:1")
        for record in RECORDS:
            writer.write(record)
        writer.close()
    return path


@pytest.fixture
def frames(tmp_path):
    """A TFRecord file of RECORDS, and where its records start."""
    path = tmp_path / "some.tfrecord"
    parts = [framed(record) for record in RECORDS]
    path.write_bytes(b"".join(parts))
    return path, np.cumsum([0, *map(len, parts)]).tolist()


def opened(path):
    return _records.FORMATS[path.suffix[1:]](path)


def test_records_are_found_again(path):
    file = opened(path)
    places, records = zip(*file.scan(), strict=True)
    assert list(records) == RECORDS
    order = np.random.default_rng(0).integers(len(RECORDS), size=400).tolist()
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda number: opened(path).read(places[number]), order[:20]))
        read += pool.map(lambda number: file.read(places[number]), order[20:])
    assert read == [RECORDS[number] for number in order]


def test_frames_are_those_of_tensorflow(frames):
    tf = pytest.importorskip("tensorflow", reason="the peer")
    path, places = frames
    assert [record.numpy() for record in tf.data.TFRecordDataset(str(path))] == RECORDS
    assert [place for place, _ in opened(path).scan()] == places[:-1]


def test_random_damage_is_told_or_harmless(path):
    content, rng, found = path.read_bytes(), np.random.default_rng(0), collections.Counter()
    for _ in range(200):
        damaged = bytearray(content)
        damaged[rng.integers(min(len(content), 8000))] ^= 1 << rng.integers(8)  # ArrayRecord pads its blocks
        path.write_bytes(damaged)
        try:
            records = [record for _, record in opened(path).scan()]
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
            found["told"] += 1
        else:
            assert records == RECORDS
            found["harmless"] += 1
    assert found["told"] == 200 if path.suffix == ".tfrecord" else found["told"] > 50


def test_frames_that_are_wrong(frames):
    path, places = frames
    content, third = path.read_bytes(), places[2]

    def refused(damaged, text):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"'{path} at byte {third}' {text}"):
            list(opened(path).scan())

    for place, text in (
        (third, "is damaged: the checksum of its length is wrong"),
        (third + 9, "is damaged: the checksum of its length is wrong"),
        (third + 12, "is damaged: the checksum of its 300 bytes is wrong"),
        (third + 12 + 300, "is damaged: the checksum of its 300 bytes is wrong"),
    ):
        damaged = bytearray(content)
        damaged[place] ^= 1
        refused(damaged, text)
    refused(content[: third + 5], f"is cut off: the file has {third + 5} bytes")
    refused(content[: third + 100], f"has 300 bytes and is cut off: the file has {third + 100} bytes")
    huge = (2**62).to_bytes(8, "little")
    refused(
        content[:third] + huge + _records._masked(huge) + content[third + 12 :], f"has {2**62} bytes and is cut off"
    )


def test_what_cannot_be_opened(tmp_path):
    for name in ("gone.tfrecord", "gone.array_record"):
        if name.endswith("array_record"):
            pytest.importorskip("array_record", reason="reads ArrayRecord files")
        with pytest.raises(ValueError, match=rf"'{tmp_path}/{name}' cannot be opened \(.*No such file"):
            opened(tmp_path / name)
    (tmp_path / "empty.tfrecord").touch()
    assert list(opened(tmp_path / "empty.tfrecord").scan()) == []


def test_checksums():
    # vectors of RFC 3720, appendix B.4
    vectors = {bytes(32): 0x8A9136AA, b"\xff" * 32: 0x62A8AB43, bytes(range(32)): 0x46DD794E, b"": 0}
    assert {data: _records.crc32c(data) for data in vectors} == vectors
    rng = np.random.default_rng(0)
    for length in (1, 3, 4, 5, 507, 508, 509, 512, 1024, 40_000):
        data, crc = rng.bytes(length), 0xFFFFFFFF
        for byte in data:  # bit by bit, as it is defined
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        assert _records.crc32c(data) == crc ^ 0xFFFFFFFF, length
