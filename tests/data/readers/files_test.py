"""Rows of text files: what the forms mean byte by byte, and what is refused."""

import gzip
import os

import pytest

from metajax.data.readers import _files

COLUMNS = {"text": "text", "label": "label"}


def read(path, parts=None, columns=COLUMNS):
    return _files.read_rows(_files.text_files(path), columns, parts)


def pairs(path):
    return [(row.text, row.label) for row in read(path)]


def refuse(error, path):
    with pytest.raises(ValueError, match=error):
        read(path)


def test_rows_know_their_place(tmp_path):
    (tmp_path / "x.tsv").write_text("text\tlabel\tlang\na\tx\ten\n\nb\ty\tde\n")
    (tmp_path / "x.json").write_text('{"all": [["a", "x"]]}')
    columns = {**COLUMNS, "domain": "lang"}
    assert read(tmp_path / "x.tsv", columns=columns) == [
        ("a", "x", f"line 2 of '{tmp_path / 'x.tsv'}'", "en"),
        ("b", "y", f"line 4 of '{tmp_path / 'x.tsv'}'", "de"),
    ]
    assert read(tmp_path / "x.json", ["all"]) == [("a", "x", f"row 1 of part 'all' of '{tmp_path / 'x.json'}'", "")]


def test_quotes_are_plain_in_tsv_and_quote_in_csv(tmp_path):
    (tmp_path / "x.tsv").write_bytes(b'text\tlabel\n"a b"\tx\n"\tx\n"a\t"x"\n')
    assert pairs(tmp_path / "x.tsv") == [('"a b"', "x"), ('"', "x"), ('"a', '"x"')]
    (tmp_path / "x.csv").write_bytes(b'text,label\r\n"a b",x\r\n\r\n"""a\r\nb""","y, z"\r\n')
    assert pairs(tmp_path / "x.csv") == [("a b", "x"), ('"a\r\nb"', "y, z")]


def test_only_newlines_end_a_line(tmp_path):
    (tmp_path / "x.tsv").write_bytes("\ufefftext\tlabel\r\na\u2028b\x0bc\x0cd\x85e\tx\r\n\r\n\n f \ty".encode())
    assert pairs(tmp_path / "x.tsv") == [("a\u2028b\x0bc\x0cd\x85e", "x"), (" f ", "y")]
    (tmp_path / "x.jsonl").write_bytes('{"label": 3, "text": "a\u2028b", "more": null}\r\n\n'.encode())
    assert pairs(tmp_path / "x.jsonl") == [("a\u2028b", "3")]


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("x.tsv", "text\tkind\na\tx\n", r"label is 'label', .* not among the columns of '.*x.tsv', \['text', 'kind'\]"),
        ("x.csv", "text,label,text\na,x,b\n", r"text is 'text', which is twice among the columns of '.*x.csv'"),
        ("x.jsonl", '{"label": "x", "text": "a"}\n{"text": "a"}', r"label is 'label', .* keys of line 2 .* \['text'\]"),
        ("x.tsv", "text\tlabel\na\tx\n\nb\n", r"line 4 of '.*x.tsv' has 1 fields, where the header has 2"),
        ("x.tsv", "text\tlabel\na\tx\ty\n", r"line 2 of '.*x.tsv' has 3 fields, where the header has 2"),
        ("x.tsv", "text\tlabel\na\tx\n\t\n", r"line 3 of '.*x.tsv' has an empty text \('text'\)"),
        ("x.csv", 'text,label\n"a\nb",x\n"c",y,z\n', r"line 4 of '.*x.csv' has 3 fields, where the header has 2"),
        ("x.csv", 'text,label\na,x\n"b"b,x\n', r"line 3 of '.*x.csv' is no CSV as in RFC 4180 \('.' expected after"),
        ("x.csv", 'text,label\na,x\n"b,x\n', r"line 3 of '.*x.csv' is no CSV .*\(unexpected end of data\)"),
        ("x.csv", f"text,label\n{'a' * 200_000},x\n", r"line 2 of '.*x.csv' must hold at most 131,072 characters"),
        ("x.jsonl", '{"text": "a", "label": "x"}\n[1]\n', r"line 2 of '.*x.jsonl' must be a JSON object, got a list"),
        ("x.jsonl", '{"text": "a", "label": "x"\n', r"line 1 of '.*x.jsonl' is no JSON \(Expecting"),
        ("x.jsonl", "[" * 100_000, r"line 1 of '.*x.jsonl' is no JSON"),
        ("x.jsonl", '{"text": "a", "label": null}', r"line 1 .* must hold a text as label \('label'\), got a NoneType"),
        ("x.jsonl", '{"text": 3, "label": "x"}', r"line 1 of '.*' must hold a text as text \('text'\), got a int"),
        ("x.jsonl", '{"text": "a", "label": true}', r"line 1 .* must hold a text as label \('label'\), got a bool"),
        ("x.jsonl", r'{"text": "\ud800", "label": "x"}', r"line 1 of '.*' has a text \('text'\) that is not Unicode"),
        ("x.tsv", "text\tlabel\n \tx\n", r"line 2 of '.*x.tsv' has an empty text \('text'\)"),
        ("x.tsv", "text\tlabel\na\t\n", r"line 2 of '.*x.tsv' has an empty label \('label'\)"),
        ("x.tsv", b"text\tlabel\na\tx\n\xff\ty\n", r"line 3 of '.*x.tsv' is not UTF-8 \(invalid start byte\)"),
        ("x.tsv", "text\tlabel\n", r"'.*x.tsv' has no rows"),
        ("x.tsv", "", r"text is 'text', which is not among the columns of '.*x.tsv', \[\]"),
        ("x.jsonl", "\n", r"'.*x.jsonl' has no rows"),
        ("x.json", "[1]", r"'.*x.json' must be a JSON object of lists, got a list"),
        ("x.json", "{", r"'.*x.json' is no JSON"),
        ("x.json", '{"all": []}', r"parts is None, but '.*x.json' has only \['all'\]"),
        ("x.json", '{"train": 3}', r"part 'train' of '.*x.json' must be a list, got a int"),
        ("x.json", '{"val": [["a", "x"], ["b"]]}', r"row 2 of part 'val' of '.*x.json' must be \[text, label\]"),
        ("x.json", '{"val": [["a", ""]]}', r"row 1 of part 'val' of '.*x.json' has an empty label"),
        ("x.txt", "a", r"files must end in .jsonl, .csv, .tsv, .json \(or in these and .gz\), got '.*x.txt'"),
        ("x.gz", "a", r"files must end in .jsonl, .csv, .tsv, .json \(or in these and .gz\), got '.*x.gz'"),
        ("x.tsv.gz", "text\tlabel\na\tx\n", r"'.*x.tsv.gz' cannot be read \(Not a gzipped file"),
        ("x.tsv.gz", gzip.compress(b"text\tlabel\na\tx\n", mtime=0)[:-9], r"cannot be read \(Compressed file ended"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, name, content, error):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse(error, tmp_path / name)


def test_what_is_no_file(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text("text\tlabel\na\tx\n")
    refuse(r"files must name regular files, got '.*gone.tsv', which does not exist", tmp_path / "gone.tsv")
    (tmp_path / "folder.tsv").mkdir()
    refuse(r"files must name regular files, got '.*', which is not one", [path, tmp_path / "folder.tsv"])
    os.mkfifo(tmp_path / "pipe.tsv")
    refuse(r"files must name regular files, got '.*', which is not one", tmp_path / "pipe.tsv")
    for nothing in ("", 3, None, [""]):
        refuse("files must name regular files, got", nothing)
    refuse(r"files must name one file at least, got \[\]", [])
    refuse(r"files names '.*x.tsv' twice", [path, str(tmp_path / "folder.tsv" / ".." / "x.tsv")])


def test_files_that_are_too_large(tmp_path, monkeypatch):
    content = b"text\tlabel\n" + b"a\tx\n" * 1000
    monkeypatch.setattr(_files, "MAX_BYTES", len(content) - 1)
    for name, stored in (("x.tsv", content), ("y.tsv.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(stored)
        refuse(rf"'.*{name}' has more than {len(content) - 1} bytes, unpacked", tmp_path / name)
    monkeypatch.setattr(_files, "MAX_BYTES", len(content))
    assert len(read(tmp_path / "y.tsv.gz")) == 1000
