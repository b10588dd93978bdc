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
    with pytest.raises(ValueError, match=r"y must be texts or integers of 64 bits, got 9.2"):
        FewShotClassifier().fit(inputs, [2**63, -1] * 3)
    with pytest.raises(ValueError, match="rate must be low enough for a finite result, got 1e"):
        FewShotClassifier(rate=1e38).fit(inputs, labels)


@pytest.mark.parametrize("scale", [1, 1e200, 1e-200])
def test_a_constant_feature_and_any_unit(scale):
    """The deviation of ten times 0.3 is not 0 in floating point."""
    rng = np.random.default_rng(0)
    labels, truth = np.repeat([0, 1], 5), np.repeat([0, 1], 50)
    inputs = np.stack([labels + 0.1 * rng.normal(size=10), np.full(10, 0.3)], axis=1)
    queries = np.stack([truth + 0.1 * rng.normal(size=100), 0.3 + 0.01 * rng.normal(size=100)], axis=1)
    columns = np.array([scale, 1])
    assert FewShotClassifier().fit(inputs * columns, labels).score(queries * columns, truth) > 0.95


def test_scores_are_of_one_label_each():
    inputs, labels = blobs(4, 0)
    found = FewShotClassifier().fit(inputs, labels)
    with pytest.warns(UserWarning, match="column-vector"):
        assert found.score(inputs, labels[:, None]) == found.score(inputs, labels)
    with pytest.raises(ValueError, match="y must have one label for each of the 12 examples, got 1"):
        found.score(inputs, ["ant"])


def test_a_fit_that_fails_changes_nothing():
    inputs, labels = blobs(4, 0)
    found = FewShotClassifier().fit(inputs, labels)
    before = found.predict(inputs)
    with pytest.raises(ValueError, match="two classes"):
        found.fit(inputs, ["dog"] * 12)
    np.testing.assert_array_equal(found.predict(inputs), before)


class Frame:
    """What a dataframe is to scikit-learn: an array with names of columns."""

    def __init__(self, columns, values):
        self.columns, self.values = columns, values

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)


def test_names_of_columns():
    inputs, labels = blobs(4, 0)
    found = FewShotClassifier().fit(Frame(["u", "v", "w"], inputs), labels)
    assert found.feature_names_in_.tolist() == ["u", "v", "w"]
    with pytest.raises(ValueError, match=r"The feature names should match .* same order: u, v, w, got v, u, w"):
        found.predict(Frame(["v", "u", "w"], inputs))
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        found.predict(inputs)
    found.fit(inputs, labels)
    assert not hasattr(found, "feature_names_in_")
    with pytest.warns(UserWarning, match="X has feature names, but FewShotClassifier was fitted without"):
        found.predict(Frame(["u", "v", "w"], inputs))
