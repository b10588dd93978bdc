"""Published few-shot data sets: their training, validation and test classes, with the user's images."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from metajax.core import _validate
from metajax.data._source import SPLITS, ClassSource, Source
from metajax.data.readers import _images
from metajax.data.sources._class_splits import divide
from metajax.data.sources._image_folder import image_folder
from metajax.data.sources._mixture import mixture

META_DATASET = (
    "ilsvrc_2012", "omniglot", "aircraft", "cu_birds", "dtd", "quickdraw", "fungi", "vgg_flower", "traffic_sign",
    "mscoco",
)  # fmt: skip
_NAMES = (
    "cifar_fs", "fc100", "mini_imagenet", "tiered_imagenet", "cub", *(f"meta_dataset/{name}" for name in META_DATASET)
)  # fmt: skip
_LARGEST_NODE = 392  # classes; Meta-Dataset draws no episode from a larger node, and still covers every class


class _Split(NamedTuple):
    classes: tuple[str, ...]
    nodes: dict[str, tuple[str, ...]]


def class_lists(name: str) -> dict[str, tuple[str, ...]]:
    """Returns the classes of a published split, for `splits=` of `image_folder` and `tfds_source`.

    | name | classes | split of |
    |---|---|---|
    | "cifar_fs" | 64, 16, 20 of CIFAR-100 | Bertinetto et al. 2019 (arXiv:1805.08136) |
    | "fc100" | 60, 20, 20 of CIFAR-100 | Oreshkin et al. 2018 (arXiv:1805.10123) |
    | "mini_imagenet" | 64, 16, 20 of ILSVRC-2012 | Ravi & Larochelle 2017; data of Vinyals et al. 2016 |
    | "tiered_imagenet" | 351, 97, 160 of ILSVRC-2012 | Ren et al. 2018 (arXiv:1803.00676) |
    | "cub" | 100, 50, 50 of CUB-200-2011 | Chen et al. 2019 (arXiv:1904.04232) |
    | "meta_dataset/SOURCE" | see `meta_dataset` | Triantafillou et al. 2020 (arXiv:1903.03096) |

    Names are those of the published class folders: `n01532829` (ILSVRC-2012), `001.Black_footed_Albatross` (CUB),
    `Hebrew/character01` (Omniglot), `00014` (traffic signs). Sources of Meta-Dataset without class folders use the
    names of Meta-Dataset: `090.canna lily` (flowers), `F-16A/B` (aircraft, the variant; a folder `F-16AB` matches it).

    Args:
      name: a name in the table.

    Returns:
      The names of the classes of "train", "val" and "test", each sorted.

    Raises:
      ValueError: the name is unknown.

    >>> lists = class_lists("fc100")
    >>> [len(names) for names in lists.values()], lists["train"][:3]
    ([60, 20, 20], ('apple', 'aquarium_fish', 'bed'))
    """
    _validate.one_of("name", name, _NAMES)
    return {split: part.classes for split, part in _published(name).items()}


def cifar_fs(
    path: str | os.PathLike[str], split: str = "train", *, size: int = 32, cache_bytes: int | None = None
) -> ClassSource:
    """Loads CIFAR-FS: 64 training, 16 validation and 20 test classes of CIFAR-100, 600 images each.

    Source: Bertinetto et al. 2019, "Meta-learning with differentiable closed-form solvers" (arXiv:1805.08136).

    Args:
      path: a folder or zip of `CLASS/NAME.png` (see `image_folder`). It may be divided into `train`, `val` and `test`
        in any way, since classes are looked up in all of it. It may also hold other classes.
      split: "train", "val" or "test".
      size: height and width to resize to.
      cache_bytes: number of bytes of decoded images that are kept in memory; None keeps all of them.

    Returns:
      A source with RGB inputs, uint8 `[n, size, size, 3]`, whose nodes are the superclasses of CIFAR-100. Classes may
      have fewer images than the published ones.

    Raises:
      ValueError: a class of the split is missing, because results on a part of the split are not comparable to
        published ones; or `image_folder` refuses the data.

    >>> import pathlib, tempfile
    >>> from PIL import Image
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for name in class_lists("cifar_fs")["val"]:
    ...     (folder / name).mkdir()
    ...     Image.new("RGB", (32, 32)).save(folder / name / "0001.png")
    >>> source = cifar_fs(folder, "val")
    >>> source.inputs.shape, [source.class_names[index] for index in source.nodes["fish"]]
    ((16, 32, 32, 3), ['flatfish', 'shark'])
    """
    return _source("cifar_fs", path, split, size, cache_bytes)


def fc100(
    path: str | os.PathLike[str], split: str = "train", *, size: int = 32, cache_bytes: int | None = None
) -> ClassSource:
    """Loads FC100 (Fewshot-CIFAR100): whole superclasses of CIFAR-100; 12, 4 and 4 with 60, 20 and 20 classes.

    Arguments, result and errors are those of `cifar_fs`; the nodes are the superclasses.

    Source: Oreshkin, Rodriguez & Lacoste 2018, "TADAM: task dependent adaptive metric for improved few-shot learning"
    (arXiv:1805.10123).

    >>> class_lists("fc100")["test"][:5]
    ('baby', 'beaver', 'bee', 'beetle', 'boy')
    """
    return _source("fc100", path, split, size, cache_bytes)


def mini_imagenet(
    path: str | os.PathLike[str], split: str = "train", *, size: int = 84, cache_bytes: int | None = None
) -> ClassSource:
    """Loads miniImageNet: 64, 16 and 20 classes of ILSVRC-2012, 600 images each, in folders named like `n01532829`.

    Arguments, result and errors are those of `cifar_fs`, but there are no nodes. All images in the folder are used; the
    function does not select the 600 published images of a class.

    Source: Vinyals et al. 2016, "Matching networks for one shot learning" (arXiv:1606.04080); classes of Ravi &
    Larochelle 2017, "Optimization as a model for few-shot learning".

    >>> class_lists("mini_imagenet")["train"][0]
    'n01532829'
    """
    return _source("mini_imagenet", path, split, size, cache_bytes)


def tiered_imagenet(
    path: str | os.PathLike[str], split: str = "train", *, size: int = 84, cache_bytes: int | None = None
) -> ClassSource:
    """Loads tieredImageNet: whole categories of ILSVRC-2012; 20, 6 and 8 of them with 351, 97 and 160 classes.

    Arguments, result and errors are those of `cifar_fs`; the nodes are the categories, by their WordNet synsets.

    Source: Ren et al. 2018, "Meta-learning for semi-supervised few-shot classification" (arXiv:1803.00676).

    >>> [len(names) for names in class_lists("tiered_imagenet").values()]
    [351, 97, 160]
    """
    return _source("tiered_imagenet", path, split, size, cache_bytes)


def cub(
    path: str | os.PathLike[str], split: str = "train", *, size: int = 84, cache_bytes: int | None = None
) -> ClassSource:
    """Loads CUB (birds): 100, 50 and 50 classes of CUB-200-2011, in folders named like `001.Black_footed_Albatross`.

    Arguments, result and errors are those of `cifar_fs`, but there are no nodes.

    Source: Wah et al. 2011, "The Caltech-UCSD Birds-200-2011 dataset"; classes of Chen et al. 2019, "A closer look at
    few-shot classification" (arXiv:1904.04232). Meta-Dataset divides the same birds differently.

    >>> class_lists("cub")["val"][0]
    '002.Laysan_Albatross'
    """
    return _source("cub", path, split, size, cache_bytes)


def meta_dataset(
    path: str | os.PathLike[str],
    split: str = "train",
    *,
    sources: Sequence[str] | None = None,
    size: int = 84,
    cache_bytes: int | None = None,
) -> Source:
    """Loads Meta-Dataset: ten sources of images; each episode uses one of them.

    | source | train, val, test | classes |
    |---|---|---|
    | ilsvrc_2012 | 712, 158, 130 | ILSVRC-2012; nodes are synsets of WordNet |
    | omniglot | 883, 81, 659 | characters; nodes are alphabets |
    | aircraft | 70, 15, 15 | FGVC-Aircraft, variants |
    | cu_birds | 140, 30, 30 | CUB-200-2011 |
    | dtd | 33, 7, 7 | describable textures |
    | quickdraw | 241, 52, 52 | Quick, Draw! |
    | fungi | 994, 200, 200 | FGVCx Fungi |
    | vgg_flower | 71, 15, 16 | VGG Flower |
    | traffic_sign | 0, 0, 43 | German traffic signs |
    | mscoco | 0, 40, 40 | MSCOCO, objects |

    The published episodes, training and test alike, are those of `EpisodeSpec(ways=(5, 50), shots=Imbalanced(),
    queries=10, hierarchical=True)`. An episode of ilsvrc_2012 then has all classes below a synset, or 50 random ones if
    there are more; synsets with fewer than 5 or more than 392 classes are not drawn. An episode of omniglot has classes
    of one alphabet; an episode of another source has any classes. Published results are for one source each
    (`sources=["dtd"]`), and the published configurations validate on ilsvrc_2012 only.

    Images are used unchanged. Meta-Dataset itself crops aircraft and mscoco to the annotated boxes, and leaves out the
    images of ilsvrc_2012 that are also in CUB-200, Caltech-101 or Caltech-256.

    Source: Triantafillou et al. 2020, "Meta-Dataset: a dataset of datasets for learning to learn from few examples"
    (arXiv:1903.03096).

    Args:
      path: a folder that holds one folder or zip for each source, named as in the table, of `CLASS/NAME.png`; for
        omniglot, of `ALPHABET/characterNN/NAME.png`. Class names are those of `class_lists`.
      split: "train", "val" or "test".
      sources: the sources to use; None uses all that exist and have classes in the split.
      size: height and width to resize to.
      cache_bytes: number of bytes of decoded images that are kept in memory, an equal part for each source; None keeps
        all of them.

    Returns:
      A mixture of sources with RGB inputs, uint8 `[n, size, size, 3]`, each chosen equally often. Characters are ink
      255 on 0, as published.

    Raises:
      ValueError: a named source does not exist, is unknown or has no classes in the split; no source exists; or a
        source lacks classes, or `image_folder` refuses it.

    >>> import pathlib, tempfile
    >>> from PIL import Image
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> for name in class_lists("meta_dataset/dtd")["val"]:
    ...     (folder / "dtd" / name).mkdir(parents=True)
    ...     Image.new("RGB", (90, 100)).save(folder / "dtd" / name / "0001.jpg")
    >>> source = meta_dataset(folder, "val")
    >>> source.num_classes, source.class_names[0]
    (7, 'dtd/gauzy')
    """
    _validate.one_of("split", split, SPLITS)
    if cache_bytes is not None:
        _validate.int_at_least("cache_bytes", cache_bytes, 0)
    folder = _images.folder_or_zip(path)
    there = {  # a folder is preferred to a zip
        name: found
        for name in META_DATASET
        for found in (folder / f"{name}.zip", folder / name)
        if found.exists()
    }  # fmt: skip
    with_classes = [name for name in META_DATASET if class_lists(f"meta_dataset/{name}")[split]]
    if sources is None:
        sources = [name for name in with_classes if name in there]
        if not sources:
            raise ValueError(
                f"path must hold folders or zips named {', '.join(with_classes)}, got {str(folder)!r}, which holds "
                "none of them"
            )
    _check_sources(sources, split, with_classes, there, str(folder))
    part = None if cache_bytes is None else cache_bytes // len(sources)
    parts = [_source(f"meta_dataset/{name}", there[name], split, size, part) for name in sources]
    return mixture(parts, name="meta_dataset")


def _check_sources(
    sources: Sequence[str], split: str, with_classes: Sequence[str], there: Mapping[str, Any], path: str
) -> None:
    if isinstance(sources, str) or not isinstance(sources, Sequence) or not sources:
        raise ValueError(f"sources must be a list of sources of Meta-Dataset or None, got {sources!r}")
    for place, name in enumerate(sources):
        _validate.one_of(f"sources[{place}]", name, META_DATASET)
        if name in sources[:place]:
            raise ValueError(f"sources must differ, got {name!r} twice")
        if name not in with_classes:
            raise ValueError(f"sources must have {split} classes, which {name!r} has not; {', '.join(with_classes)} do")
        if name not in there:
            raise ValueError(f"sources names {name!r}, but path {path!r} holds neither {name} nor {name}.zip")


def _source(name: str, path: str | os.PathLike[str], split: str, size: int, cache_bytes: int | None) -> ClassSource:
    """Loads the images of a published split; its classes are looked up by their names."""
    _validate.one_of("split", split, SPLITS)
    _validate.positive_int("size", size)
    listed, short = _published(name)[split], name.removeprefix("meta_dataset/")
    invert: _images.Invert = "auto" if short == "omniglot" else False
    source = image_folder(
        path, split=split, size=size, channels=3, invert=invert, splits={split: listed.classes}, cache_bytes=cache_bytes
    )
    nodes = {node: divide(source.class_names, split, {split: members}, name) for node, members in listed.nodes.items()}
    return dataclasses.replace(source, name=short, nodes=nodes, whole_nodes=short == "ilsvrc_2012")


@functools.cache
def _published(name: str) -> dict[str, _Split]:
    """Reads the facts of `_splits/NAME.json`.

    A split is a list of classes, or a hierarchy: the members of a node are classes and other nodes, or a number n for
    the classes `NODE/character01` to `NODE/character<n>`.
    """
    file = importlib.resources.files("metajax.data.sources") / "_splits" / f"{name.replace('/', '_')}.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    return {split: _read_split(facts[split]) for split in SPLITS}


def _read_split(facts: list[str] | dict[str, Any]) -> _Split:
    if isinstance(facts, list):
        return _Split(tuple(facts), {})

    @functools.cache
    def below(node: str) -> frozenset[str]:
        members = facts[node]
        if isinstance(members, int):
            return frozenset(f"{node}/character{number:02d}" for number in range(1, members + 1))
        return frozenset().union(*(below(member) if member in facts else [member] for member in members))

    classes = frozenset().union(*map(below, facts))
    nodes = {node: tuple(sorted(below(node))) for node in facts if len(below(node)) <= _LARGEST_NODE}
    return _Split(tuple(sorted(classes)), nodes)
