"""Texts with labels, read from files as a stream: .txt, .jsonl, .csv, .parquet; or a data set of the Hugging Face hub.

A file that cannot be read, or not to its end, is named; the rest goes on.
"""

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Text = tuple[str, str]
"""A text and its label."""


@dataclass
class TextFiles:
    """Iterate over it once: it gives (text, label), blank texts left out."""

    paths: Sequence[str | Path]
    column: str = "text"
    """Where the text is, in all files but .txt, whose lines are texts."""
    label: str | None = None
    """The column of the label; where there is none, a file's name is the label of its texts."""
    trouble: list[str] = field(default_factory=list)
    """A sentence for each file that could not be read, or not to its end."""

    def __iter__(self) -> Iterator[Text]:
        for path in map(Path, self.paths):
            n = 0
            try:
                for text, label in self._read(path):
                    n += 1
                    if text.strip():
                        yield text, label
            except (OSError, ValueError, KeyError, csv.Error) as error:
                said = f"{path}: {_said(error)}" + (f" It was read up to text {n}." if n else "")
                self.trouble.append(said)
                print(f"gemmascope: {said}", file=sys.stderr)

    def _read(self, path: Path) -> Iterator[Text]:
        ending = path.suffix.lower()
        if ending not in _READERS:
            raise ValueError(f"{path.suffix or 'no ending'} is not read; {', '.join(_READERS)} are.")
        if ending == ".txt":
            yield from ((line, _writable(path.stem)) for line in _lines(path))
            return
        for row in _READERS[ending](path, [name for name in (self.column, self.label) if name]):
            yield taken(row, self.column, self.label, path.stem)


def taken(row: dict, column: str, label: str | None, name: str) -> Text:
    """The text and label of a row; `name` is the label where there is no column of labels.

    Raises:
        ValueError: where a column is missing, or the text is no text.
    """
    missing = next((one for one in (column, label) if one is not None and one not in row), None)
    if missing is not None:
        raise ValueError(f"There is no column {missing!r}; there are {', '.join(map(str, row)) or 'none'}.")
    if not isinstance(row[column], str | None):
        raise ValueError(f"Column {column!r} holds {type(row[column]).__name__}, and not text.")
    text = row[column] or ""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"Column {column!r} holds half of a character (a surrogate), and not text.")
    return text, _writable(name if label is None else str(row[label]))


def _writable(label: str) -> str:
    """A label that can be written as UTF-8: a file's name may be in another encoding."""
    return label.encode("utf-8", "backslashreplace").decode("utf-8")


def hub_texts(name: str, split: str = "train", column: str = "text", label: str | None = None) -> Iterator[Text]:
    """The texts of a data set on the hub, "NAME" or "NAME:CONFIGURATION", as a stream.

    Raises:
        ValueError: where a column is missing; and what `datasets.load_dataset` raises.
    """
    from datasets import load_dataset

    name, _, configuration = name.partition(":")
    for row in load_dataset(name, configuration or None, split=split, streaming=True):
        text, own = taken(row, column, label, name)
        if text.strip():
            yield text, own


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as opened:  # without the mark that Windows puts first
        yield from (line.rstrip("\n") for line in opened)


def _jsonl(path: Path, columns: list[str]) -> Iterator[dict]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"Line {number} is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise ValueError(f"Line {number} is not an object with columns, but a {type(row).__name__}.")
        yield row


def _csv(path: Path, columns: list[str]) -> Iterator[dict]:
    csv.field_size_limit(2**31 - 1)  # texts may be longer than the 128 KB that a field is by default
    with path.open(encoding="utf-8-sig", newline="") as opened:
        yield from csv.DictReader(opened)


def _parquet(path: Path, columns: list[str]) -> Iterator[dict]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as opened:
        there = [name for name in columns if name in opened.schema_arrow.names]
        if len(there) < len(columns):  # `taken` says which
            yield dict.fromkeys(opened.schema_arrow.names)
        for batch in opened.iter_batches(1024, columns=there):
            yield from batch.to_pylist()


_READERS = {".txt": _lines, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}


def _said(error: Exception) -> str:
    """What went wrong, as a sentence."""
    if isinstance(error, UnicodeDecodeError):
        return f"It is not UTF-8 text: {error.reason} at byte {error.start}."
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return said if said.endswith(".") else f"{said}."
