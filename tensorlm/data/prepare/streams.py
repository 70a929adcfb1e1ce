"""Reading text and JSON from files of any size, with only one document in memory."""

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from .files import compression_of
from .input_errors import InputError

_CHUNK_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
_LONGEST_WORD = 16  # at least the length of a truncated `-Infinity` or escape at the end


@contextmanager
def open_bytes(source: str) -> Iterator[tuple[io.BufferedReader, Callable[[], int]]]:
    """Open a file as a buffered stream, decompressed according to its suffix.

    Yields the stream, and a function that returns the number of bytes of the file read so far.

    Raises:
        InputError: the content is UTF-16 or UTF-32.
    """
    compression = compression_of(source)
    if compression is None:
        with open(source, "rb") as file:
            _check_encoding(file)
            yield file, file.tell
        return
    with pa.OSFile(source) as stored:
        content = pa.CompressedInputStream(stored, compression)
        stream = io.BufferedReader(content, _CHUNK_BYTES)
        _check_encoding(stream)
        yield stream, stored.tell


def _check_encoding(file: io.BufferedReader) -> None:
    """Reject content that starts like UTF-16 or UTF-32: a byte order mark, or zero bytes."""
    head = file.peek(4)[:4]
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
    zeros = "".join("0" if byte == 0 else "x" for byte in head)
    if head.startswith(marks) or zeros in ("x0x0", "0x0x", "x000", "000x"):
        raise InputError(
            "must be UTF-8, got what looks like UTF-16 or UTF-32",
            "convert it, for example with iconv -f UTF-16 -t UTF-8, or {skip}",
        )


def too_long(longest: int) -> InputError:
    """The error for a document or record with more than `longest` bytes."""
    return InputError(f"must have at most {longest:,} bytes", "split it, or {larger}")


def read_text(file: io.BufferedReader, longest: int) -> str:
    """Read the whole content, without a byte order mark.

    Raises:
        InputError: it has more than `longest` bytes.
        UnicodeDecodeError: it is not UTF-8.
    """
    content = bytearray()
    while chunk := file.read(_CHUNK_BYTES):
        content += chunk
        if len(content) > longest:
            raise too_long(longest)
    return content.decode("utf-8-sig")


def read_line(file: io.BufferedReader, longest: int) -> bytes:
    """Read the next line with its line end; b"" at the end of the file.

    Raises:
        InputError: it has more than `longest` bytes.
    """
    line = file.readline(longest + 1)
    if len(line) > longest:
        raise too_long(longest)
    return line


def skip_line(file: io.BufferedReader) -> None:
    """Skip to the end of the line, of any length."""
    while (part := file.readline(_CHUNK_BYTES)) and not part.endswith(b"\n"):
        pass


def is_blank(line: bytes) -> bool:
    """Whether a line contains only whitespace and a byte order mark."""
    return not line.removeprefix(codecs.BOM_UTF8).strip()


def starts_array(file: io.BufferedReader) -> bool:
    """Whether the content is a JSON array."""
    return file.peek(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


class ArrayReader:
    """Iterates over the records of one JSON array, with little more than one record in memory."""

    def __init__(self, file: io.BufferedReader, longest: int) -> None:
        """`longest`: maximum characters of a record."""
        self._file, self._longest = file, longest
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogatepass").decode
        self._scan = json.JSONDecoder().raw_decode
        self._text, self._at = "", 0  # text read so far, and the position up to which it is parsed

    def __iter__(self) -> Iterator[Any]:
        """Yield each record.

        Raises:
            ValueError: the content is not JSON.
            InputError: a record is too long.
        """
        mark, number = self._mark(), 0
        assert mark == "["
        if self._peek() == "]":
            mark = self._mark()
        while mark != "]":
            yield self._record(number)
            mark, number = self._mark(), number + 1
            if mark not in (",", "]"):
                raise ValueError(f"expecting , or ] after record {number - 1}")
        if self._peek():
            raise ValueError("extra data after the array")

    def _record(self, number: int) -> Any:
        self._peek()
        while True:
            try:
                record, self._at = self._scan(self._text, self._at)
                return record
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string")
                is_cut |= error.pos > len(self._text) - _LONGEST_WORD
                if not is_cut or not self._read_more():
                    raise ValueError(f"{error.msg} in record {number}") from None

    def _mark(self) -> str:
        """Consume and return the next character that is not whitespace."""
        mark = self._peek()
        self._at += 1
        return mark

    def _peek(self) -> str:
        """The next character that is not whitespace; "" at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_more():
                return ""

    def _read_more(self) -> bool:
        """Read as much again as is not parsed yet; False at the end of the file."""
        self._text, self._at = self._text[self._at :], 0
        room = self._longest - len(self._text)
        if room < 0:
            raise too_long(self._longest)
        chunk = self._file.read(min(max(_CHUNK_BYTES, len(self._text)), room + 1))
        self._text += self._decode(chunk, final=not chunk)
        return bool(chunk)
