"""Texts are read from every kind of file; what cannot be read is named, and the rest goes on."""

import json
import os
from pathlib import Path

import pandas
import pytest

from gemmascope.routing.corpus import TextFiles, hub_texts

ROWS = [{"text": "one, two", "domain": "a"}, {"text": 'three\n"four"', "domain": "b"}, {"text": " ", "domain": "b"}]
READ = [("one, two", "a"), ('three\n"four"', "b")]


def written(folder, ending):
    path = folder / f"some{ending}"
    table = pandas.DataFrame(ROWS)
    if ending == ".csv":
        table.to_csv(path, index=False)
    elif ending == ".parquet":
        table.to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "\n")
    return path


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".jsonl"])
def test_columns_are_read(ending, tmp_path):
    path = written(tmp_path, ending)
    assert list(TextFiles([path], label="domain")) == READ
    assert list(TextFiles([path])) == [(text, "some") for text, _ in READ]
    assert list(TextFiles([path], column="domain")) == [("a", "some"), ("b", "some"), ("b", "some")]
    files = TextFiles([path], column="body")
    assert list(files) == []
    assert files.trouble == [f"{path}: There is no column 'body'; there are text, domain."]


def test_a_line_is_a_text(tmp_path):
    (tmp_path / "tale.txt").write_text("once\n\nupon a time\r\n", encoding="utf-8")
    assert list(TextFiles([tmp_path / "tale.txt"])) == [("once", "tale"), ("upon a time", "tale")]


def test_files_of_windows_and_loud_endings_are_read(tmp_path):
    (tmp_path / "a.CSV").write_text("text,domain\none,x\n", encoding="utf-8-sig")
    (tmp_path / "b.JSONL").write_text('{"text": "two", "domain": "y"}\n', encoding="utf-8-sig")
    (tmp_path / "c.TXT").write_text("three\n", encoding="utf-8-sig")
    files = TextFiles([tmp_path / "a.CSV", tmp_path / "b.JSONL"], label="domain")
    assert list(files) == [("one", "x"), ("two", "y")] and not files.trouble
    assert list(TextFiles([tmp_path / "c.TXT"])) == [("three", "c")]


def test_a_label_can_be_written_whatever_the_file_is_called(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt"))
    path.write_text("one\n")
    assert list(TextFiles([path])) == [("one", "caf\\udce9")]
    (tmp_path / "odd.jsonl").write_text('{"text": "two", "domain": "\\ud800"}\n')
    assert list(TextFiles([tmp_path / "odd.jsonl"], label="domain")) == [("two", "\\ud800")]


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(tmp_path, capsys):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "torn.jsonl").write_text('{"text": "good"}\n{"text": ')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "number.jsonl").write_text('{"text": 7}\n')
    (tmp_path / "half.jsonl").write_text('{"text": "whole"}\n{"text": "half \\ud800"}\n')
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "image.png").write_bytes(b"")
    (tmp_path / "good.txt").write_text("still read\n")
    names = [
        "none.txt",
        "latin.txt",
        "torn.jsonl",
        "list.jsonl",
        "number.jsonl",
        "half.jsonl",
        "torn.parquet",
        "image.png",
        "good.txt",
    ]
    files = TextFiles([tmp_path / name for name in names])
    assert list(files) == [("good", "torn"), ("whole", "half"), ("still read", "good")]
    assert len(files.trouble) == 8
    assert "holds half of a character" in files.trouble[5] and files.trouble[5].endswith("read up to text 1.")
    said = dict(zip(names, files.trouble, strict=False))
    assert "No such file" in said["none.txt"] and "not UTF-8" in said["latin.txt"]
    assert "Line 2 is not JSON" in said["torn.jsonl"] and said["torn.jsonl"].endswith("It was read up to text 1.")
    assert "not an object" in said["list.jsonl"] and "holds int, and not text" in said["number.jsonl"]
    assert ".png is not read; .txt, .jsonl, .csv, .parquet are." in said["image.png"]
    err = capsys.readouterr().err
    assert all(sentence in err for sentence in files.trouble)
    assert all(str(tmp_path / name) in said[name] for name in said)


def test_a_data_set_of_the_hub_is_a_stream(monkeypatch):
    asked = []

    def load_dataset(name, configuration, **settings):
        asked.append((name, configuration, settings))
        return iter(ROWS)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(hub_texts("some/set:english", "test", label="domain")) == READ
    assert asked == [("some/set", "english", dict(split="test", streaming=True))]
    assert list(hub_texts("some/set")) == [(text, "some/set") for text, _ in READ]
    assert asked[1][1] is None
