"""Few-shot classification of labelled text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np

from metajax.core import _validate
from metajax.data._source import SPLITS, ClassSource
from metajax.data.readers import _tokens
from metajax.data.readers._files import Row, read_rows, text_files
from metajax.data.readers._texts import encode_rows, read_domains
from metajax.data.sources._class_splits import Splits, divide

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
    """Loads labelled text from files, as tokens; a label is a class.

    Files are UTF-8, plain or compressed with gzip (.gz). The extension determines their format:

    - .jsonl: one JSON object on each line.
    - .csv: RFC 4180 with a header.
    - .tsv: raw, with a header: tabs separate fields, and quotes have no special meaning.
    - .json: an object of lists of `[text, label]`, such as CLINC150's `{"train": [["hello", "greeting"]], "val": []}`.

    Classes may belong to domains (topics, languages), and hierarchical episodes take classes from one domain. If
    `domain` is a column, a class is a label within a domain, `DOMAIN/LABEL`; if it maps domains to labels, a class is a
    label. `splits` divides classes; with `split_by="domain"` it divides whole domains, so that no two splits share one.
    Separate files also keep rows apart. In SIB-200 a row is the same sentence in every language; here the test set has
    other languages and other sentences than the training set:

        options = dict(tokenizer="tokenizer.json", label="category", domain="lang", split_by="domain",
                       splits={"train": ["eng_Latn", "deu_Latn"], "test": ["swh_Latn", "yor_Latn"]})
        train = text("sib200/train.tsv.gz", **options)
        test = text("sib200/test.tsv.gz", split="test", **options)
        spec = EpisodeSpec(ways=5, shots=1, queries=5, hierarchical=True)

    Shares are shares of the classes (or domains) in these files. If the files of two splits hold different classes (or
    domains), give each split its own list.

    Args:
      files: one file or several.
      tokenizer: a file of the tokenizers library (tokenizer.json), or a folder that holds one.
      text: the column of texts.
      label: the column of labels.
      domain: the column of domains; or labels by domain, or a .json file with these; or None.
      split: "train", "val" or "test".
      splits: names of classes by split, or shares that sum to 1, as for `metajax.data.image_folder`; names of domains
        if `split_by` is "domain". None gives 64 % train, 16 % val and 20 % test; `{"test": 1}` puts everything in one
        split.
      split_by: "class" or "domain": what `splits` divides.
      parts: keys of the .json files; by default those of "train", "val" and "test" that exist.
      max_length: largest number of tokens of an example, special tokens included.
      length_buckets: lengths of batches, ascending up to `max_length`; by default a quarter of it, a half and all of
        it. A batch has the smallest length that holds its longest text.
      prefix: text that is put before every text, such as the "query: " that E5 was trained with.
      on_long: what happens to a text of more tokens than `max_length`: "truncate" cuts its end and counts it in the
        source's `truncated`; "refuse" raises an error.
      name: the name in reports; by default the files.

    Returns:
      A source with inputs `{"tokens": int32 [n, max_length], "mask": bool [n, max_length]}`. For padding the mask is
      False and the token is 0. The nodes are the domains.

    Raises:
      ValueError: a file does not exist, is not regular, too large, not UTF-8 or of an unknown extension; a column or
        part is missing; a row has too few or too many fields, is not a JSON object, has an empty text or label (each
        with file and line), or has too many tokens and `on_long` is "refuse"; the tokenizer is invalid; a label has no
        domain or two; an argument is out of range.
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
    """Returns the domain of each class ("" if there are no domains), and the class of each row."""
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
        if classes.setdefault(class_name, domain) != domain:  # names may contain slashes
            raise ValueError(
                f"{row.where} makes class {class_name!r} of domain {domain!r}, which is of domain "
                f"{classes[class_name]!r} in another row"
            )
        of_row.append(class_name)
    return classes, of_row
