"""Combines several sources into one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from metajax.core import _validate
from metajax.core._types import Episode, PyTree, TaskType
from metajax.data import _namespace
from metajax.data._episodes import check_type
from metajax.data._source import Drawn, Source, Take
from metajax.data._spec import EpisodeSpec


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Mixture:
    """Draws each episode from one source; `extra` holds its index, and the `extra` of each source."""

    name: str
    split: str
    sources: tuple[Any, ...]
    weights: tuple[float, ...]

    def __repr__(self) -> str:
        return f"<{self.name} ({self.split}): mixture of {len(self.sources)} sources>"

    @property
    def examples(self) -> PyTree:
        return tuple(source.examples for source in self.sources)

    @property
    def length_buckets(self) -> tuple[int, ...]:
        return self.sources[0].length_buckets

    @property
    def task(self) -> TaskType | None:
        return getattr(self.sources[0], "task", None)

    @property
    def length_axis(self) -> int:
        return getattr(self.sources[0], "length_axis", 1)

    @property
    def host_only(self) -> bool:
        return any(getattr(source, "host_only", False) for source in self.sources)

    @property
    def num_classes(self) -> int:
        """Number of classes of all sources; the attribute does not exist if a source has no classes."""
        return sum(source.num_classes for source in self.sources)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, `SOURCE/CLASS`."""
        return tuple(f"{source.name}/{name}" for source in self.sources for name in source.class_names)

    @property
    def label_bits(self) -> int:
        return 1 + max(source.label_bits for source in self.sources)

    def check(self, spec: EpisodeSpec) -> None:
        shapes = []
        for source in self.sources:
            source.check(self._own(source, spec))
            shapes.append(_shapes(source, self._own(source, spec)))
        for source, shape in zip(self.sources, shapes, strict=True):
            if shape != shapes[0]:
                raise ValueError(
                    f"sources must give episodes of one form, but {self.sources[0].name} gives {shapes[0]} and "
                    f"{source.name} gives {shape}; only images of one size, channels and type mix (data.resize)"
                )
        if spec.hierarchical and not any(getattr(source, "nodes", {}) for source in self.sources):
            raise ValueError(f"hierarchical must be False for {self.name}, none of whose sources has nodes, got True")

    def _own(self, source: Any, spec: EpisodeSpec) -> EpisodeSpec:
        """Returns the spec for a source: sources without nodes give flat episodes in a hierarchical mixture."""
        return spec if getattr(source, "nodes", {}) else dataclasses.replace(spec, hierarchical=False)

    def bits(self, spec: EpisodeSpec) -> int:
        return 1 + max(source.bits(self._own(source, spec)) for source in self.sources)

    def tables(self, spec: EpisodeSpec) -> PyTree:
        return tuple(source.tables(self._own(source, spec)) for source in self.sources)

    def draw(self, spec: EpisodeSpec, tables: PyTree, bits: Any) -> Drawn:
        specs = [self._own(source, spec) for source in self.sources]

        def of_source(index: int) -> Callable[[Any], Drawn]:
            source, own = self.sources[index], specs[index]
            return lambda bits: source.draw(own, tables[index], bits[..., : source.bits(own)])

        return self._choose(bits, [of_source(index) for index in range(len(self.sources))])

    def draw_labelled(self, bits: Any) -> Drawn:
        offsets = np.cumsum([0, *(source.num_classes for source in self.sources)])

        def of_source(index: int) -> Callable[[Any], Drawn]:
            def draw(bits: Any) -> Drawn:
                drawn = self.sources[index].draw_labelled(bits[..., : self.sources[index].label_bits])
                query = drawn.episode.query
                query = query._replace(targets=query.targets + np.int32(offsets[index]))
                return drawn._replace(episode=drawn.episode._replace(query=query))

            return draw

        return self._choose(bits, [of_source(index) for index in range(len(self.sources))])

    def _choose(self, bits: Any, draws: Sequence[Callable[[Any], Drawn]]) -> Drawn:
        """Draws each episode from the source that its first random number selects."""
        limits = np.minimum(np.cumsum(self.weights[:-1]) * 2**32, 2**32 - 1).astype(np.uint32)
        choice = (bits[..., :1] >= limits).sum(axis=-1)
        parts, rest = [()] * len(draws), bits[..., 1:]
        if not _namespace.on_host(bits):
            empty = [jax.tree.map(_zeros, jax.eval_shape(draw, rest).extra) for draw in draws]

            def branch(index: int) -> Callable[[Any], tuple[Episode, Any]]:
                def run(bits: Any) -> tuple[Episode, Any]:
                    drawn = draws[index](bits)
                    return drawn.episode, (*empty[:index], drawn.extra, *empty[index + 1 :])

                return run

            episode, extra = jax.lax.switch(choice, [branch(index) for index in range(len(draws))], rest)
            return Drawn(episode, (choice, extra))
        episodes: Any = None
        for index, draw in enumerate(draws):
            here = np.flatnonzero(choice == index)
            drawn = draw(rest[here] if here.size else rest[:1])
            fill = lambda leaf: np.zeros((len(bits), *leaf.shape[1:]), leaf.dtype)  # noqa: E731
            episodes = jax.tree.map(fill, drawn.episode) if episodes is None else episodes
            parts[index] = jax.tree.map(fill, drawn.extra)
            if here.size:
                for whole, part in ((episodes, drawn.episode), (parts[index], drawn.extra)):
                    jax.tree.map(lambda into, leaf, here=here: into.__setitem__(here, leaf), whole, part)
        return Drawn(episodes, (choice, tuple(parts)))

    def longest(self, drawn: Drawn) -> np.ndarray:
        choice, extra = drawn.extra
        longest = np.zeros(choice.shape, int)
        for index, source in enumerate(self.sources):
            here = np.flatnonzero(choice == index)
            if here.size:
                own = Drawn(drawn.episode, extra[index])
                longest[here] = source.longest(jax.tree.map(lambda leaf, here=here: leaf[here], own))
        return longest

    def finish(self, drawn: Drawn, examples: PyTree, take: Take) -> Episode:
        choice, extra = drawn.extra
        if not _namespace.on_host(choice):
            branches = [
                lambda drawn, examples, source=source, index=index: source.finish(
                    Drawn(drawn.episode, drawn.extra[1][index]), examples[index], take
                )
                for index, source in enumerate(self.sources)
            ]
            return jax.lax.switch(choice, branches, drawn, examples)
        xp = _namespace.namespace(choice)
        places, parts = [], []
        for index, source in enumerate(self.sources):
            here = xp.nonzero(choice == index)[0]
            own = jax.tree.map(lambda leaf, here=here: xp.take(leaf, here, axis=0), Drawn(drawn.episode, extra[index]))
            places.append(here)
            parts.append(source.finish(own, examples[index], take))
        back = xp.argsort(xp.concatenate(places))
        return jax.tree.map(lambda *leaves: xp.take(xp.concatenate(leaves), back, axis=0), *parts)


def _zeros(shape: Any) -> Any:
    return jax.numpy.zeros(shape.shape, shape.dtype)


def _shapes(source: Any, spec: EpisodeSpec) -> str:
    """Returns shapes and dtypes of the inputs and targets of an episode, without reading any."""
    drawn = source.draw(spec, source.tables(spec), np.zeros([1, source.bits(spec)], np.uint32))

    def take(examples: PyTree, rows: np.ndarray) -> PyTree:
        return jax.tree.map(lambda leaf: np.zeros((*rows.shape, *leaf.shape[1:]), leaf.dtype), examples)

    support = source.finish(drawn, source.examples, take).support
    leaves = jax.tree.leaves((support.inputs, support.targets))
    return ", ".join(f"{leaf.dtype}{list(leaf.shape[2:])}" for leaf in leaves)


def mixture(sources: Sequence[Source], weights: Sequence[float] | None = None, *, name: str | None = None) -> Source:
    """Returns a source that draws each episode from one of several sources: multi-domain few-shot learning.

    Args:
      sources: sources of the same split whose inputs have the same shape and dtype (see `metajax.data.transformed` and
        `metajax.data.resize`). In a hierarchical mixture, sources without nodes give flat episodes.
      weights: how often each source is chosen, positive numbers that sum to 1; None chooses all equally often.
      name: the name in reports; by default the names of the sources joined by "+".

    Returns:
      A source. If all sources have classes, it also has classes, named `SOURCE/CLASS`, for `metajax.data.batches`.

    Raises:
      ValueError: there are no sources; splits, lengths or task types differ; the number of weights is wrong, or the
        weights are not positive or do not sum to 1; or (when used) the inputs have different forms.

    >>> from metajax.data.sources._glyphs import glyphs
    >>> from metajax.data._episodes import episode
    >>> both = mixture([glyphs("train"), glyphs("train", per_family=8)], [0.9, 0.1])
    >>> both.num_classes, episode(both, EpisodeSpec(5, 1, 3), seed=0, index=0).query.inputs.shape
    (952, (15, 28, 28, 1))
    """
    if isinstance(sources, str) or not isinstance(sources, Sequence) or not sources:
        raise ValueError(f"sources must be a list of data sources, got {sources!r}")
    for source in sources:
        check_type(source)
    for what, found in (
        ("split", {source.split for source in sources}),
        ("length_buckets", {source.length_buckets for source in sources}),
        ("length_axis", {getattr(source, "length_axis", 1) for source in sources}),
        ("task type", {task.name for source in sources if (task := getattr(source, "task", None))}),
    ):
        if len(found) > 1:
            raise ValueError(f"sources must have one {what}, got {', '.join(map(repr, sorted(found)))}")
    weights = [1 / len(sources)] * len(sources) if weights is None else list(weights)
    if len(weights) != len(sources):
        raise ValueError(f"weights must have one entry for each of the {len(sources)} sources, got {weights}")
    weights = [_validate.positive_float(f"weights[{index}]", weight) for index, weight in enumerate(weights)]
    if not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise ValueError(f"weights must sum to 1, got {weights}, which sum to {sum(weights)}")
    names = "+".join(source.name for source in sources)
    return _Mixture(name or names, sources[0].split, tuple(sources), tuple(weights))
