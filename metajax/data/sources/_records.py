"""Random access to the records of TFRecord and ArrayRecord files, which may be damaged.

A record is identified by its place: the byte where it starts in a TFRecord file, its number in an ArrayRecord file.
"""

from __future__ import annotations

import functools
import os
import pathlib
import weakref
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

_POLYNOMIAL = np.uint32(0x82F63B78)  # of CRC-32C, its lowest bit first
_START = bytes.fromhex("54641f64")  # changes a checksum from 0 to 0xFFFFFFFF, the required start value
_BLOCK, _AT_ONCE = 512, 64  # bytes in a block, and blocks: tables and indices fit in the processor's cache


class RecordFile(Protocol):
    """One file of records; any number of threads may read it."""

    def scan(self) -> Iterator[tuple[int, bytes]]:
        """Yields all records in order, with their places."""
        ...

    def read(self, place: int) -> bytes:
        """Returns the record at a place."""
        ...

    def name(self, place: int) -> str:
        """Returns the name of the record at a place, for error messages."""
        ...


class TfRecordFile:
    """A TFRecord file: the length of each record precedes it, and a checksum follows each of the two.

    Raises:
      ValueError: there is no such file; or, when a record is read, the file is damaged or ends too early.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "one.tfrecord"
    >>> length = (5).to_bytes(8, "little")
    >>> _ = path.write_bytes(length + _masked(length) + b"hello" + _masked(b"hello"))
    >>> file = TfRecordFile(path)
    >>> list(file.scan()), file.read(0)
    ([(0, b'hello')], b'hello')
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ValueError(f"{str(path)!r} cannot be opened ({error.strerror})") from error
        weakref.finalize(self, os.close, self._file)
        self._size = os.fstat(self._file).st_size

    def scan(self) -> Iterator[tuple[int, bytes]]:
        """Yields all records in order, with their places."""
        place = 0
        while place < self._size:
            record = self.read(place)
            yield place, record
            place += 8 + 4 + len(record) + 4

    def read(self, place: int) -> bytes:
        """Returns the record at a place."""
        header = os.pread(self._file, 12, place)
        if len(header) < 12:
            raise ValueError(f"{self.name(place)!r} is cut off: the file has {self._size} bytes")
        if _masked(header[:8]) != header[8:]:
            raise ValueError(f"{self.name(place)!r} is damaged: the checksum of its length is wrong")
        length = int.from_bytes(header[:8], "little")
        if place + length + 16 > self._size:  # checked before memory is allocated
            raise ValueError(f"{self.name(place)!r} has {length} bytes and is cut off: the file has {self._size} bytes")
        body = os.pread(self._file, length + 4, place + 12)
        if _masked(body[:length]) != body[length:]:
            raise ValueError(f"{self.name(place)!r} is damaged: the checksum of its {length} bytes is wrong")
        return body[:length]

    def name(self, place: int) -> str:
        """Returns the name of the record at a place, for error messages."""
        return f"{self._path} at byte {place}"


class ArrayRecordFile:
    """An ArrayRecord file, read by the library `array_record`, which checks its checksums.

    Raises:
      ValueError: there is no such file; or, when a record is read, the file is damaged.
      ImportError: `array_record` is not installed.
    """

    def __init__(self, path: pathlib.Path) -> None:
        from array_record.python import array_record_module

        self._path = path
        if not path.is_file():
            raise ValueError(f"{str(path)!r} cannot be opened (No such file)")
        options = "readahead_buffer_size:0,max_parallelism:0"  # from its documentation, for random access
        self._reader = array_record_module.ArrayRecordReader(str(path), options, file_reader_buffer_size=2**15)
        if not self._reader.ok():
            raise ValueError(f"{str(path)!r} is no whole ArrayRecord file: it is damaged or cut off")

    def scan(self) -> Iterator[tuple[int, bytes]]:
        """Yields all records in order, with their places."""
        for place in range(self._reader.num_records()):
            yield place, self.read(place)

    def read(self, place: int) -> bytes:
        """Returns the record at a place."""
        try:
            return self._reader.read([place])[0]
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"{self.name(place)!r} is damaged ({str(error).partition(chr(10))[0]})") from error

    def name(self, place: int) -> str:
        """Returns the name of the record at a place, for error messages."""
        return f"{self._path} at record {place}"


FORMATS: dict[str, Callable[[pathlib.Path], RecordFile]] = {"array_record": ArrayRecordFile, "tfrecord": TfRecordFile}


def crc32c(data: bytes) -> int:
    """Computes the checksum CRC-32C (Castagnoli) of bytes.

    Checksums are linear: the checksum of a block is the XOR of the contributions of its bytes. A table holds the
    contribution of each byte at each place.

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    table, starts, (first, second, third, fourth) = _tables()
    padded = bytes(-(len(data) + len(_START)) % _BLOCK) + _START + data
    blocks = np.frombuffer(padded, np.uint8).reshape(-1, _BLOCK)
    crc = 0
    for some in range(0, len(blocks), _AT_ONCE):
        of_blocks = np.bitwise_xor.reduce(table.take(blocks[some : some + _AT_ONCE] + starts), axis=1)
        for block in of_blocks.tolist():  # the checksum so far is added to the first four bytes of the next block
            crc = block ^ first[crc & 255] ^ second[crc >> 8 & 255] ^ third[crc >> 16 & 255] ^ fourth[crc >> 24]
    return crc ^ 0xFFFFFFFF


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """Returns the contribution of each byte at each place of a block, and the index where each place starts in it.

    The third value holds the contributions at the first four places as lists.
    """
    last = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        last = np.where(last & 1, last >> 1 ^ _POLYNOMIAL, last >> 1)
    places = [last]
    for _ in range(_BLOCK - 1):
        places.append(last[places[-1] & 255] ^ places[-1] >> 8)
    places.reverse()
    return np.concatenate(places), np.arange(_BLOCK) * 256, [place.tolist() for place in places[:4]]


def _masked(data: bytes) -> bytes:
    """Computes the checksum in the form in which TFRecord stores it."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF).to_bytes(4, "little")
