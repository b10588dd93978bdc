"""Reads untrusted files of questions and answers in the format of SQuAD v1.1."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from metajax.data.readers._files import a_text, read_json


class Question(NamedTuple):
    """A question about a paragraph, with the data needed to judge an answer to it.

    Attributes:
      id: the id in the file.
      language: the language of the file.
      article: the name of the article.
      text: the question.
      context: the paragraph.
      answers: the texts of all answers.
      start: where the first answer begins in the context, in characters.
      where: the place of the question, for error messages.

    >>> Question("q1", "en", "Moon", "Who?", "Ada saw it.", ("Ada",), 0, "question 'q1'").end
    3
    """

    id: str
    language: str
    article: str
    text: str
    context: str
    answers: tuple[str, ...]
    start: int
    where: str

    @property
    def end(self) -> int:
        """Position after the last character of the first answer."""
        return self.start + len(self.answers[0])


def read_parallel(files: Mapping[str, pathlib.Path]) -> dict[str, dict[str, tuple[Question, ...]]]:
    """Reads files whose articles are translations of each other, one file for each language.

    Returns:
      For each language, the questions of each article by its name. An article is named by its title in the first file,
      or by its place (`"0"`) if titles are missing or occur twice.

    Raises:
      ValueError: a file is not SQuAD v1.1, an answer is not at the stated position, a text is empty, a question occurs
        twice, or article k does not have the same question ids in all files.
    """
    by_language: dict[str, dict[str, tuple[Question, ...]]] = {}
    names: list[str] = []
    for language, path in files.items():
        file = repr(str(path))
        articles = _list(read_json(path), "data", file)
        if not articles:
            raise ValueError(f"{file} has no articles")
        if not by_language:
            names = _names(articles)
        if len(articles) != len(names):
            first = next(iter(files.values()))
            raise ValueError(
                f"files must be parallel, but {file} has {len(articles)} articles and {str(first)!r} has {len(names)}: "
                "give each a source of its own (metajax.data.mixture joins them)"
            )
        by_language[language] = {}
        seen: set[str] = set()
        for place, (name, article) in enumerate(zip(names, articles, strict=True)):
            found = tuple(_questions(article, f"article {place} of {file}", file, language, name))
            for question in found:
                if question.id in seen:
                    raise ValueError(f"{question.where} stands there twice")
                seen.add(question.id)
            by_language[language][name] = found
    first_language, *others = by_language
    for name, there in by_language[first_language].items():
        for language in others:
            different = {question.id for question in there} ^ {question.id for question in by_language[language][name]}
            if different:
                raise ValueError(
                    f"files must be parallel, but article {name!r} has question {min(different)!r} in only one of "
                    f"{str(files[first_language])!r} and {str(files[language])!r}"
                )
    return by_language


def _names(articles: list[Any]) -> list[str]:
    titles = [article.get("title") if isinstance(article, dict) else None for article in articles]
    named = all(isinstance(title, str) and title.strip() for title in titles) and len(set(titles)) == len(titles)
    return [str(title if named else place) for place, title in enumerate(titles)]


def _questions(article: Any, where: str, file: str, language: str, name: str) -> Any:
    for paragraph in _list(article, "paragraphs", where):
        entries = _list(paragraph, "qas", f"a paragraph of {where}")
        context = a_text(f"a paragraph of {where}", paragraph.get("context"), "context")
        for entry in entries:
            if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
                raise ValueError(f"a question of {where} must be a JSON object with an id, got {entry!r}")
            place = f"question {entry['id']!r} of {file}"
            text = a_text(place, entry.get("question"), "question")
            answers = _list(entry, "answers", place)
            if not answers:
                raise ValueError(f"{place} has no answer; every question of SQuAD v1.1 has one")
            starts = [_check_answer(answer, context, place) for answer in answers]
            texts = tuple(answer["text"] for answer in answers)
            yield Question(entry["id"], language, name, text, context, texts, starts[0], place)


def _check_answer(answer: Any, context: str, where: str) -> int:
    if not isinstance(answer, dict):
        raise ValueError(f"{where} must have answers that are JSON objects, got {answer!r}")
    text, start = a_text(where, answer.get("text"), "answer"), answer.get("answer_start")
    if isinstance(start, bool) or not isinstance(start, int):
        raise ValueError(f"{where} must have an integer answer_start, got {start!r}")
    if not 0 <= start <= len(context) - len(text):
        raise ValueError(
            f"{where} has an answer outside its context: {text!r} at {start}, where the context has {len(context)} "
            "characters"
        )
    found = context[start : start + len(text)]
    if found != text:
        raise ValueError(f"{where} has the answer {text!r} at {start}, where its context has {found!r}")
    return start


def _list(holder: Any, key: str, where: str) -> list[Any]:
    if not isinstance(holder, dict) or not isinstance(holder.get(key), list):
        raise ValueError(f"{where} must be a JSON object with a list {key!r}, as in SQuAD v1.1")
    return holder[key]
