"""Generation through a cache is generation by reading the growing text anew for each token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metajax
from metajax import adapters, models
from metajax.core import _tree
from metajax.models import _generate

BASE = models.decoder(20, width=16, depth=2, heads=4, kv_heads=2, qkv_bias=True, qk_norm=True, tied=True)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6], [5]]
LENGTH = 6


def padded(left):
    """The prompts, side by side; padding holds what is no token."""
    tokens, mask = np.full([3, 5], 99), np.zeros([3, 5], bool)
    for row, prompt in enumerate(PROMPTS):
        place = slice(5 - len(prompt), 5) if left else slice(0, len(prompt))
        tokens[row, place], mask[row, place] = prompt, True
    return {"tokens": jnp.array(tokens, jnp.int32), "mask": mask}


def scattered(model):
    """Parameters whose texts change from token to token."""
    rng, shapes = np.random.default_rng(1), jax.eval_shape(model.init, jax.random.key(0), jnp.zeros([1, 4], jnp.int32))
    return jax.tree.map_with_path(
        lambda path, leaf: jnp.asarray(("scale" in str(path)) + 0.4 * rng.normal(size=leaf.shape), leaf.dtype), shapes
    )


def growing(model, params, prompt, length=LENGTH):
    """The tokens that follow a prompt and the logits of each, without a cache."""
    apply, text, logits = jax.jit(model.apply), np.zeros([1, 5 + LENGTH], np.int32), []
    text[0, : len(prompt)] = prompt
    for place in range(len(prompt), len(prompt) + length):
        logits.append(np.asarray(apply(params, text)[0, place - 1]))  # what follows is not seen
        text[0, place] = logits[-1].argmax()
    return text[0, len(prompt) : len(prompt) + length].tolist(), np.stack(logits)


MODELS = {
    "plain": BASE,
    "lora": adapters.lora(BASE, rank=2),
    "ia3": adapters.ia3(BASE),
    "prompt": adapters.prompt(BASE, 3),
    "both": adapters.prompt(adapters.lora(BASE, rank=2), 3),
}


@pytest.fixture(scope="module")
def params():
    return scattered(BASE)


@pytest.mark.parametrize("name", ["both", *(pytest.param(name, marks=pytest.mark.slow) for name in list(MODELS)[:-1])])
def test_the_cache_changes_no_token(name):
    model = MODELS[name]
    params = scattered(model)
    expected = [growing(model, params, prompt)[0] for prompt in PROMPTS]
    assert len({token for text in expected for token in text}) > 3, "texts of one token test nothing"
    for left in (False, True):
        found = models.generate(model, params, padded(left), length=LENGTH)
        assert found["tokens"].tolist() == expected
        assert found["mask"].all()


def test_the_cache_changes_no_logit():
    """What each step of `generate` computes, one step at a time, with room that nothing has filled."""
    model = MODELS["both"]
    params = scattered(model)
    tokens, logits = growing(model, params, PROMPTS[1])
    step = jax.jit(lambda params, inputs, cache: _generate.continued(model, params, inputs, cache))
    _, cache = step(params, {"tokens": jnp.array([PROMPTS[1][:-1]])}, {})
    filled = cache["mask"].shape[1]
    assert filled == 3 + 4  # the learned prompt, and all tokens but the last
    width = {"key": 2, "value": 2, "mask": 1}
    cache = {
        name: np.pad(leaf, [(0, LENGTH * (axis == width[name])) for axis in range(leaf.ndim)])
        for name, leaf in cache.items()
    }
    for place, token in enumerate([PROMPTS[1][-1], *tokens[:-1]]):
        found, new = step(params, {"tokens": jnp.array([[token]])}, cache)
        np.testing.assert_allclose(found[0, 0], logits[place], atol=1e-5)
        for name, leaf in cache.items():
            leaf[(slice(None),) * width[name] + (slice(filled + place, filled + place + 1),)] = new[name]


def test_padding_follows_the_stop(params):
    plain = np.array(models.generate(BASE, params, padded(False), length=LENGTH)["tokens"])
    stop = int(plain[0, 2])
    found = models.generate(BASE, params, padded(False), length=LENGTH, stop=stop)
    for row in range(3):
        kept = plain[row].tolist()
        kept = kept[: kept.index(stop) + 1] if stop in kept else kept
        assert found["mask"][row].tolist() == [place < len(kept) for place in range(LENGTH)]
        assert found["tokens"][row].tolist() == kept + [0] * (LENGTH - len(kept))


@pytest.mark.slow
def test_jit_and_tasks(params):
    """Tasks share the base and have adapters and prompts of their own; each stops by itself."""
    model = MODELS["lora"]
    trees = [scattered(model)]
    trees.append({**trees[0], "blocks": jax.tree.map(lambda leaf: 2 * leaf, trees[0]["blocks"])})
    lora, base = zip(*(_tree.split(tree, "lora") for tree in trees), strict=True)
    lora, prompts = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *pair) for pair in (lora, (padded(0), padded(1))))
    tasks = jax.jit(
        jax.vmap(
            lambda lora, prompts: models.generate(model, _tree.fill(lora, base[0]), prompts, length=LENGTH, stop=7)
        )
    )
    found = tasks(lora, prompts)
    for task in range(2):
        tree = _tree.fill(jax.tree.map(lambda leaf: leaf[task], lora), base[0])  # noqa: B023
        alone = models.generate(model, tree, padded(task), length=LENGTH, stop=7)
        np.testing.assert_array_equal(found["tokens"][task], alone["tokens"])
        np.testing.assert_array_equal(found["mask"][task], alone["mask"])
    assert np.any(found["tokens"][0] != found["tokens"][1])


@pytest.mark.slow
def test_drawn_tokens_have_the_frequencies_of_the_softmax(params):
    prompt, temperature, draws = PROMPTS[1], 2.0, 4000
    logits = growing(BASE, params, prompt, 1)[1][0] / temperature
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    key = jax.random.key(0)
    inputs = jnp.tile(jnp.array(prompt, jnp.int32), (draws, 1))
    options = {"length": 2, "temperature": temperature, "key": key}
    tokens = models.generate(BASE, params, inputs, **options)["tokens"]
    frequencies = np.bincount(tokens[:, 0], minlength=20) / draws
    np.testing.assert_allclose(frequencies, expected, atol=5 * np.sqrt(0.25 / draws))
    np.testing.assert_array_equal(tokens, models.generate(BASE, params, inputs, **options)["tokens"])
    assert np.any(np.bincount(tokens[:, 1], minlength=20) / draws != frequencies)  # another step, other draws


@pytest.mark.slow
def test_narrow_computation(params):
    model = models.mixed_precision(BASE)
    found = jax.eval_shape(lambda params: models.generate(model, params, padded(False), length=2), params)
    assert found["tokens"].shape == (3, 2)


def test_the_logits_of_prompts_are_not_computed(params):
    """Logits of all tokens of long prompts would be the largest array by far."""
    prompts = jnp.zeros([2, 30], jnp.int32)
    lowered = jax.jit(lambda params: models.generate(BASE, params, prompts, length=2)).lower(params)
    program = lowered.compile().as_text()
    assert "2,30,20" not in program
    assert "2,30,16" in program  # states are


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"length": 0}, "length must be an integer of at least 1, got 0"),
        ({"stop": -1}, "stop must be an integer of at least 0, got -1"),
        ({"temperature": -1.0}, "temperature must be a finite number of at least 0, got -1.0"),
        ({"temperature": 0.5}, "key must be given to draw tokens at temperature 0.5, got None"),
        ({"model": BASE.apply}, "model must be of type Model"),
    ],
)
def test_bad_arguments(params, options, text):
    model = options.pop("model", BASE)
    with pytest.raises(ValueError, match=text):
        models.generate(model, params, jnp.array([PROMPTS[1]]), **{"length": 2, **options})


@pytest.mark.parametrize(
    "model",
    [
        models.decoder(20, width=16, depth=2, heads=4, outputs="features"),
        metajax.Model(lambda key, inputs: {}, lambda params, inputs: inputs["tokens"]),
    ],
)
def test_a_model_without_a_cache_is_refused(model):
    inputs = {"tokens": jnp.array([PROMPTS[1]])}
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)
    with pytest.raises(ValueError, match="model must be a decoder with outputs='tokens', which takes a cache"):
        jax.eval_shape(lambda params: models.generate(model, params, inputs, length=2), params)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"tokens": [[1, 2]], "attention_mask": [[1, 1]]}, "may hold a mask, got tokens, attention_mask"),
        ({}, "inputs must hold tokens, and may hold a mask, got nothing"),
        ([1, 2], r"tokens of inputs must be integers \[n, prompt\], got int32 \[2\]"),
        (np.zeros([2, 0], np.int32), r"must be integers \[n, prompt\], got int32 \[2, 0\]"),
        ([[0.5]], "tokens of inputs must be integers"),
        (
            {"tokens": [[1, 2]], "mask": [[1]]},
            r"mask of inputs must have the shape of its tokens, \(1, 2\), got \(1, 1\)",
        ),
    ],
)
def test_inputs_that_are_no_prompts_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        models.generate(BASE, {}, inputs, length=2)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([[1, 20]], "tokens of inputs must be from 0 to 19, got 20"),
        ([[1, -1]], "tokens of inputs must be from 0 to 19, got -1"),
        ({"tokens": [[1], [2]], "mask": [[True], [False]]}, "must keep a token of each prompt, got none in row 1"),
    ],
)
def test_prompts_that_the_model_cannot_read_are_refused(inputs, message):
    inputs = inputs if isinstance(inputs, dict) else {"tokens": inputs}
    with pytest.raises(ValueError, match=message):
        models.generate(BASE, {}, jax.tree.map(np.array, inputs, is_leaf=lambda leaf: isinstance(leaf, list)), length=2)


def test_what_follows_fits_whatever_type_the_prompt_has():
    model = models.decoder(300, width=16, depth=1, heads=2)
    params = scattered(model)
    prompts = [np.array([[5, 6, 7]], dtype) for dtype in (np.int32, np.uint8)]
    wide, narrow = (models.generate(model, params, prompt, length=8)["tokens"] for prompt in prompts)
    assert wide.max() > 255
    np.testing.assert_array_equal(wide, narrow)


def test_a_text_has_at_most_as_many_tokens_as_positions():
    model = models.decoder(20, width=16, depth=1, heads=2, positions=5)
    params = scattered(model)
    assert models.generate(model, params, np.array([[5, 6, 7]]), length=1)["tokens"].shape == (1, 1)
    with pytest.raises(ValueError, match="tokens must be at most 5 in a text, a cache included, got"):
        models.generate(model, params, np.array([[5, 6, 7]]), length=4)
    with pytest.raises(ValueError, match="tokens must be at most 5 in a text, a cache included, got 6"):
        model.apply(params, jnp.zeros([1, 6], jnp.int32))


def test_a_mask_may_be_of_integers():
    tokens = jnp.array([[5, 6, 7]])
    found = [
        models.generate(BASE, scattered(BASE), {"tokens": tokens, "mask": jnp.array([[0, 1, 1]], dtype)}, length=3)[
            "tokens"
        ]
        for dtype in (bool, int)
    ]
    np.testing.assert_array_equal(*found)


def test_a_stop_that_is_no_token_is_refused():
    with pytest.raises(ValueError, match=r"stop must be one of the .* tokens of the model, got 1000"):
        models.generate(BASE, scattered(BASE), jnp.array([[5, 6, 7]]), length=2, stop=1000)
