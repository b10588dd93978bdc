"""text: which tokens a file gives, how classes and domains are divided, and what is refused."""

import csv
import gzip
import json
import sys

import jax
import numpy as np
import pytest

from metajax.data import EpisodeSpec, batches, device_sampler, episode, episode_batch, episodes, text
from metajax.data.readers._files import parts_of
from metajax.data.sources import _text

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra 'text'")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh", '"a', 'b"', '"']
ID = {word: number for number, word in enumerate(WORDS)}
ROWS = [("a b c", "x", "en"), ("d", "y", "en"), ("e f", "x", "de"), ("g nowhere", "z", "de")]
ALL = {"splits": {"train": 1}}


def write_tokenizer(path, special=False):
    """Words between spaces; the file asks for padding and truncation of its own, which must not count."""
    encoder = tokenizers.Tokenizer(tokenizers.models.WordLevel(ID, unk_token="[UNK]"))
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if special:
        encoder.post_processor = tokenizers.processors.BertProcessing(("[SEP]", ID["[SEP]"]), ("[CLS]", ID["[CLS]"]))
    encoder.enable_padding(length=100)
    encoder.enable_truncation(5)
    encoder.save(str(path))
    return path


@pytest.fixture
def tokenizer(tmp_path):
    return write_tokenizer(tmp_path / "tokenizer.json")


def tsv(path, rows, header=("text", "label", "domain")):
    path.write_bytes("".join("\t".join(row) + "\n" for row in [header, *rows]).encode())
    return path


def many(path, domains=("en", "de", "fr"), labels="uvwxyz", lengths=(1, 2, 3, 4, 5, 6)):
    """Classes of several domains, with texts "a", "a b" and so on of so many words."""
    rows = [
        (" ".join("abcdefgh"[:length]), label, domain) for domain in domains for label in labels for length in lengths
    ]
    return tsv(path, rows)


def contents(source):
    """The words of each class, padding left out."""
    lines = [
        " ".join(WORDS[token] for token in tokens[mask])
        for tokens, mask in zip(source.inputs["tokens"], source.inputs["mask"], strict=True)
    ]
    return {name: [lines[row] for row in rows] for name, rows in zip(source.class_names, source.members, strict=True)}


def test_values_of_a_small_file(tmp_path, tokenizer):
    source = text(tsv(tmp_path / "x.tsv", ROWS), tokenizer=tokenizer, max_length=4, **ALL)
    a, b, c, d, e, f, g, unknown = (ID[word] for word in [*"abcdefg", "[UNK]"])
    expected = [[a, b, c, 0], [d, 0, 0, 0], [e, f, 0, 0], [g, unknown, 0, 0]]
    assert source.inputs["tokens"].tolist() == expected
    assert source.inputs["mask"].tolist() == [[token > 0 for token in line] for line in expected]
    assert source.inputs["tokens"].dtype == np.int32
    assert source.inputs["mask"].dtype == bool
    assert source.class_names == ("x", "y", "z")
    assert source.labels.tolist() == [0, 1, 0, 2]
    assert source.lengths.tolist() == [3, 1, 2, 2]
    assert source.length_buckets == (1, 2, 4)
    assert (source.name, source.split, dict(source.nodes)) == (str(tmp_path / "x.tsv"), "train", {})


def jsonl(path, rows):
    keys = ("text", "label", "domain")
    path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))


def with_csv(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("label", "domain", "text"), *((row[1], row[2], row[0]) for row in rows)])


def lists(path, rows):
    path.write_text(json.dumps({"other": 3, "test": [rows[-1][:2]], "train": [row[:2] for row in rows[:-1]]}))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(("kind", "write"), [("tsv", tsv), ("jsonl", jsonl), ("csv", with_csv), ("json", lists)])
def test_all_forms_of_a_file_give_the_same(tmp_path, tokenizer, kind, write, zipped):
    path = tmp_path / f"x.{kind}"
    write(path, ROWS)
    if zipped:
        (tmp_path / f"y.{kind.upper()}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path = tmp_path / f"y.{kind.upper()}.gz"
    source = text(str(path), tokenizer=str(tokenizer), **ALL)
    assert contents(source) == {"x": ["a b c", "e f"], "y": ["d"], "z": ["g [UNK]"]}
    assert source.inputs["tokens"].shape == (4, 128)
    assert source.length_buckets == (32, 64, 128)


def test_several_files_are_one_source(tmp_path, tokenizer):
    files = [tsv(tmp_path / "x.tsv", ROWS), tmp_path / "y.jsonl"]
    jsonl(files[1], [("h", "y", "fr"), ("h h", "w", "fr")])
    source = text(files, tokenizer=tokenizer, **ALL)
    assert contents(source) == {"w": ["h h"], "x": ["a b c", "e f"], "y": ["d", "h"], "z": ["g [UNK]"]}
    assert source.name == f"{files[0]}+{files[1]}"
    assert text(files, tokenizer=tokenizer, name="both", **ALL).name == "both"


def test_special_tokens_survive_truncation(tmp_path):
    (tmp_path / "folder").mkdir()
    write_tokenizer(tmp_path / "folder" / "tokenizer.json", special=True)
    path = tsv(tmp_path / "x.tsv", [("a b c d e f", "x", "d"), ("a b", "x", "d"), ("a b c d", "x", "d")])
    source = text(path, tokenizer=tmp_path / "folder", max_length=6, length_buckets=[4, 6], **ALL)
    assert contents(source) == {"x": ["[CLS] a b c d [SEP]", "[CLS] a b [SEP]", "[CLS] a b c d [SEP]"]}
    assert source.lengths.tolist() == [6, 4, 6]
    longer = text(path, tokenizer=tmp_path / "folder", max_length=8, **ALL)
    assert contents(longer)["x"][0] == "[CLS] a b c d e f [SEP]", "the file's own truncation to 5 does not count"
    assert longer.lengths.tolist() == [8, 4, 6]
    with pytest.raises(ValueError, match=r"max_length must leave room beside the 2 special tokens of '.*', got 2"):
        text(path, tokenizer=tmp_path / "folder", max_length=2, **ALL)


def test_a_column_of_domains(tmp_path, tokenizer):
    source = text(tsv(tmp_path / "x.tsv", ROWS), tokenizer=tokenizer, domain="domain", **ALL)
    assert contents(source) == {"de/x": ["e f"], "de/z": ["g [UNK]"], "en/x": ["a b c"], "en/y": ["d"]}
    assert {node: members.tolist() for node, members in source.nodes.items()} == {"de": [0, 1], "en": [2, 3]}
    splits = {"train": ["en/x", "de/z"], "test": ["DE/X"]}
    train = text(tmp_path / "x.tsv", tokenizer=tokenizer, domain="domain", splits=splits)
    assert contents(train) == {"de/z": ["g [UNK]"], "en/x": ["a b c"]}
    assert {node: members.tolist() for node, members in train.nodes.items()} == {"de": [0], "en": [1]}
    test = text(tmp_path / "x.tsv", tokenizer=tokenizer, domain="domain", splits=splits, split="test")
    assert contents(test) == {"de/x": ["e f"]}


@pytest.mark.parametrize("form", ["mapping", "path", "text"])
def test_a_mapping_of_domains(tmp_path, tokenizer, form):
    tsv(tmp_path / "x.tsv", ROWS)
    domain = {"early": ["x", "absent"], "late": ["z", "y"], "none": []}
    (tmp_path / "domains.json").write_text(json.dumps(domain))
    if form != "mapping":
        domain = tmp_path / "domains.json" if form == "path" else str(tmp_path / "domains.json")
    source = text(tmp_path / "x.tsv", tokenizer=tokenizer, domain=domain, **ALL)
    assert contents(source) == {"x": ["a b c", "e f"], "y": ["d"], "z": ["g [UNK]"]}
    assert {node: members.tolist() for node, members in source.nodes.items()} == {"early": [0], "late": [1, 2]}
    options = {"split_by": "domain", "splits": {"train": ["late"], "test": ["early"]}}
    train, test = (
        text(tmp_path / "x.tsv", tokenizer=tokenizer, domain=domain, split=split, **options)
        for split in ("train", "test")
    )
    assert (train.class_names, test.class_names) == (("y", "z"), ("x",))


def test_division_by_class_and_by_domain(tmp_path, tokenizer):
    path = many(tmp_path / "x.tsv", domains=[f"d{k:02d}" for k in range(10)])
    for options in ({}, {"splits": {"train": 0.5, "val": 0.3, "test": 0.2}}):
        for split_by in ("class", "domain"):
            found = {
                split: text(path, tokenizer=tokenizer, domain="domain", split=split, split_by=split_by, **options)
                for split in ("train", "val", "test")
            }
            assert sum(source.num_classes for source in found.values()) == 60
            assert len({name for source in found.values() for name in source.class_names}) == 60
            if split_by == "class":
                assert found["train"].num_classes == (30 if options else 38)
                continue
            assert [len(source.nodes) for source in found.values()] == ([5, 3, 2] if options else [6, 2, 2])
            for source in found.values():
                assert source.num_classes == 6 * len(source.nodes), "all classes of a domain stay together"
                assert {name.split("/")[0] for name in source.class_names} == set(source.nodes)


def test_other_domains_and_other_rows_in_test(tmp_path, tokenizer):
    train_file, test_file = many(tmp_path / "train.tsv"), many(tmp_path / "test.tsv", lengths=(7, 8))
    options = {"domain": "domain", "split_by": "domain", "splits": {"train": ["en", "de"], "test": ["fr"]}}
    train = text(train_file, tokenizer=tokenizer, **options)
    test = text(test_file, tokenizer=tokenizer, split="test", **options)
    assert (sorted(train.nodes), sorted(test.nodes)) == (["de", "en"], ["fr"])
    assert set(train.counts) == {6}
    assert set(test.counts) == {2}


def test_hierarchical_episodes_stay_in_one_domain(tmp_path, tokenizer):
    rows = [(word, label, domain) for domain, word in zip(("en", "de", "fr"), "abc", strict=True) for label in "xyz"]
    source = text(tsv(tmp_path / "x.tsv", rows * 4), tokenizer=tokenizer, domain="domain", **ALL)
    drawn = episode_batch(source, EpisodeSpec(3, 1, 3, hierarchical=True), seed=0, start=0, count=60)
    words = np.concatenate([part.inputs["tokens"][..., 0] for part in drawn], axis=1)
    assert (words == words[:, :1]).all()
    assert set(words[:, 0]) == {ID["a"], ID["b"], ID["c"]}
    mixed = episode_batch(source, EpisodeSpec(3, 1, 3), seed=0, start=0, count=60)
    words = mixed.query.inputs["tokens"][..., 0]
    assert (words != words[:, :1]).any(), "other episodes mix them"


def test_batches_have_one_shape_for_each_bucket(tmp_path, tokenizer):
    path = many(tmp_path / "x.tsv", labels="xy", lengths=(1,) * 26 + (2, 3, 4))
    source = text(path, tokenizer=tokenizer, domain="domain", max_length=4, length_buckets=(2, 3, 4), **ALL)
    spec = EpisodeSpec((2, 3), (1, 2), 1)
    stream, seen = episodes(source, spec, batch=2, seed=0), {}
    for k in range(80):
        batch = next(stream)
        inputs = [part.inputs for part in batch]
        length = inputs[0]["tokens"].shape[-1]
        longest = max(int(part["mask"].sum(axis=-1).max()) for part in inputs)
        assert length == max(2, longest), "the smallest bucket that holds all texts"
        for part in batch:
            tokens, mask = part.inputs["tokens"], part.inputs["mask"]
            assert (tokens.dtype, mask.dtype) == (np.int32, bool)
            assert not mask[~part.mask].any(), "nothing in padded examples"
            assert mask[part.mask].any(axis=-1).all()
            assert not tokens[~mask].any()
            # every text counts up from "a", so that its length says what it is
            expected = np.where(mask, ID["a"] + np.arange(length), 0)
            np.testing.assert_array_equal(tokens, expected)
        if k % 8 == 0:
            alone = episode_batch(source, spec, seed=0, start=2 * k, count=2)
            jax.tree.map(np.testing.assert_array_equal, batch, alone)
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        seen.setdefault(shapes, []).append(length)
    assert {lengths[0] for lengths in seen.values()} == {2, 3, 4}
    assert len(seen) <= len(spec.sizes) * len(source.length_buckets)


def test_fixed_episodes_have_as_many_shapes_as_buckets(tmp_path, tokenizer):
    path = many(tmp_path / "x.tsv", lengths=(1,) * 12 + (3, 4, 7, 8))
    source = text(path, tokenizer=tokenizer, domain="domain", max_length=8, **ALL)
    stream = episodes(source, EpisodeSpec(2, 1, 1), batch=1, seed=0)
    lengths = {next(stream).query.inputs["tokens"].shape for _ in range(200)}
    assert lengths == {(1, 2, length) for length in (2, 4, 8)}


@pytest.mark.parametrize("spec", [EpisodeSpec(2, 1, 2), EpisodeSpec((2, 5), (1, 2), 2)], ids=["fixed", "varying"])
def test_pipeline_and_device_sampler_agree(tmp_path, tokenizer, spec):
    source = text(many(tmp_path / "x.tsv"), tokenizer=tokenizer, domain="domain", max_length=8, **ALL)
    data, sample = device_sampler(source, spec)
    drawn = jax.jit(jax.vmap(sample, (None, 0)))(data, jax.random.split(jax.random.key(0), 20))
    piped = next(episodes(source, spec, batch=20, seed=0))
    assert jax.tree.structure(drawn) == jax.tree.structure(piped)
    for one, other in zip(jax.tree.leaves(drawn), jax.tree.leaves(piped), strict=True):
        assert (one.dtype, one.ndim) == (other.dtype, other.ndim)
    for part, size in ((drawn.support, spec.capacity.support), (drawn.query, spec.capacity.query)):
        tokens, mask = (np.asarray(part.inputs[name]) for name in ("tokens", "mask"))
        assert tokens.shape == mask.shape == (20, size, 8), "sequences of full length"
        np.testing.assert_array_equal(mask.any(axis=-1), part.mask)
        np.testing.assert_array_equal(tokens, np.where(mask, ID["a"] + np.arange(8), 0))


def test_labelled_batches(tmp_path, tokenizer):
    source = text(tsv(tmp_path / "x.tsv", ROWS), tokenizer=tokenizer, max_length=4, **ALL)
    query = next(batches(source, 32, seed=0)).query
    assert query.inputs["tokens"].shape == (1, 32, 4)
    label_of = {ID["a"]: 0, ID["d"]: 1, ID["e"]: 0, ID["g"]: 2}
    assert [label_of[token] for token in query.inputs["tokens"][0, :, 0].tolist()] == query.targets[0].tolist()


def test_parts_of_a_json_file(tmp_path, tokenizer):
    parts = {"train": [["a", "x"]], "val": [["b", "x"]], "oos_train": [["c", "oos"]]}
    path = tmp_path / "x.json"
    path.write_text(json.dumps(parts))
    assert contents(text(path, tokenizer=tokenizer, **ALL)) == {"x": ["a", "b"]}
    assert contents(text(path, tokenizer=tokenizer, parts=["val"], **ALL)) == {"x": ["b"]}
    assert contents(text(path, tokenizer=tokenizer, parts=("oos_train", "train"), **ALL)) == {"oos": ["c"], "x": ["a"]}


def test_parts_hold_texts(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"train": [["a", "x"]], "oos_test": [], "oos_note": "none"}))
    assert parts_of(tmp_path / "x.json") == ("train",)


def refuse(text_of_error, files, tokenizer, kind=ValueError, **options):
    with pytest.raises(kind, match=text_of_error):
        text(files, tokenizer=tokenizer, **{**ALL, **options})


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"split": "all"}, "split must be one of 'train', 'val', 'test', got 'all'"),
        ({"split_by": "file"}, "split_by must be one of 'class', 'domain', got 'file'"),
        ({"split_by": "domain"}, "domain must name the domains where split_by is 'domain', got None"),
        ({"text": "words"}, r"text is 'words', which is not among the columns of '.*', \['text', 'label', 'domain'\]"),
        ({"domain": "lang"}, "domain is 'lang', which is not among the columns of"),
        ({"splits": {"train": ["x", "w"]}}, r"x.tsv lacks 1 of the 2 classes .*, the first is 'w'"),
        ({"splits": {"test": ["x"]}}, "splits must name classes for split 'train'"),
        (
            {"splits": {"train": ["fr"]}, "split_by": "domain", "domain": "domain"},
            r"x.tsv \(split by domain\) lacks 1 of the 1 classes that splits\['train'\] names, the first is 'fr'",
        ),
        (
            {"splits": {"train": ["de"], "val": ["de"]}, "split_by": "domain", "domain": "domain"},
            r"splits names class 'de' twice \(train, val\)",
        ),
        ({"splits": None, "split_by": "domain", "domain": "domain"}, r"\(split by domain\) has 2 class\(es\)"),
        ({"domain": {"early": ["x", "y"]}}, r"domain has no domain for label 'z' \(line 5 of '.*x.tsv'\)"),
        ({"domain": {"a": ["x", "y"], "b": ["x"]}}, "domain has label 'x' in two domains, 'a' and 'b'"),
        ({"domain": {"a": "x"}}, "domain must map 'a' to a list of labels, got 'x'"),
        ({"domain": {"a": [1]}}, r"domain must map 'a' to a list of labels, got \[1\]"),
        ({"domain": {1: ["x"]}}, r"domain must map 1 to a list of labels, got \['x'\]"),
        ({"domain": "no/domains.json"}, "domain must name regular files, got 'no/domains.json', which does not exist"),
        ({"parts": ["train"]}, r"parts must be None for '.*x.tsv', since only .json files have parts"),
        ({"parts": "train"}, "parts must be a list of different keys, got 'train'"),
        ({"max_length": 0}, "max_length must be an integer of at least 1, got 0"),
        ({"length_buckets": (32, 64)}, r"length_buckets must ascend and end with max_length, 128, got \(32, 64\)"),
        ({"length_buckets": (64, 32, 128)}, "length_buckets must ascend and end with max_length, 128, got"),
        ({"length_buckets": (0, 128)}, "a length of length_buckets must be an integer of at least 1, got 0"),
        ({"length_buckets": ()}, r"length_buckets must ascend and end with max_length, 128, got \(\)"),
    ],
)  # fmt: skip
def test_bad_options(tmp_path, tokenizer, options, error):
    refuse(error, tsv(tmp_path / "x.tsv", ROWS), tokenizer, **options)


def test_bad_parts_and_domains_of_files(tmp_path, tokenizer):
    path = tmp_path / "x.json"
    path.write_text('{"train": [["a", "x"]], "test": []}')
    refuse(r"parts is 'dev', but '.*x.json' has only \['train', 'test'\]", path, tokenizer, parts=["train", "dev"])
    refuse(r"parts must be a list of different keys, got \['train', 'train'\]", path, tokenizer, parts=["train"] * 2)
    refuse(r"parts must be a list of different keys, got \[\]", path, tokenizer, parts=[])
    refuse(r"domain must map domains to labels for '.*x.json', whose rows have no columns", path, tokenizer, domain="d")
    (tmp_path / "list.json").write_text("[1]")
    refuse(
        r"domain '.*list.json' must map domains to lists of labels, got a list", path, tokenizer,
        domain=tmp_path / "list.json",
    )  # fmt: skip


def test_domains_whose_slashes_meet(tmp_path, tokenizer):
    path = tsv(tmp_path / "x.tsv", [("a", "b/c", "a"), ("a", "c", "a/b")])
    refuse(
        r"line 3 of '.*' makes class 'a/b/c' of domain 'a/b', which is of domain 'a' in",
        path,
        tokenizer,
        domain="domain",
    )


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2]", b"\xff\xfe\x00", b'{"model": {"type": "BPE"}}'])
def test_a_tokenizer_that_is_none(tmp_path, content):
    path = tsv(tmp_path / "x.tsv", ROWS)
    (tmp_path / "bad.json").write_bytes(content)
    refuse(r"tokenizer must be a file of the tokenizers library \(tokenizer.json\), got '.*bad.json' \(", path,
           tmp_path / "bad.json")  # fmt: skip
    refuse("tokenizer must name regular files, got 'gone.json', which does not exist", path, "gone.json")
    (tmp_path / "folder").mkdir()
    refuse(r"tokenizer must name regular files, got '.*folder.tokenizer.json'", path, tmp_path / "folder")


def test_a_tokenizer_whose_special_tokens_are_not_there(tmp_path):
    whole = json.loads(write_tokenizer(tmp_path / "tokenizer.json").read_text())
    whole["post_processor"] = {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}], "pair": [],
        "special_tokens": {},
    }  # fmt: skip
    (tmp_path / "bad.json").write_text(json.dumps(whole))
    refuse(r"tokenizer must be a file of the tokenizers library", tsv(tmp_path / "x.tsv", ROWS), tmp_path / "bad.json")


def test_texts_that_the_tokenizer_does_not_take(tmp_path):
    path = tsv(tmp_path / "x.tsv", [*ROWS, ("zzz", "x", "en")])
    words, letters = {**ID, "nowhere": 99}, {letter: number for number, letter in enumerate("abcdefgnowhere")}
    for model, error in (
        (tokenizers.models.WordLevel(words, unk_token="[?]"), "cannot be tokenised"),
        (tokenizers.models.BPE(letters, []), "gives no tokens"),
    ):
        encoder = tokenizers.Tokenizer(model)
        encoder.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        encoder.save(str(tmp_path / "own.json"))
        refuse(rf"the text in line 6 of '.*x.tsv' {error}", path, tmp_path / "own.json")


def test_without_the_library(tmp_path, tokenizer, monkeypatch):
    assert not hasattr(_text, "tokenizers"), "it is imported only where it is used"
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refuse(r"needs the tokenizers library: pip install 'metajax\[text\]'", tsv(tmp_path / "x.tsv", ROWS), tokenizer,
           kind=ImportError)  # fmt: skip


def rows_of(path):
    """The rows of a raw TSV file, read in the plainest way."""
    return [line.split("\t") for line in gzip.decompress(path.read_bytes()).decode().split("\n")[1:-1]]


def test_sib200(shared_data, tmp_path):
    train_file, dev_file, test_file = (shared_data / "sib200" / f"{part}.tsv.gz" for part in ("train", "dev", "test"))
    rows = rows_of(dev_file)
    assert sum(row[1].startswith('"') for row in rows) > 40, "what a CSV reader would take for quotes"
    words = {"[UNK]": 0} | {word: number for number, word in enumerate({w for row in rows for w in row[1].split()}, 1)}
    encoder = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    encoder.save(str(tmp_path / "words.json"))
    options = {"tokenizer": tmp_path / "words.json", "label": "category", "domain": "lang", "max_length": 32}
    source = text(dev_file, **options, **ALL)
    assert (source.num_classes, len(source.labels), len(source.nodes)) == (44 * 7, 44 * 99, 44)
    tokens, mask = source.inputs["tokens"], source.inputs["mask"]
    for row, label, line, own in zip(rows, source.labels, tokens, mask, strict=True):
        assert source.class_names[label] == f"{row[0]}/{row[2]}"
        assert line[own].tolist() == [words[word] for word in row[1].split()[:32]]
    divided = {"split_by": "domain", "splits": {"train": ["eng_Latn", "deu_Latn"], "test": ["swh_Latn", "yor_Latn"]}}
    train = text(train_file, **options, **divided)
    test = text(test_file, split="test", **options, **divided)
    assert (sorted(train.nodes), sorted(test.nodes)) == (["deu_Latn", "eng_Latn"], ["swh_Latn", "yor_Latn"])
    assert (len(train.labels), len(test.labels)) == (2 * 701, 2 * 204)
    assert train.counts[train.class_names.index("eng_Latn/science/technology")] == 176
    for part in episode(test, EpisodeSpec(5, 1, 5, hierarchical=True), seed=0, index=0):
        assert part.inputs["tokens"].shape[1] in test.length_buckets


def test_clinc150(shared_data, tokenizer):
    folder = shared_data / "clinc150"
    options = {"tokenizer": tokenizer, "domain": folder / "domains.json", "max_length": 32}
    domains = json.loads((folder / "domains.json").read_text())
    found = {
        split: text(folder / "data_full.json.gz", split=split, split_by="domain", **options)
        for split in ("train", "val", "test")
    }
    assert sum(source.num_classes for source in found.values()) == 120
    for source in found.values():
        assert set(source.counts) == {150}
        assert set(source.class_names) == {label for node in source.nodes for label in domains[node]}
    assert {node for source in found.values() for node in source.nodes} == set(domains)
    test = text(folder / "data_full.json.gz", parts=["test"], **ALL, **options)
    assert (test.num_classes, set(test.counts)) == (120, {30})
    options["domain"] = None
    oos = text(folder / "data_full.json.gz", parts=["test", "oos_test"], **ALL, **options)
    assert oos.counts[oos.class_names.index("oos")] == 1000


def test_long_texts_are_counted_or_refused(tmp_path):
    file = tsv(tmp_path / "x.tsv", ROWS)
    special = write_tokenizer(tmp_path / "tokenizer.json", special=True)
    source = text(file, tokenizer=special, max_length=4, **ALL)
    assert source.truncated == 1
    assert source.inputs["tokens"][0].tolist() == [ID["[CLS]"], ID["a"], ID["b"], ID["[SEP]"]]  # the end stays
    assert text(file, tokenizer=special, max_length=5, on_long="refuse", **ALL).truncated == 0
    with pytest.raises(ValueError, match=r"line 2 of .*x.tsv' has more than 4 tokens, max_length"):
        text(file, tokenizer=special, max_length=4, on_long="refuse", **ALL)
    with pytest.raises(ValueError, match="on_long must be one of 'truncate', 'refuse', got 'cut'"):
        text(file, tokenizer=special, on_long="cut", **ALL)


def test_a_prefix_stands_before_every_text(tmp_path, tokenizer):
    source = text(tsv(tmp_path / "x.tsv", ROWS), tokenizer=tokenizer, max_length=6, prefix="h h ", **ALL)
    assert contents(source)["y"] == ["h h d"]
    assert source.lengths.tolist() == [5, 3, 4, 4]
