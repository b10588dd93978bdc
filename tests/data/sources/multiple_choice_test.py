"""multiple_choice: which tokens a question and its choices give, tasks, and what is refused."""

import gzip
import json

import jax
import numpy as np
import pytest

from metajax.data import EpisodeSpec, describe, device_sampler, episode_batch, episodes, mixture, multiple_choice

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra 'text'")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnop"]
ID = {word: number for number, word in enumerate(WORDS)}
ALL = {"splits": {"train": 1}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Words between spaces, no special tokens: as decoders have it."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def write_tokenizer(path, special=False):
    encoder = tokenizers.Tokenizer(tokenizers.models.WordLevel(ID, unk_token="[UNK]"))
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if special:
        encoder.post_processor = tokenizers.processors.BertProcessing(("[SEP]", ID["[SEP]"]), ("[CLS]", ID["[CLS]"]))
    encoder.save(str(path))
    return path


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def line(question="a b", choices=("c", "d e"), answer=0, **more):
    return {"question": question, "choices": list(choices), "answer": answer, **more}


def told(inputs, row):
    """The words of each choice with its prompt, and those that are scored."""
    return [
        (" ".join(WORDS[token] for token in tokens[mask]), " ".join(WORDS[token] for token in tokens[scored]))
        for tokens, mask, scored in zip(*(inputs[name][row] for name in ("tokens", "mask", "choice")), strict=True)
    ]


def test_values_of_a_small_file(tmp_path, tokenizer):
    path = jsonl(tmp_path / "facts.jsonl", line(), line("a", ("b", "c", "d"), "c", context="e f", task=None))
    source = multiple_choice(path, tokenizer=tokenizer, max_length=6, **ALL)
    a, b, c, d, e, f = (ID[word] for word in "abcdef")
    assert source.inputs["tokens"].tolist() == [
        [[a, b, c, 0, 0, 0], [a, b, d, e, 0, 0], [0] * 6],
        [[e, f, a, b, 0, 0], [e, f, a, c, 0, 0], [e, f, a, d, 0, 0]],
    ]
    np.testing.assert_array_equal(source.inputs["mask"], source.inputs["tokens"] > 0)
    assert told(source.inputs, 0) == [("a b c", "c"), ("a b d e", "d e"), ("", "")]
    assert told(source.inputs, 1) == [("e f a b", "b"), ("e f a c", "c"), ("e f a d", "d")]
    assert source.inputs["types"].tolist()[0] == [[0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0] * 6]
    assert source.targets.tolist() == [0, 1]
    assert (source.targets.dtype, source.inputs["tokens"].dtype) == (np.int32, np.int32)
    assert source.lengths.tolist() == [4, 4]
    assert (source.class_names, source.length_buckets, source.truncated) == (("facts",), (2, 3, 6), 0)
    wider = multiple_choice(path, tokenizer=tokenizer, max_length=6, num_choices=4, **ALL)
    assert wider.inputs["tokens"].shape == (2, 4, 6)
    np.testing.assert_array_equal(wider.inputs["tokens"][:, :3], source.inputs["tokens"])


def test_special_tokens_and_prompts_that_lose_their_beginning(tmp_path):
    write_tokenizer(tmp_path / "tokenizer.json", special=True)
    path = jsonl(tmp_path / "x.jsonl", line("a b c d e", ("f", "g h i")), line("a", ("f", "g h i")))
    source = multiple_choice(path, tokenizer=tmp_path, max_length=7, **ALL)
    assert told(source.inputs, 0) == [("[CLS] c d e [SEP] f [SEP]", "f"), ("[CLS] e [SEP] g h i [SEP]", "g h i")]
    assert told(source.inputs, 1)[1] == ("[CLS] a [SEP] g h i [SEP]", "g h i")
    assert source.truncated == 1
    assert "truncated 1" in str(describe(source))
    encoder = tokenizers.Tokenizer.from_file(str(write_tokenizer(tmp_path / "tokenizer.json")))
    encoder.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A [CLS]:1 $B:1", special_tokens=[("[CLS]", ID["[CLS]"])]
    )
    encoder.save(str(tmp_path / "tokenizer.json"))  # as that of Llama: a choice is no text of its own
    source = multiple_choice(path, tokenizer=tmp_path, max_length=5, **ALL)
    assert told(source.inputs, 0) == [("[CLS] c d e f", "f"), ("[CLS] e g h i", "g h i")]
    assert told(source.inputs, 1) == [("[CLS] a f", "f"), ("[CLS] a g h i", "g h i")]
    write_tokenizer(tmp_path / "tokenizer.json", special=True)
    with pytest.raises(ValueError, match=r"max_length, 6, must leave room for a token of the question beside choice 1 "
                                         r"of line 1 of '.*', which takes 6 with special tokens"):  # fmt: skip
        multiple_choice(path, tokenizer=tmp_path, max_length=6, **ALL)


def test_a_prefix_of_choices_joins_words(tmp_path):
    encoder = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 1, "b": 2, "Ġb": 3, "[UNK]": 0}, unk_token="[UNK]")
    )
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.save(str(tmp_path / "tokenizer.json"))
    path = jsonl(tmp_path / "x.jsonl", line("a", ("b", "a")))
    for prefix, token in ((" ", 3), ("", 2), (None, 3)):
        source = multiple_choice(path, tokenizer=tmp_path, max_length=4, choice_prefix=prefix, **ALL)
        assert source.inputs["tokens"][0, 0].tolist() == [1, token, 0, 0]
    encoder = tokenizers.Tokenizer(tokenizers.models.BPE({"▁": 0, "a": 1, "▁a": 2, "b": 3, "▁b": 4},
                                                         [("▁", "a"), ("▁", "b")]))  # fmt: skip
    normalizers = tokenizers.normalizers  # which put a space in front, as those of Llama 2
    encoder.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    encoder.save(str(tmp_path / "tokenizer.json"))
    source = multiple_choice(path, tokenizer=tmp_path, max_length=4, **ALL)
    assert source.inputs["tokens"][0, 0].tolist() == [2, 4, 0, 0]


def test_tasks_are_files_or_fields_and_are_divided(tmp_path, tokenizer):
    files = [
        jsonl(tmp_path / "Facts.v1.jsonl", *(line() for _ in range(3))),
        jsonl(tmp_path / "mixed.jsonl", *(line(task=task) for task in ("stories", "words", "Facts.v1", "words"))),
    ]
    (tmp_path / "sense.JSONL.gz").write_bytes(gzip.compress(json.dumps(line(choices=("c", "d", "e"))).encode()))
    files.append(tmp_path / "sense.JSONL.gz")
    source = multiple_choice(files, tokenizer=tokenizer, **ALL)
    assert dict(zip(source.class_names, source.counts.tolist(), strict=True)) == {
        "Facts.v1": 4, "sense": 1, "stories": 1, "words": 2,
    }  # fmt: skip
    splits = {"train": ["words", "sense"], "test": ["Facts.v1"]}
    train, test = (
        multiple_choice(files, tokenizer=tokenizer, splits=splits, split=split) for split in ("train", "test")
    )
    assert (train.class_names, test.class_names) == (("sense", "words"), ("Facts.v1",))
    assert test.inputs["tokens"].shape[1] == 3, "as many choices as anywhere in the files, so that splits fit one model"
    assert sorted(len(multiple_choice(files, tokenizer=tokenizer, split=split).class_names) for split in
                  ("train", "val", "test")) == [1, 1, 2]  # fmt: skip


def test_episodes_are_of_one_task_in_buckets(tmp_path, tokenizer):
    short = [line("a", (w, "p"), 0, task="short") for w in "bcdefg"]
    long = [line("a b c d e f g h", (w, "p", "o"), 2, task="long") for w in "bcdefg"]
    path = jsonl(tmp_path / "x.jsonl", *short, *long)
    source = multiple_choice(path, tokenizer=tokenizer, max_length=12, length_buckets=(4, 12), **ALL)
    spec = EpisodeSpec(ways=1, shots=2, queries=3)
    stream, seen = episodes(source, spec, batch=1, seed=0), {}
    for index in range(12):
        batch, alone = next(stream), episode_batch(source, spec, seed=0, start=index, count=1)
        jax.tree.map(np.testing.assert_array_equal, batch, alone)
        targets = np.concatenate([part.targets for part in batch], axis=1)
        shape = batch.query.inputs["tokens"].shape
        seen[int(targets[0, 0])] = shape
        assert (targets == targets[0, 0]).all(), "one task"
        words = np.concatenate([part.inputs["tokens"] for part in batch], axis=1)
        assert len({tuple(line.ravel()) for line in words[0]}) == 5, "support and query are different questions"
    assert seen == {0: (1, 3, 3, 4), 2: (1, 3, 3, 12)}
    data, sample = device_sampler(source, spec)
    assert jax.jit(sample)(data, jax.random.key(0)).support.inputs["choice"].shape == (2, 3, 12)
    again = multiple_choice(path, tokenizer=tokenizer, max_length=12, length_buckets=(4, 12), name="again", **ALL)
    both = mixture([source, again])
    shapes = {episode_batch(both, spec, seed=0, start=k, count=1).query.inputs["tokens"].shape for k in range(12)}
    assert shapes == {(1, 3, 3, 4), (1, 3, 3, 12)}, "a mixture cuts the same axis"


def test_as_many_choices_as_tokens(tmp_path, tokenizer):
    path = jsonl(tmp_path / "x.jsonl", *(line("a", tuple("bcde")) for _ in range(2)))
    source = multiple_choice(path, tokenizer=tokenizer, max_length=4, length_buckets=(2, 4), **ALL)
    drawn = episode_batch(source, EpisodeSpec(1, 1, 1), seed=0, start=0, count=1)
    assert drawn.query.inputs["tokens"].shape == (1, 1, 4, 2), "the tokens are cut, and not the choices"


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (line(answer="c d"), r"line 1 of '.*' has the answer 'c d', which is not among its choices, \('c', 'd e'\)"),
        (line(choices=("c", "c"), answer="c"), "line 1 of .* must have different choices, got"),
        (line(answer=2), "line 1 of .* must have one of its 2 choices as answer, from 0 on, got 2"),
        (line(answer=-1), "as answer, from 0 on, got -1"),
        (line(answer=True), "as answer, from 0 on, got True"),
        (line(answer=None), "as answer, from 0 on, got None"),
        (line(choices=("c",)), r"line 1 of .* must have a list of 2 choices at least, got \['c'\]"),
        (line() | {"choices": "cd"}, "line 1 of .* must have a list of 2 choices at least, got 'cd'"),
        (line(choices=("c", " ")), "line 1 of .* has an empty choice"),
        (line(choices=("c", 3)), "line 1 of .* must hold a text as choice, got a int"),
        (line(question=""), "line 1 of .* has an empty question"),
        (line(context=" "), "line 1 of .* has an empty context"),
        (line(task=3), "line 1 of .* must hold a text as task, got a int"),
        ({"choices": ["a", "b"]}, "line 1 of .* must hold a text as question, got a NoneType"),
        ([1], "line 1 of .* must be a JSON object, got a list"),
        (line(choices=tuple("abcde")), "num_choices is 4, but line 1 of .* has 5 choices"),
    ],
)  # fmt: skip
def test_bad_lines(tmp_path, tokenizer, row, error):
    with pytest.raises(ValueError, match=error):
        multiple_choice(jsonl(tmp_path / "x.jsonl", row), tokenizer=tokenizer, num_choices=4, **ALL)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"split": "all"}, "split must be one of"),
        ({"num_choices": 1}, "num_choices must be an integer of at least 2, got 1"),
        ({"choice_prefix": 1}, "choice_prefix must be of type str, got 1"),
        ({"max_length": 0}, "max_length must be an integer of at least 1, got 0"),
        ({"splits": {"train": ["y"]}}, r"\(split by task\) lacks 1 of the 1 classes .* the first is 'y'"),
    ],
)
def test_bad_options(tmp_path, tokenizer, options, error):
    with pytest.raises(ValueError, match=error):
        multiple_choice(jsonl(tmp_path / "x.jsonl", line()), **{"tokenizer": tokenizer, **ALL, **options})


def test_bad_files(tmp_path, tokenizer):
    (tmp_path / "x.tsv").write_text("a")
    with pytest.raises(ValueError, match=r"files must end in .jsonl or .jsonl.gz, got '.*x.tsv'"):
        multiple_choice(tmp_path / "x.tsv", tokenizer=tokenizer, **ALL)
    with pytest.raises(ValueError, match=r"'.*x.jsonl' has no rows"):
        multiple_choice(jsonl(tmp_path / "x.jsonl"), tokenizer=tokenizer, **ALL)


def test_a_task_with_too_few_questions(tmp_path, tokenizer):
    source = multiple_choice(jsonl(tmp_path / "x.jsonl", line(), line()), tokenizer=tokenizer, **ALL)
    with pytest.raises(ValueError, match=r"is 1 \+ 2 = 3, but class 'x' of .* has 2 examples"):
        source.check(EpisodeSpec(1, 1, 2))


@pytest.mark.parametrize(("removed", "what"), [("a", "question"), ("d", "choice 1")])
def test_texts_without_tokens(tmp_path, tokenizer, removed, what):
    encoder = tokenizers.Tokenizer.from_file(str(tokenizer))
    encoder.normalizer = tokenizers.normalizers.Replace(removed, "")
    encoder.save(str(tmp_path / "tokenizer.json"))
    path = jsonl(tmp_path / "x.jsonl", line("a", ("c", "d")))
    with pytest.raises(ValueError, match=f"the {what} of line 1 of '.*' gives no tokens"):
        multiple_choice(path, tokenizer=tmp_path, **ALL)
