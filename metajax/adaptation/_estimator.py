"""Few-shot classification in scikit-learn's conventions. The library itself is asked for nothing but its own types."""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metajax.adaptation._fast import fast_adapt_model, padded_size
from metajax.adaptation._meta import MetaTrainedModel
from metajax.adaptation._proto_maml import proto_maml
from metajax.core import _validate
from metajax.core._types import Examples, Learner, Model
from metajax.evaluation._metrics import softmax
from metajax.pretrained import PretrainedModel

_IDENTITY = Model(lambda key, inputs: {}, lambda params, inputs: inputs)


class FewShotClassifier:
    """A classifier of texts, images or features from a few examples, with the interface of scikit-learn.

    With a `model` it is `fast_adapt_model`. Without one it takes features `[n, d]`, standardises them by the examples
    of `fit`, and trains a linear head that starts as their class means.

    Args:
      model: what `load_pretrained_model` or `adapt_model` gives, or None.
      steps: of Adam, at least 0.
      rate: of Adam.
      rank: of the adapters of a pretrained model.

    Attributes:
      classes_: `[ways]` labels, sorted.
      n_features_in_: of features; not there with a model.

    Source: Triantafillou et al. 2020 (Proto-MAML), arXiv:1903.03096.

    >>> import numpy as np
    >>> classifier = FewShotClassifier().fit([[0.0, 1.0], [0.1, 0.9], [1.0, 0.0]], ["a", "a", "b"])
    >>> classifier.predict([[0.9, 0.2]]).tolist()
    ['b']
    """

    _estimator_type = "classifier"

    def __init__(
        self,
        model: PretrainedModel | MetaTrainedModel | None = None,
        *,
        steps: int = 10,
        rate: float = 2e-3,
        rank: int = 8,
    ) -> None:
        self.model = model
        self.steps = steps
        self.rate = rate
        self.rank = rank

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of the constructor by name; `deep` has no effect, since none is an estimator."""
        del deep
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> FewShotClassifier:
        """Sets arguments of the constructor.

        Raises:
          ValueError: there is no such argument.
        """
        known = self.get_params()
        for name, value in params.items():
            if name not in known:
                raise ValueError(f"params must be among {', '.join(known)}, got {name!r}")
            setattr(self, name, value)
        return self

    def fit(self, X: Any, y: Any) -> FewShotClassifier:
        """Adapts to labelled examples.

        Args:
          X: features `[n, d]`; with a model, a list of texts or uint8 images `[n, height, width, channels]`.
          y: `[n]` labels.

        Raises:
          ValueError: features are no finite real numbers, labels are not classes, there is one class only, or what
            `fast_adapt_model` refuses.
        """
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None")
        if self.model is not None:
            labels = _labels(y, len(X))
            self.classes_, places = np.unique(labels, return_inverse=True)
            task = (X, places.tolist())
            self._fast = fast_adapt_model(self.model, task, steps=self.steps, rate=self.rate, rank=self.rank)
            return self
        features = _features(X)
        labels = _labels(y, len(features))
        self.classes_, places = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y must have two classes at least, got 1 class: {self.classes_.tolist()}")
        self.n_features_in_ = features.shape[1]
        names = [str(name) for name in getattr(X, "columns", ())]
        if names and all(isinstance(name, str) for name in X.columns):
            self.feature_names_in_ = np.array(names, dtype=object)
        self._mean = features.mean(axis=0)
        spread = features.std(axis=0)
        # by the root of the width too: distances are then of order one, whatever the width
        self._spread = np.where(spread > 0, spread, 1) * features.shape[1] ** 0.5
        self._head = self._fitted(self._scaled(features), places)
        return self

    def _fitted(self, features: np.ndarray, places: np.ndarray) -> dict[str, np.ndarray]:
        steps, rate = _validate.int_at_least("steps", self.steps, 0), _validate.positive_float("rate", self.rate)
        learner = _learner(steps, rate)
        extra = padded_size(len(features)) - len(features)
        support = Examples(
            jnp.asarray(np.pad(features, [(0, extra), (0, 0)])), jnp.asarray(np.pad(places, (0, extra)), jnp.int32),
            np.arange(len(features) + extra) < len(features), np.ones(len(self.classes_), bool),
        )  # fmt: skip
        return jax.tree.map(np.asarray, _head(support, learner=learner))

    def _scaled(self, features: np.ndarray) -> np.ndarray:
        return ((features - self._mean) / self._spread).astype(np.float32)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities `[n, ways]` of the classes in the order of `classes_`.

        Args:
          X: as for `fit`.

        Raises:
          ValueError: `fit` was not called (scikit-learn's `NotFittedError`, where it is installed), or `X` is of
            another form than in `fit`.
        """
        if not hasattr(self, "classes_"):
            raise _not_fitted(f"This {type(self).__name__} instance is not fitted yet: call fit first")
        if self.model is not None:
            return self._fast.predict_proba(X)
        features = _features(X)
        if features.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {features.shape[1]} features, but {type(self).__name__} is expecting {self.n_features_in_} "
                "features as input"
            )
        # row by row sums, so that a prediction does not depend on what is predicted beside it
        products = np.einsum("nd,wd->nw", self._scaled(features).astype(np.float64), self._head["kernel"])
        return softmax(products + self._head["bias"])

    def predict(self, X: Any) -> np.ndarray:
        """The labels `[n]` of `X`, which is as for `fit`."""
        places = self.predict_proba(X).argmax(axis=1)
        return self.classes_[places]

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Accuracy, weighted by `sample_weight` `[n]` where it is given."""
        return float(np.average(self.predict(X) == np.asarray(y), weights=sample_weight))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.get_params().items())})"

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "classes_")

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        texts = self.model is not None and getattr(self.model, "kind", None) == "text"
        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags(),
            input_tags=InputTags(two_d_array=self.model is None, string=texts),
        )


@functools.lru_cache(maxsize=32)
def _learner(steps: int, rate: float) -> Learner:
    """The same object for the same arguments: it is the key of what is compiled."""
    return proto_maml(_IDENTITY, optax.adam(rate), steps, adapts=None, distance="euclidean")


@functools.partial(jax.jit, static_argnames=("learner",))
def _head(support: Examples, *, learner: Learner) -> Any:
    return learner.adapt({}, support).head


def _features(X: Any) -> np.ndarray:
    """Finite features `[n, d]`; the words of errors are those that scikit-learn's checks look for."""
    if hasattr(X, "tocsr") or hasattr(X, "todense"):
        raise TypeError("X must be dense features, got a sparse matrix; X.toarray() makes it dense")
    features = np.asarray(X)
    if features.dtype.kind == "c":
        raise ValueError("Complex data not supported")
    if features.dtype.kind == "O":
        features = features.astype(np.float64)  # numbers as objects; a TypeError or ValueError says what is none
    if features.dtype.kind not in "fiub":
        raise ValueError(f"X must be numbers, or texts with a model, got an array of type {features.dtype}")
    if features.ndim != 2:
        raise ValueError(
            f"Expected 2D array, got {features.ndim}D array of shape {features.shape}. Reshape your data: features "
            "are [n, d]"
        )
    for axis, what in enumerate(("sample", "feature")):
        if not features.shape[axis]:
            raise ValueError(f"Found array with 0 {what}(s) (shape={features.shape}) while a minimum of 1 is required.")
    features = features.astype(np.float64)
    if not np.isfinite(features).all():
        raise ValueError("X must be finite, got NaN or infinity")
    return features


def _labels(y: Any, count: int) -> np.ndarray:
    labels = np.asarray(y)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = _column(labels)
    if labels.ndim != 1:
        raise ValueError(f"y must be a line of labels, got shape {labels.shape}")
    if len(labels) != count:
        raise ValueError(f"y must have one label for each of the {count} examples, got {len(labels)}")
    if labels.dtype.kind == "f":
        if not np.isfinite(labels).all():
            raise ValueError("y must be finite, got NaN or infinity")
        if (labels != labels.round()).any():
            raise ValueError("Unknown label type: continuous numbers; y must be classes")
    return labels


def _column(labels: np.ndarray) -> np.ndarray:
    try:
        from sklearn.exceptions import DataConversionWarning as Kind
    except ImportError:
        Kind = UserWarning
    warnings.warn("A column-vector y was passed when a 1d array was expected", Kind, stacklevel=4)
    return labels[:, 0]


def _not_fitted(message: str) -> ValueError:
    try:
        from sklearn.exceptions import NotFittedError
    except ImportError:
        return ValueError(message)
    return NotFittedError(message)
