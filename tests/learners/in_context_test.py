"""In-context learning is what the decoder says of one text: demonstrations, query and label, without padding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import worlds

import metajax
from metajax import adapters, hypergrad, learners, models

BASE = models.decoder(30, width=16, depth=2, heads=4, kv_heads=2, remat=False)
SEPARATOR, END = [20, 21], [22]
LABELS = [[10, -1], [11, 12], [13, 12]]
TEXTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9]]
TARGETS = [2, 0, 1, 0]
QUERIES = [[2, 4], [5], [6, 1, 3]]


def examples(texts, targets, *, length=3, spare=0, left=False, filling=0, class_mask=None):
    """Texts padded to a length, with `spare` padding examples; `filling` is what stands in padding."""
    rows = len(texts) + spare
    tokens, mask = np.full([rows, length], filling, np.int32), np.zeros([rows, length], bool)
    for row, text in enumerate(texts):
        place = slice(length - len(text), length) if left else slice(0, len(text))
        tokens[row, place], mask[row, place] = text, True
    targets = np.array([*targets, *[filling] * spare], np.int32)
    kept = np.arange(rows) < len(texts)
    return metajax.Examples({"tokens": tokens, "mask": mask}, targets, kept, class_mask)


def scattered(model):
    """Parameters of which none is zero, or one."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(model.init, jax.random.key(0), jnp.zeros([1, 4], jnp.int32))
    return jax.tree.map_with_path(
        lambda path, leaf: jnp.asarray(("scale" in str(path)) + 0.3 * rng.normal(size=leaf.shape), leaf.dtype), shapes
    )


def read(model, params, demonstrations, text, labels):
    """Log-probabilities of labels behind one text, each read anew, without masks and without a cache.

    What stands behind a text is not seen: zeros to 40 tokens are there for one compilation.
    """
    apply, scores = jax.jit(model.apply), []
    for label in labels:
        label = [token for token in label if token >= 0]
        tokens = [*demonstrations, *text, *SEPARATOR, *label]
        logs = jax.nn.log_softmax(apply(params, jnp.array([tokens + [0] * (40 - len(tokens))]))[0])
        first = len(tokens) - len(label) - 1  # the token before it tells of it
        scores.append(sum(float(logs[first + place, token]) for place, token in enumerate(label)))
    return np.array(scores)


def shown(labels, texts=TEXTS, targets=TARGETS):
    """All demonstrations as one list of tokens."""
    parts = [
        [*text, *SEPARATOR, *(token for token in labels[target] if token >= 0), *END]
        for text, target in zip(texts, targets, strict=True)
    ]
    return [token for part in parts for token in part]


def predicted(learner, params, support, query):
    adapt_and_predict = lambda p, s, q: learner.predict(learner.adapt(p, s), q.inputs, mask=q.mask)  # noqa: E731
    return jax.jit(adapt_and_predict)(params, support, query)


@pytest.fixture(scope="module")
def params():
    return scattered(BASE)


@pytest.mark.parametrize(
    "name", ["one token", *(pytest.param(name, marks=pytest.mark.slow) for name in ("two tokens", "a learned prompt"))]
)
def test_it_is_the_text_read_whole(name):
    model = adapters.prompt(BASE, 2) if name == "a learned prompt" else BASE
    labels = [[10], [11], [13]] if name == "one token" else LABELS
    given = [10, 11, 13] if name == "one token" else LABELS
    params = scattered(model)
    learner = learners.in_context(model, labels=given, separator=SEPARATOR, end=END)
    found = predicted(learner, params, examples(TEXTS, TARGETS), examples(QUERIES, [0, 0, 0]))
    expected = [read(model, params, shown(labels), query, labels) for query in QUERIES]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.ptp(expected, axis=1).min() > 0.1


def test_padding_is_nothing(params):
    """More of it, elsewhere, with tokens that are none: the same log-probabilities."""
    learner = learners.in_context(BASE, labels=LABELS, separator=SEPARATOR, end=END)
    expected = predicted(learner, params, examples(TEXTS, TARGETS), examples(QUERIES, [0, 0, 0]))
    options = {"length": 5, "spare": 2, "left": True, "filling": 99}
    found = predicted(learner, params, examples(TEXTS, TARGETS, **options), examples(QUERIES, [0, 0, 0], **options))
    np.testing.assert_allclose(found[:3], expected, atol=1e-5)
    assert np.all(np.isfinite(found))


def test_an_unlabelled_example_is_not_shown_and_absent_classes_are_masked(params):
    learner = learners.in_context(BASE, labels=LABELS, separator=SEPARATOR, end=END)
    present = np.array([True, True, False])
    support = examples(TEXTS, [-1, 0, 1, 0], class_mask=present)
    found = predicted(learner, params, support, examples(QUERIES, [0, 0, 0]))
    np.testing.assert_array_equal(found[:, 2], -1e9)
    demonstrations = shown(LABELS, TEXTS[1:], [0, 1, 0])
    expected = read(BASE, params, demonstrations, QUERIES[2], LABELS)
    np.testing.assert_allclose(found[2, :2], expected[:2], atol=2e-5)
    narrow = examples(TEXTS, [-1, 0, 1, 0], class_mask=present[:2])  # an episode of fewer ways than there are labels
    np.testing.assert_array_equal(predicted(learner, params, narrow, examples(QUERIES, [0, 0, 0])), found)


def test_no_support_is_the_query_alone(params):
    learner = learners.in_context(BASE, labels=LABELS, separator=SEPARATOR, end=END)
    found = predicted(learner, params, examples([], [], spare=2, filling=99), examples(QUERIES, [0, 0, 0]))
    np.testing.assert_allclose(found[2], read(BASE, params, [], QUERIES[2], LABELS), atol=2e-5)


def test_calibration_subtracts_what_a_text_without_content_gives(params):
    learner = learners.in_context(BASE, labels=LABELS, separator=SEPARATOR, end=END, content_free=[25, 26])
    found = predicted(learner, params, examples(TEXTS, TARGETS), examples(QUERIES, [0, 0, 0]))
    blank = read(BASE, params, shown(LABELS), [25, 26], LABELS)
    expected = read(BASE, params, shown(LABELS), QUERIES[2], LABELS) - blank
    np.testing.assert_allclose(found[2], expected, atol=3e-5)
    itself = predicted(learner, params, examples(TEXTS, TARGETS), examples([[25, 26]], [0]))
    np.testing.assert_allclose(itself, np.zeros([1, 3]), atol=1e-5)


def test_the_gradient_is_that_of_the_texts_read_whole(params):
    """Through the demonstrations too, which the learner sees through their cache alone."""
    learner = learners.in_context(BASE, labels=[10, 11, 13], separator=SEPARATOR, end=END)
    targets = np.array([1, 2, 0])
    episode = metajax.Episode(
        examples(TEXTS, TARGETS, spare=1, filling=99), examples(QUERIES, targets, spare=1, filling=99)
    )
    gradient = jax.jit(hypergrad.value_and_grad(learner, hypergrad.unrolled()))
    (loss, _), grads = gradient(params, episode)

    texts = [[*shown([[10], [11], [13]]), *query, *SEPARATOR] for query in QUERIES]
    tokens = jnp.array([text + [0] * (40 - len(text)) for text in texts])
    last = np.array([len(text) - 1 for text in texts])

    def whole(params):
        logits = BASE.apply(params, tokens)[np.arange(3), last][:, np.array([10, 11, 13])]
        return -jnp.mean(jax.nn.log_softmax(logits)[np.arange(3), targets])

    expected, expected_grads = jax.jit(jax.value_and_grad(whole))(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert worlds.relative_distance(grads, expected_grads) < 1e-4
    nothing = episode._replace(query=episode.query._replace(mask=np.zeros(4, bool)))
    (loss, _), grads = gradient(params, nothing)
    assert float(loss) == 0
    assert worlds.dot(grads, grads) == 0


def episode_of(seed):
    """Two classes, each a token of the task, between words that say nothing; who looks up the token knows the label."""
    rng = np.random.default_rng(seed)
    secret = rng.choice(8, 2, replace=False)

    def part(n):
        targets = np.arange(n) % 2
        return metajax.Examples(secret[targets][:, None].astype(np.int32), targets, np.ones(n, bool), np.ones(2, bool))

    return metajax.Episode(part(4), part(4))


@pytest.mark.slow
def test_meta_training_lowers_the_loss_on_other_tasks():
    """Nothing but the demonstrations tells the label, so that no loss below ln 2 is possible without reading them."""
    model = models.decoder(12, width=32, depth=2, heads=4, remat=False)
    learner = learners.in_context(model, labels=[10, 11], separator=[8], end=[9])
    outer = metajax.outer_update(learner, optax.adam(3e-3), hypergrad=hypergrad.unrolled())
    state = outer.init(jax.random.key(0), episode_of(0))
    update = jax.jit(outer.update)
    losses = []
    for step in range(100):
        state, metrics = update(state, worlds.stack([episode_of(16 * step + place) for place in range(16)]))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[:5]) > np.log(2)
    assert np.min(np.mean(np.reshape(losses, [20, 5]), axis=1)) < 0.5, losses


@pytest.mark.slow
def test_adapters_alone_are_trained(params):
    model = adapters.lora(BASE, rank=2)
    learner = learners.in_context(model, labels=[10, 11], separator=SEPARATOR)
    outer = metajax.outer_update(
        learner, optax.adam(1e-2), hypergrad=hypergrad.unrolled(), before=False, trainable="lora"
    )
    tasks = worlds.stack([episode_of(seed) for seed in range(3)])
    start = adapters.attach(model, params, key=jax.random.key(1))
    state = outer.init(jax.random.key(0), episode_of(0), params=start)
    update, losses = jax.jit(outer.update), []
    for _ in range(6):
        state, metrics = update(state, tasks)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.02
    plain = jax.tree.map(np.array_equal, state.params["head"], start["head"])
    assert all(jax.tree.leaves(plain))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": []}, r"labels must be token ids \[classes\] or \[classes, k\], got \[\]"),
        ({"labels": [0.5]}, "labels must be token ids"),
        ({"labels": [[[1]]]}, "labels must be token ids"),
        ({"labels": [3, -1]}, "labels must each begin with a token, and be padded behind it"),
        ({"labels": [[3, -1, 4], [5, 6, 7]]}, "labels must each begin with a token, and be padded behind it"),
        ({"labels": [3, 4, 3]}, "labels must differ from class to class"),
        (
            {"labels": [[3, -1], [3, 4]]},
            r"labels must not begin with another one without content_free, got \[3, 4\], which begins with \[3\]",
        ),
        ({"separator": [-1]}, r"separator must be a list of token ids, got \[-1\]"),
        ({"separator": 5}, "separator must be a list of token ids, got 5"),
        (
            {"labels": [[1, 2], [3]]},
            r"labels must be of one length, shorter ones padded with -1, got \[\[1, 2\], \[3\]\]",
        ),
        ({"end": [0.5]}, r"end must be a list of token ids, got \[0.5\]"),
        ({"separator": [], "content_free": []}, "content_free must hold a token where separator holds none"),
        ({"model": BASE.apply}, "model must be of type Model"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        learners.in_context(**{"model": BASE, "labels": [1, 2], **arguments})


def test_every_class_needs_a_label(params):
    learner = learners.in_context(BASE, labels=[1, 2])
    with pytest.raises(ValueError, match="labels must name each of the 3 classes of a task, got 2 labels"):
        learner.adapt(params, examples(TEXTS, TARGETS, class_mask=np.ones(3, bool)))


def test_a_model_of_features_is_refused():
    model = models.decoder(30, width=16, depth=2, heads=4, outputs="features")
    learner = learners.in_context(model, labels=[1, 2])
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros([1, 4], jnp.int32))
    with pytest.raises(ValueError, match="model must be a decoder with outputs='tokens'"):
        jax.eval_shape(learner.adapt, params, examples(TEXTS, [0, 1, 0, 1]))


@pytest.mark.parametrize("tokens", [{"labels": [1, 30]}, {"separator": [30]}, {"end": [30]}, {"content_free": [30]}])
def test_a_token_that_the_model_does_not_have_is_refused(tokens, params):
    learner = learners.in_context(BASE, **{"labels": [1, 2], **tokens})
    with pytest.raises(ValueError, match="content_free must be among the 30 tokens of the model, got 30"):
        learner.adapt(params, examples(TEXTS, [0, 1, 0, 1]))
