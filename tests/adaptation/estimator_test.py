"""FewShotClassifier: scikit-learn's own checks, and what it learns."""

import numpy as np
import pytest

import metajax
from metajax import FewShotClassifier

CENTRES = np.array([[0.0, 3.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 3.0]])


def blobs(each, seed):
    rng = np.random.default_rng(seed)
    places = np.repeat(np.arange(3), each)
    return CENTRES[places] + rng.normal(size=(3 * each, 3)), np.array(["ant", "bee", "cow"])[places]


def test_scikit_learns_checks():
    checks = pytest.importorskip("sklearn.utils.estimator_checks", reason="needs scikit-learn, of the extra 'test'")
    results = checks.check_estimator(FewShotClassifier(), on_skip=None, on_fail=None)
    failed = {result["check_name"]: repr(result["exception"]) for result in results if result["status"] == "failed"}
    assert not failed
    assert sum(result["status"] == "passed" for result in results) > 30


def test_without_steps_it_is_the_nearest_standardised_class_mean():
    inputs, labels = blobs(4, 0)
    queries, _ = blobs(20, 1)
    mean, std = inputs.mean(0), inputs.std(0)
    means = np.stack([inputs[labels == name].mean(0) for name in ("ant", "bee", "cow")])
    squares = ((((queries - mean) / std)[:, None] - (means - mean) / std) ** 2).sum(-1) / 3
    expected = np.exp(-squares) / np.exp(-squares).sum(1, keepdims=True)
    found = FewShotClassifier(steps=0).fit(inputs, labels)
    np.testing.assert_allclose(found.predict_proba(queries), expected, rtol=1e-4, atol=1e-6)
    assert found.classes_.tolist() == ["ant", "bee", "cow"]
    assert found.n_features_in_ == 3


def test_steps_lower_the_loss_of_what_is_fitted():
    inputs, labels = blobs(4, 0)

    def loss(steps):
        proba = FewShotClassifier(steps=steps, rate=0.05).fit(inputs, labels).predict_proba(inputs)
        return -np.log(proba[np.arange(12), np.repeat(np.arange(3), 4)]).mean()

    assert loss(50) < 0.7 * loss(0)


def test_what_is_refused():
    inputs, labels = blobs(2, 0)
    with pytest.raises(ValueError, match="must be among model, steps, rate, rank, got 'depth'"):
        FewShotClassifier().set_params(depth=1)
    with pytest.raises(ValueError, match="steps must be an integer of at least 0, got -1"):
        FewShotClassifier(steps=-1).fit(inputs, labels)
    with pytest.raises(ValueError, match="not fitted"):
        FewShotClassifier().predict(inputs)
    with pytest.raises(ValueError, match="two classes"):
        FewShotClassifier().fit(inputs, ["ant"] * 6)
    with pytest.raises(ValueError, match="model must be of type PretrainedModel"):
        FewShotClassifier(model=metajax.models.conv4()).fit(inputs, labels)
