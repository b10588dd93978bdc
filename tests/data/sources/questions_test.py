"""question_answering: rows and windows, how articles and languages are divided, and what is refused."""

import gzip
import json

import jax
import numpy as np
import pytest

from metajax.data import EpisodeSpec, describe, device_sampler, episode_batch, episodes, mixture, question_answering

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra 'text'")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "what", "which", *(f"w{k}" for k in range(60))]
ID = {word: number for number, word in enumerate(WORDS)}
ALL = {"splits": {"train": 1}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """[CLS] question [SEP] context [SEP], words between spaces."""
    encoder = tokenizers.Tokenizer(tokenizers.models.WordLevel(ID, unk_token="[UNK]"))
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    encoder.post_processor = tokenizers.processors.BertProcessing(("[SEP]", ID["[SEP]"]), ("[CLS]", ID["[CLS]"]))
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    encoder.save(str(path))
    return path


def entry(id, context, *answers, question="what"):
    found = [{"text": text, "answer_start": context.find(text)} for text in answers]
    return {"id": id, "question": question, "answers": found}


def article(title, *paragraphs):
    return {
        "title": title,
        "paragraphs": [{"context": context, "qas": list(questions)} for context, *questions in paragraphs],
    }


def squad(path, *articles):
    path.write_text(json.dumps({"version": "1.1", "data": list(articles)}))
    return path


def words(first, last):
    return " ".join(f"w{k}" for k in range(first, last + 1))


def many(path, articles=10, questions=6, shift=0, title="T"):
    """Question q of article a is answered by word a + shift; its context has 5 words."""
    content = []
    for a in range(articles):
        context = words(a + shift, a + shift + 4)
        rows = [entry(f"{a}-{q}", context, f"w{a + shift}") for q in range(questions)]
        content.append(article(f"{title}{a}", (context, *rows)))
    return squad(path, *content)


def test_values_of_a_small_file(tmp_path, tokenizer):
    context = "w1 w2 w3 w2"
    path = squad(
        tmp_path / "x.json",
        article(
            "Moon", (context, entry("q1", context, "w2 w3", "w3"), entry("q2", context, "w1", question="which w9"))
        ),
    )
    source = question_answering({"en": path}, tokenizer=tokenizer, max_length=10, **ALL)
    what, which, cls, sep = (ID[word] for word in ("what", "which", "[CLS]", "[SEP]"))
    w1, w2, w3, w9 = (ID[word] for word in ("w1", "w2", "w3", "w9"))
    lines = [[cls, what, sep, w1, w2, w3, w2, sep, 0, 0], [cls, which, w9, sep, w1, w2, w3, w2, sep, 0]]
    assert source.inputs["tokens"].tolist() == lines
    assert source.inputs["mask"].sum(axis=1).tolist() == source.lengths.tolist() == [8, 9]
    assert source.inputs["types"].tolist() == [[0] * 3 + [1] * 5 + [0] * 2, [0] * 4 + [1] * 5 + [0]]
    assert np.flatnonzero(source.inputs["context"][0]).tolist() == [3, 4, 5, 6]
    assert np.flatnonzero(source.inputs["context"][1]).tolist() == [4, 5, 6, 7]
    assert source.inputs["id"].tolist() == [0, 1]
    assert source.targets.tolist() == [[4, 5], [4, 4]]
    assert {leaf.dtype for leaf in (source.targets, *source.inputs.values())} == {np.dtype(np.int32), np.dtype(bool)}
    assert [source.text(row, *source.targets[row]) for row in range(2)] == ["w2 w3", "w1"]
    assert source.text(0, 3, 6) == context
    question = source.questions[0]
    assert (question.id, question.language, question.article, question.answers) == ("q1", "en", "Moon", ("w2 w3", "w3"))
    assert (source.class_names, source.length_buckets, source.windowed, source.left_out) == (
        ("en/Moon",),
        (3, 5, 10),
        0,
        (),
    )
    assert {node: members.tolist() for node, members in source.nodes.items()} == {"en": [0]}
    assert "2: 2 a class" in str(describe(source))


def test_gzip_and_titles(tmp_path, tokenizer):
    context = "w1"
    path = squad(tmp_path / "x.json", article("A", (context, entry("q", context, "w1"))), {"paragraphs": []})
    (tmp_path / "y.json.gz").write_bytes(gzip.compress(path.read_bytes()))
    source = question_answering({"en": tmp_path / "y.json.gz"}, tokenizer=tokenizer, max_length=8, overlap=1, **ALL)
    assert source.class_names == ("en/0", "en/1"), "a title is missing, so articles are named by place"
    assert source.counts.tolist() == [1, 0]


def test_an_answer_inside_of_a_token_takes_the_whole_token(tmp_path, tokenizer):
    path = squad(tmp_path / "x.json", article("A", ("w1 w23 w4", entry("q", "w1 w23 w4", "23 w"))))
    source = question_answering({"en": path}, tokenizer=tokenizer, max_length=8, overlap=1, **ALL)
    assert source.targets.tolist() == [[4, 5]]
    assert source.text(0, 4, 5) == "w23 w4"


def test_windows_of_a_long_context(tmp_path, tokenizer):
    """10 words in windows of 4 that share 2: words 0-3, 2-5, 4-7, 6-9."""
    context = words(0, 9)
    answers = ["w0", "w5", "w3 w4 w5 w6", "w3 w4 w5 w6 w7", "w9"]
    path = squad(
        tmp_path / "x.json", article("A", (context, *(entry(f"q{k}", context, text) for k, text in enumerate(answers))))
    )
    source = question_answering({"en": path}, tokenizer=tokenizer, max_length=8, overlap=2, **ALL)
    assert source.inputs["id"].tolist() == [number for number in range(5) for _ in range(4)]
    starts = [source.inputs["tokens"][row, 3] - ID["w0"] for row in range(4)]
    assert starts == [0, 2, 4, 6]
    assert source.lengths.tolist() == [8] * 20
    drawn = {int(source.inputs["id"][row]): row % 4 for row in source.members[0]}
    assert drawn == {0: 0, 1: 2, 4: 3}, "w5 has a word on either side in the third window, and none in the second"
    assert [question.id for question in source.left_out] == ["q2", "q3"]
    assert source.windowed == 5
    assert (source.targets[:, 0] >= 0).sum() == 3
    assert [source.text(row, *source.targets[row]) for row in source.members[0]] == ["w0", "w5", "w9"]
    assert source.windows([1, 3]).tolist() == [[4, 5, 6, 7], [12, 13, 14, 15]]
    wider = question_answering({"en": path}, tokenizer=tokenizer, max_length=9, overlap=4, **ALL)
    assert [question.id for question in wider.left_out] == [], "answers of up to overlap + 1 tokens always fit"


def test_windows_of_long_and_short_contexts(tmp_path, tokenizer):
    long, short = words(0, 8), words(0, 3)
    path = squad(tmp_path / "x.json", article("A", (long, entry("q0", long, "w1")), (short, entry("q1", short, "w1"))))
    source = question_answering({"en": path}, tokenizer=tokenizer, max_length=8, overlap=2, **ALL)
    assert source.windows(np.array([[1, 0]])).tolist() == [[[4, -1, -1, -1], [0, 1, 2, 3]]]
    assert source.windows([1]).tolist() == [[4]], "one window where all have one"


def test_articles_are_divided_over_all_languages(tmp_path, tokenizer):
    files = {language: many(tmp_path / f"{language}.json", title=language) for language in ("en", "de", "zh")}
    found = {split: question_answering(files, tokenizer=tokenizer, split=split) for split in ("train", "val", "test")}
    articles = {split: {question.article for question in source.questions} for split, source in found.items()}
    assert [len(articles[split]) for split in ("train", "val", "test")] == [6, 2, 2]
    assert len(set.union(*articles.values())) == 10, "no article in two splits, whatever its language"
    assert all(source.num_classes == 3 * len(articles[split]) for split, source in found.items())
    assert all(name.startswith("en") for name in articles["train"]), "articles are named by the first file"
    splits = {"train": ["en1", "en2"], "test": ["en7"]}
    languages = {"train": ["en", "de"], "test": ["zh"]}
    train, test = (
        question_answering(files, tokenizer=tokenizer, split=split, splits=splits, languages=languages)
        for split in ("train", "test")
    )
    assert train.class_names == ("en/en1", "en/en2", "de/en1", "de/en2")
    assert test.class_names == ("zh/en7",)
    assert {node: members.tolist() for node, members in train.nodes.items()} == {"en": [0, 1], "de": [2, 3]}


def test_episodes_are_of_one_article_and_have_disjoint_questions(tmp_path, tokenizer):
    files = {"en": many(tmp_path / "en.json"), "de": many(tmp_path / "de.json", shift=20)}
    source = question_answering(files, tokenizer=tokenizer, max_length=12, **ALL)
    spec = EpisodeSpec(ways=1, shots=2, queries=3)
    drawn = episode_batch(source, spec, seed=0, start=0, count=40)
    ids = np.concatenate([part.inputs["id"] for part in drawn], axis=1)
    assert ids.shape == (40, 5)
    for line in ids:
        questions = [source.questions[place] for place in line]
        assert len({(question.language, question.article) for question in questions}) == 1
        assert len({question.id for question in questions}) == 5
    assert len({(source.questions[line[0]].language, source.questions[line[0]].article) for line in ids}) > 12
    first = np.take_along_axis(drawn.query.inputs["tokens"], drawn.query.targets[..., :1], axis=-1)
    expected = [ID[source.questions[line[0]].answers[0]] for line in ids]
    assert (first[..., 0] == np.array(expected)[:, None]).all()
    assert drawn.query.class_mask is None


def test_batches_come_in_buckets_and_the_samplers_agree(tmp_path, tokenizer):
    short, long = words(0, 1), words(0, 20)
    path = squad(
        tmp_path / "x.json",
        article("A", (short, *(entry(f"a{k}", short, "w1") for k in range(4)))),
        article("B", (long, *(entry(f"b{k}", long, "w1") for k in range(4)))),
    )
    options = {"max_length": 32, "overlap": 8, "length_buckets": (8, 32), **ALL}
    source = question_answering({"en": path}, tokenizer=tokenizer, **options)
    spec = EpisodeSpec(ways=1, shots=1, queries=2)
    stream = episodes(source, spec, batch=1, seed=0)
    seen = set()
    for index in range(12):
        batch, alone = next(stream), episode_batch(source, spec, seed=0, start=index, count=1)
        jax.tree.map(np.testing.assert_array_equal, batch, alone)
        is_long = source.questions[batch.query.inputs["id"][0, 0]].article == "B"
        shape = batch.query.inputs["tokens"].shape
        assert shape == batch.query.inputs["context"].shape == (1, 2, 32 if is_long else 8)
        seen.add(shape)
    assert len(seen) == 2
    data, sample = device_sampler(source, spec)
    drawn = jax.jit(sample)(data, jax.random.key(0))
    assert drawn.query.inputs["tokens"].shape == (2, 32)
    assert drawn.query.targets.shape == (2, 2)
    both = mixture([source, question_answering({"en": path}, tokenizer=tokenizer, name="again", **options)])
    assert episode_batch(both, spec, seed=0, start=0, count=2).query.targets.shape == (2, 2, 2)


CONTEXT = "w1 w2 w3"
GOOD = entry("q1", CONTEXT, "w2")


def answered(**changed):
    return {**GOOD, "answers": [{"text": "w2", "answer_start": 3, **changed}]}


def file_with(question, context=CONTEXT):
    return {"data": [article("A", (context, question))]}


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (file_with(answered(answer_start=7)), "'q1' of '.*x.json' has an answer outside its context: 'w2' at 7"),
        (file_with(answered(answer_start=-1)), "question 'q1' of .* has an answer outside its context: 'w2' at -1"),
        (file_with(answered(answer_start=0)), "'q1' of .* has the answer 'w2' at 0, where its context has 'w1'"),
        (file_with(answered(answer_start="3")), "question 'q1' of .* must have an integer answer_start, got '3'"),
        (file_with(answered(text="")), "question 'q1' of .* has an empty answer"),
        (file_with(answered(text=None)), "question 'q1' of .* must hold a text as answer, got a NoneType"),
        (file_with({**GOOD, "answers": []}), "question 'q1' of .* has no answer"),
        (file_with({**GOOD, "answers": {}}), r"question 'q1' of .* must be a JSON object with a list 'answers'"),
        (file_with({**GOOD, "answers": ["w2"]}), "question 'q1' of .* must have answers that are JSON objects"),
        (file_with({**GOOD, "question": " "}), "question 'q1' of .* has an empty question"),
        (file_with({**GOOD, "question": "\ud800"}), "question 'q1' of .* has a question that is not Unicode"),
        (file_with({"question": "what"}), "a question of article 0 of .* must be a JSON object with an id"),
        (file_with(GOOD, ""), "a paragraph of article 0 of .* has an empty context"),
        ({"data": [article("A", (CONTEXT, GOOD, GOOD))]}, "question 'q1' of .* stands there twice"),
        ({"data": []}, "x.json' has no articles"),
        ([], r"x.json' must be a JSON object with a list 'data', as in SQuAD v1.1"),
        ({"data": [[]]}, r"article 0 of '.*' must be a JSON object with a list 'paragraphs'"),
        ({"data": [{"paragraphs": [3]}]}, r"a paragraph of article 0 of '.*' must be a JSON object with a list 'qas'"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, tokenizer, content, error):
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=error):
        question_answering({"en": tmp_path / "x.json"}, tokenizer=tokenizer, **ALL)


def test_files_that_are_not_parallel(tmp_path, tokenizer):
    files = {"en": many(tmp_path / "en.json", 3), "de": many(tmp_path / "de.json", 4)}
    with pytest.raises(
        ValueError, match=r"files must be parallel, but '.*de.json' has 4 articles and '.*en.json' has 3"
    ):
        question_answering(files, tokenizer=tokenizer, **ALL)
    many(tmp_path / "de.json", 3, questions=7)
    with pytest.raises(ValueError, match=r"article 'T0' has question '0-6' in only one of '.*en.json' and '.*de.json'"):
        question_answering(files, tokenizer=tokenizer, **ALL)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"split": "all"}, "split must be one of"),
        ({"languages": {"test": ["en"]}}, r"languages must name the languages of split 'train', got \{'test'"),
        ({"languages": {"train": "en"}}, r"languages\['train'\] must be a list of different languages, got 'en'"),
        ({"languages": {"train": ["fr"]}}, r"a language of languages\['train'\] must be one of 'en', got 'fr'"),
        ({"languages": {"train": ["en"], "all": ["en"]}}, "a key of languages must be one of"),
        ({"splits": {"train": ["Sun"]}}, r"\(split by article\) lacks 1 of the 1 classes .* the first is 'Sun'"),
        ({"max_length": 3}, "max_length must leave room beside the 3 special tokens of .*, got 3"),
        ({"max_length": 8, "overlap": 4}, r"max_length, 8, must leave room for more than overlap, 4, tokens of context "
                                          r"beside question '0-0' of '.*', which leaves 4"),
        ({"overlap": -1}, "overlap must be an integer of at least 0, got -1"),
        ({"length_buckets": (8,)}, "length_buckets must ascend and end with max_length, 384"),
        ({"tokenizer": "no/file"}, "tokenizer must name regular files"),
    ],
)  # fmt: skip
def test_bad_options(tmp_path, tokenizer, options, error):
    with pytest.raises(ValueError, match=error):
        question_answering({"en": many(tmp_path / "x.json", 2)}, **{"tokenizer": tokenizer, **ALL, **options})


def test_bad_names_of_languages(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"files must be a path or map languages to files, got \{\}"):
        question_answering({}, tokenizer=tokenizer)
    with pytest.raises(
        ValueError, match=r"files must have \{\} in the place of the language where languages names some"
    ):
        question_answering("x.json", tokenizer=tokenizer, languages={"train": ["en"]})
    with pytest.raises(ValueError, match="files must map names of languages without '/' to files, got 'a/b'"):
        question_answering({"a/b": many(tmp_path / "x.json")}, tokenizer=tokenizer)


def test_an_article_with_too_few_questions(tmp_path, tokenizer):
    path = squad(
        tmp_path / "x.json",
        article("A", (CONTEXT, *({**GOOD, "id": f"a{k}"} for k in range(5)))),
        article("B", (CONTEXT, *({**GOOD, "id": f"b{k}"} for k in range(2)))),
    )
    source, spec = question_answering({"en": path}, tokenizer=tokenizer, max_length=16, **ALL), EpisodeSpec(1, 1, 3)
    with pytest.raises(ValueError, match=r"is 1 \+ 3 = 4, but class 'en/B' of .* has 2 examples; source.at_least\(4\)"):
        episode_batch(source, spec, seed=0, start=0, count=1)
    fewer = source.at_least(4)
    assert (fewer.class_names, fewer.left_out, len(fewer.questions)) == (("en/A",), (), 7)
    drawn = episode_batch(fewer, spec, seed=0, start=0, count=8)
    assert {source.questions[place].article for place in drawn.query.inputs["id"].ravel()} == {"A"}
    with pytest.raises(ValueError, match="ways must be 1"):
        episode_batch(fewer, EpisodeSpec(2, 1, 1), seed=0, start=0, count=1)


def test_texts_without_tokens(tmp_path, tokenizer):
    encoder = tokenizers.Tokenizer.from_file(str(tokenizer))
    encoder.normalizer = tokenizers.normalizers.Replace("w2", "")
    encoder.save(str(tmp_path / "tokenizer.json"))
    squad(tmp_path / "x.json", article("A", (CONTEXT, GOOD)))
    with pytest.raises(ValueError, match=r"the answer of question 'q1' of '.*', 'w2', gives no tokens"):
        question_answering({"en": tmp_path / "x.json"}, tokenizer=tmp_path / "tokenizer.json", **ALL)
    squad(tmp_path / "x.json", article("A", ("w2", entry("q1", "w2", "w2"))))
    with pytest.raises(ValueError, match=r"the context of question 'q1' of '.*' gives no tokens"):
        question_answering({"en": tmp_path / "x.json"}, tokenizer=tmp_path / "tokenizer.json", **ALL)


def test_a_file_without_questions_is_refused(tmp_path):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(ID, unk_token="[UNK]"))
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "x.json").write_text(json.dumps({"data": [{"title": "A", "paragraphs": []}]}))
    with pytest.raises(ValueError, match=r"files must hold questions, and .*x.json has none in train"):
        question_answering({"en": tmp_path / "x.json"}, tokenizer=tmp_path / "tokenizer.json", **ALL)


def test_xquad(shared_data, tmp_path):
    """All answers of two languages are found again as spans of tokens; test articles are in no training language."""
    folder = shared_data / "xquad"
    if not folder.is_dir():
        pytest.skip(f"needs XQuAD ({folder} is not there)")
    encoder = tokenizers.Tokenizer(tokenizers.models.WordLevel(ID, unk_token="[UNK]"))
    encoder.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=False)
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    encoder.post_processor = tokenizers.processors.BertProcessing(("[SEP]", ID["[SEP]"]), ("[CLS]", ID["[CLS]"]))
    encoder.save(str(tmp_path / "tokenizer.json"))
    files = {language: folder / f"xquad.{language}.json.gz" for language in ("en", "zh")}
    options = {
        "tokenizer": tmp_path / "tokenizer.json",
        "languages": {"train": ["en"], "test": ["zh"]},
        "max_length": 256,
    }
    train, test = (question_answering(files, split=split, **options) for split in ("train", "test"))
    assert {question.article for question in train.questions}.isdisjoint(
        {question.article for question in test.questions}
    )
    assert (train.num_classes, test.num_classes) == (30, 10)
    assert len(train.questions) > 600
    for source in (train, test):
        assert source.left_out == ()
        assert source.windowed > 0
        same = [
            source.text(row, *source.targets[row]) == source.questions[source.inputs["id"][row]].answers[0]
            for row in np.concatenate(source.members)
        ]
        assert len(same) == len(source.questions)
        assert np.mean(same) > 0.99, "else the answer ends inside of a token"
    drawn = episode_batch(test, EpisodeSpec(1, 3, 5), seed=0, start=0, count=2)
    assert drawn.query.targets.shape == (2, 5, 2)
