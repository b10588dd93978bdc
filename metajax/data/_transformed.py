"""A source whose images are transformed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from metajax.core._types import Episode, Examples, PyTree
from metajax.data import _choices, _namespace
from metajax.data._episodes import check_type
from metajax.data._source import Drawn, Source, Take
from metajax.data._spec import EpisodeSpec
from metajax.data._transforms import Transform, Transforms, apply_all, as_transforms

_LABELLED = EpisodeSpec(1, 1, 1)  # an example for pre-training is an episode of one class


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Transformed:
    """A source that also draws the random numbers of its transforms, `[..., slots, draws]` for support and query."""

    source: Any
    both: tuple[Transform, ...]
    support: tuple[Transform, ...]
    query: tuple[Transform, ...]

    def __repr__(self) -> str:
        return f"<transformed {self.source!r}>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "source":  # there is no source yet while it is unpickled or copied
            raise AttributeError(name)
        return getattr(self.source, name)  # name, split, examples, check, tables, num_classes and so on

    @property
    def host_only(self) -> bool:
        return getattr(self.source, "host_only", False)

    @property
    def label_bits(self) -> int:
        return self.source.label_bits + self._numbers(_LABELLED)

    def bits(self, spec: EpisodeSpec) -> int:
        return self.source.bits(spec) + self._numbers(spec)

    def _numbers(self, spec: EpisodeSpec) -> int:
        return count_numbers((self.both, self.support, self.query), *spec.capacity)

    def draw(self, spec: EpisodeSpec, tables: PyTree, bits: Any) -> Drawn:
        own = self.source.bits(spec)
        drawn = self.source.draw(spec, tables, bits[..., :own])
        return self._with_numbers(drawn, spec, bits[..., own:], [part.targets for part in drawn.episode])

    def draw_labelled(self, bits: Any) -> Drawn:
        own = self.source.label_bits
        alone = np.zeros((*bits.shape[:-1], 1), int)
        return self._with_numbers(
            self.source.draw_labelled(bits[..., :own]), _LABELLED, bits[..., own:], [alone, alone]
        )

    def _with_numbers(self, drawn: Drawn, spec: EpisodeSpec, bits: Any, classes: Sequence[Any]) -> Drawn:
        several = self.both, self.support, self.query
        numbers = spread_numbers(several, _choices.uniform(bits), spec.capacity.ways, classes)
        return Drawn(drawn.episode, (drawn.extra, numbers))

    def longest(self, drawn: Drawn) -> np.ndarray:
        return self.source.longest(Drawn(drawn.episode, drawn.extra[0]))

    def finish(self, drawn: Drawn, examples: PyTree, take: Take) -> Episode:
        inner, numbers = drawn.extra
        episode = self.source.finish(Drawn(drawn.episode, inner), examples, take)
        return transform_episode((self.both, self.support, self.query), episode, numbers)


# transforms of support and query, of the support set only, of the query set only
Several = tuple[Sequence[Transform], Sequence[Transform], Sequence[Transform]]


def transform_episode(several: Several, episode: Episode, numbers: tuple[Any, Any]) -> Episode:
    """Transforms the inputs `[..., n, height, width, c]` by `numbers`, `[..., n, draws]` for support and query.

    >>> import metajax
    >>> images = metajax.Examples(np.ones([1, 8, 8, 1]), np.zeros(1, int), np.ones(1, bool))
    >>> several = (metajax.data.resize(4),), (), ()
    >>> transform_episode(several, Episode(images, images), (np.zeros([1, 0]), np.zeros([1, 0]))).support.inputs.shape
    (1, 4, 4, 1)
    """
    both, *alone = several

    def changed(part: Examples, own: Sequence[Transform], numbers: Any) -> Examples:
        chain = [*both, *own]
        images = _namespace.over_leading(lambda *one: apply_all(chain, *one), part.inputs, numbers)
        return part._replace(inputs=images)

    return Episode(*map(changed, episode, alone, numbers))


def count_numbers(several: Several, ways: int, support: int, query: int) -> int:
    """Returns how many random numbers the transforms of an episode need.

    >>> import metajax
    >>> count_numbers(((metajax.data.random_flip(),), (), ()), ways=5, support=5, query=10)
    15
    """
    return sum(
        transform.draws * {"example": slots, "class": ways, "episode": 1}[transform.shared]
        for transforms, slots in zip(several, (support + query, support, query), strict=True)
        for transform in transforms
    )


def spread_numbers(several: Several, numbers: Any, ways: int, classes: Sequence[Any]) -> tuple[Any, Any]:
    """Distributes random numbers `[..., count]` to examples: `[..., slots, draws]` for support and query.

    Args:
      several: the transforms.
      numbers: the random numbers; `count_numbers` returns their count.
      ways: the number of classes.
      classes: `[..., slots]` of support and of query, the class of each example.

    >>> import metajax
    >>> several = (metajax.data.random_flip(),), (), ()
    >>> support, query = spread_numbers(several, np.zeros([3]), 1, [np.zeros(1, int), np.zeros(2, int)])
    >>> support.shape, query.shape
    ((1, 1), (2, 1))
    """
    xp = numbers.__array_namespace__()
    support, query = classes
    slots, dealt = support.shape[-1], []
    for transforms, own in zip(several, (xp.concatenate([support, query], axis=-1), support, query), strict=True):
        parts = [xp.zeros((*own.shape, 0), xp.float32)]
        for transform in transforms:
            lines = {"example": own.shape[-1], "class": ways, "episode": 1}[transform.shared]
            size = lines * transform.draws
            mine, numbers = numbers[..., :size], numbers[..., size:]
            mine = mine.reshape((*own.shape[:-1], lines, transform.draws))
            if transform.shared == "class":
                mine = xp.take_along_axis(mine, own[..., None], axis=-2)
            parts.append(xp.broadcast_to(mine, (*own.shape, transform.draws)))
        dealt.append(xp.concatenate(parts, axis=-1))
    both = dealt[0][..., :slots, :], dealt[0][..., slots:, :]
    first, second = (xp.concatenate(parts, axis=-1) for parts in zip(both, dealt[1:], strict=True))
    return first, second


def transformed(source: Source, both: Transforms = (), *, support: Transforms = (), query: Transforms = ()) -> Source:
    """Returns a source with its images transformed, in the pipeline's graph or on the device.

    Transforms are applied in order, those of `both` first. The seed and the number of an episode also determine the
    random numbers of the transforms. Test classes are augmented only on request.

    Args:
      source: a source of images `[height, width, c]`.
      both: transforms of support and query; numbers shared by a class or an episode are shared by the two sets.
      support: transforms of the support set only.
      query: transforms of the query set only.

    Raises:
      ValueError: an argument is not a transform; or (when used) a transform does not accept the images.

    >>> from metajax.data import _transforms as t
    >>> from metajax.data._episodes import episode
    >>> from metajax.data.sources._glyphs import glyphs
    >>> source = transformed(glyphs("val"), [t.resize(20), t.per_class(t.random_rotate90())], support=t.random_flip())
    >>> episode(source, EpisodeSpec(5, 1, 3), seed=0, index=0).query.inputs.shape
    (15, 20, 20, 1)
    """
    check_type(source)
    named = {"both": both, "support": support, "query": query}
    return _Transformed(source, *(as_transforms(name, value) for name, value in named.items()))
