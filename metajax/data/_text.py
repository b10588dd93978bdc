"""Few-shot classification of anybody's labelled text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np

from metajax.core import _validate
from metajax.data._class_splits import Splits, divide
from metajax.data._sources import SPLITS, ClassSource
from metajax.data.readers import _tokens
from metajax.data.readers._files import Row, read_rows, text_files
from metajax.data.readers._texts import encode_rows, read_domains

Path = str | os.PathLike[str]


def text(
    files: Path | Sequence[Path],
    *,
    tokenizer: Path,
    text: str = "text",
    label: str = "label",
    domain: str | os.PathLike[str] | Mapping[str, Sequence[str]] | None = None,
    split: str = "train",
    splits: Splits | None = None,
    split_by: str = "class",
    parts: Sequence[str] | None = None,
    max_length: int = 128,
    length_buckets: Sequence[int] | None = None,
    prefix: str = "",
    on_long: str = "truncate",
    name: str | None = None,
) -> ClassSource:
    """Labelled text from files, as tokens; a label is a class.

    Files are UTF-8, plain or gzip'd (.gz), and told by their extension:

    - .jsonl: one JSON object a line.
    - .csv: RFC 4180 with a header.
    - .tsv: raw, with a header: fields are what stands between tabs, and quotes are characters like others.
    - .json: an object of lists of `[text, label]`, such as CLINC150's `{"train": [["hello", "greeting"]], "val": []}`.

    Classes may belong to domains (topics, languages), and hierarchical episodes take theirs from one domain. Where
    `domain` is a column, a class is a label within a domain, `DOMAIN/LABEL`; where it maps domains to labels, a class
    is a label. Classes are divided by `splits`; with `split_by="domain"` whole domains are, so that no two splits share
    one. Rows can be kept apart too, by files. In SIB-200 a row is the same sentence in every language; here test has
    other languages than training, and other sentences:

        options = dict(tokenizer="tokenizer.json", label="category", domain="lang", split_by="domain",
                       splits={"train": ["eng_Latn", "deu_Latn"], "test": ["swh_Latn", "yor_Latn"]})
        train = text("sib200/train.tsv.gz", **options)
        test = text("sib200/test.tsv.gz", split="test", **options)
        spec = EpisodeSpec(ways=5, shots=1, queries=5, hierarchical=True)

    Shares are shares of the classes (or domains) that these files hold. Where the files of two splits do not hold the
    same ones, give each its own list.

    Args:
      files: one file or several.
      tokenizer: a file of the tokenizers library (tokenizer.json), or a folder that holds one.
      text: the column of texts.
      label: the column of labels.
      domain: the column of domains; or labels by domain, or a .json file of that; or None.
      split: "train", "val" or "test".
      splits: names of classes by split, or shares that sum to 1, as for `metajax.data.image_folder`; names of domains
        where `split_by` is "domain". None is 64 % train, 16 % val and 20 % test; `{"test": 1}` divides nothing.
      split_by: "class" or "domain": what `splits` divides.
      parts: keys of the .json files; by default those of "train", "val" and "test" that are there.
      max_length: tokens of an example, special tokens included.
      length_buckets: lengths that batches come in, ascending up to `max_length`; by default a quarter of it, a half and
        all of it. A batch has the smallest one that holds its longest text.
      prefix: stands before every text, such as the "query: " that E5 was trained with.
      on_long: what becomes of a text of more tokens than `max_length`: "truncate", it loses its end and is counted in
        the source's `truncated`; or "refuse".
      name: what reports call it; by default the files.

    Returns:
      A source with inputs `{"tokens": int32 [n, max_length], "mask": bool [n, max_length]}`; where the mask is False
      there is padding, and the token is 0. Its nodes are the domains.

    Raises:
      ValueError: a file is not there, not regular, too large, not UTF-8 or of an unknown extension; a column or part is
        missing; a row has too few or too many fields, is no JSON object, or has an empty text or label (each with file
        and line), or too many tokens where those are refused; the tokenizer is none; a label has no domain or two; an
        argument is out of range.
      ImportError: the tokenizers library is not installed.

    >>> text("no/such/file.tsv", tokenizer="tokenizer.json")
    Traceback (most recent call last):
      ...
    ValueError: files must name regular files, got 'no/such/file.tsv', which does not exist
    """
    _validate.one_of("split", split, SPLITS)
    _validate.one_of("split_by", split_by, ("class", "domain"))
    if split_by == "domain" and domain is None:
        raise ValueError("domain must name the domains where split_by is 'domain', got None")
    buckets = _tokens.buckets_of(max_length, length_buckets)
    paths = text_files(files)
    name = name or "+".join(map(str, paths))
    by_label = None
    columns = {"text": text, "label": label}
    if isinstance(domain, str) and not domain.lower().endswith((".json", ".json.gz")):
        columns["domain"] = domain
    elif domain is not None:
        by_label = read_domains(domain)
    encoder = _tokens.load_tokenizer(tokenizer, max_length, user="text")
    rows = read_rows(paths, columns, parts)
    classes, of_row = _classes(rows, by_label, "domain" in columns)
    if split_by == "domain":
        domains = set(divide(set(classes.values()), split, splits, f"{name} (split by domain)"))
        chosen = sorted(class_name for class_name, its_domain in classes.items() if its_domain in domains)
    else:
        chosen = divide(classes, split, splits, name)
    number = {class_name: place for place, class_name in enumerate(chosen)}
    nodes: dict[str, list[str]] = {}
    for class_name in chosen if domain is not None else ():
        nodes.setdefault(classes[class_name], []).append(class_name)
    kept = [place for place, class_name in enumerate(of_row) if class_name in number]
    encoded = encode_rows(encoder, [rows[place] for place in kept], max_length, prefix=prefix, on_long=on_long)
    return ClassSource(
        name,
        split,
        encoded.inputs,
        np.array([number[of_row[place]] for place in kept]),
        tuple(chosen),
        nodes=nodes,
        lengths=encoded.lengths,
        length_buckets=buckets,
        truncated=encoded.truncated,
    )


def _classes(rows: Sequence[Row], by_label: dict[str, str] | None, column: bool) -> tuple[dict[str, str], list[str]]:
    """The domain of each class ("" where there are none), and the class of each row."""
    classes: dict[str, str] = {}
    of_row = []
    for row in rows:
        class_name, domain = row.label, row.domain
        if column:
            class_name = f"{row.domain}/{row.label}"
        elif by_label is not None:
            if row.label not in by_label:
                raise ValueError(f"domain has no domain for label {row.label!r} ({row.where})")
            domain = by_label[row.label]
        if classes.setdefault(class_name, domain) != domain:  # the names have slashes themselves
            raise ValueError(
                f"{row.where} makes class {class_name!r} of domain {domain!r}, which is of domain "
                f"{classes[class_name]!r} in another row"
            )
        of_row.append(class_name)
    return classes, of_row
