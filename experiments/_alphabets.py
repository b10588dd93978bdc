"""Streams of alphabets that are learned one after the other, for the experiments on forgetting."""

from __future__ import annotations

from typing import Any

ALPHABETS, LETTERS, SIZE = 5, 10, 14  # alphabets of a stream, letters of each, side of an image
NEW = 10  # new images per step
FORM: dict[str, Any] = {"pool": False, "normalisation": "layer"}
_TEST = 5  # test images of a letter
_INNER_STEPS, _BATCH, _INNER_RATE, _OUTER_RATE = 5, 10, 0.1, 0.5


def network(outputs: int) -> Any:
    """Returns the convolutional network that learns the alphabets."""
    import metajax

    return metajax.models.conv4(outputs, width=16, depth=3, **FORM)


def reptile(model: Any, adapts: str | None = None) -> Any:
    """Returns a Reptile meta step on the parameters of `model`, or on those selected by a regex."""
    import optax

    import metajax

    learner = metajax.learners.reptile(model, optax.sgd(_INNER_RATE), _INNER_STEPS, batch_size=_BATCH, adapts=adapts)
    hypergrad = metajax.hypergrad.displacement()
    return metajax.outer_update(learner, optax.sgd(_OUTER_RATE), hypergrad=hypergrad, trainable=adapts)


def in_turn(outer: Any) -> Any:
    """Returns the compiled meta steps on one alphabet, `(state, batches) -> state`."""
    import jax

    return jax.jit(lambda state, batches: jax.lax.scan(outer.update, state, batches)[0])


def alphabets(path: str | None) -> dict[str, list[Any]]:
    """Returns the images `[n, side, side, 1]` of the letters of each alphabet, without look-alike letters."""
    import numpy as np

    import metajax

    if path is None:
        sources = [metajax.data.glyphs(split, size=SIZE) for split in ("train", "val", "test")]
    else:
        sources = [metajax.data.omniglot(path, protocol="lake", rotations=False, size=SIZE)]
    found = {}
    for source in sources:
        groups = np.arange(source.num_classes) if source.groups is None else source.groups
        taken: set[int] = set()
        for name, classes in source.nodes.items():
            letters = []
            for number in classes:
                if groups[number] not in taken:
                    taken.add(groups[number])
                    letters.append(np.asarray(source.inputs[source.labels == number], np.float32) / 255)
            if len(letters) >= LETTERS:
                found[name] = letters
    if len(found) < ALPHABETS:
        raise ValueError(f"data must have {ALPHABETS} alphabets of {LETTERS} letters, got {', '.join(found)}")
    return found


def draw(known: dict[str, list[Any]], seed: int, steps: int) -> tuple[list[str], list[Any], list[Any]]:
    """Draws one stream from alphabets.

    Returns:
      The names of its alphabets in order; for each, the new images of every step as episodes `[steps, 1, ...]`; and for
      each, the test images and their labels.
    """
    import numpy as np

    import metajax

    rng = np.random.default_rng(seed)
    names = rng.choice(sorted(known), ALPHABETS, replace=False).tolist()
    stream, test = [], []
    for place, name in enumerate(names):
        letters = [known[name][number] for number in rng.permutation(len(known[name]))[:LETTERS]]
        parts = [rng.permutation(images) for images in letters]
        labels = place * LETTERS + np.arange(LETTERS, dtype=np.int32)
        test.append((np.concatenate([images[:_TEST] for images in parts]), np.repeat(labels, _TEST)))
        inputs = np.concatenate([images[_TEST:] for images in parts])
        targets = np.repeat(labels, [len(images) - _TEST for images in parts])
        rows = rng.integers(0, len(targets), [steps, 1, NEW])
        new = metajax.Examples(inputs[rows], targets[rows], np.ones(rows.shape, bool))
        stream.append(metajax.Episode(new, new))
    return names, stream, test
