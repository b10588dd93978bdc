"""Few-shot classification with the scikit-learn interface. Only types are imported from scikit-learn."""

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
from metajax.adaptation._meta import MetaTrainedModel, scores_choices
from metajax.core import _validate
from metajax.core._types import Examples, Learner, Model
from metajax.evaluation import softmax
from metajax.learners import proto_maml
from metajax.pretrained import PretrainedModel

_IDENTITY = Model(lambda key, inputs: {}, lambda params, inputs: inputs)


class FewShotClassifier:
    """A classifier of texts, images or features from a few examples, with the interface of scikit-learn.

    With a `model` it uses `fast_adapt_model`. Without one it takes features `[n, d]`, standardises them with the
    statistics of the examples in `fit`, and trains a linear head that starts at the class means.

    Args:
      model: the result of `load_pretrained_model` or `adapt_model`, or None.
      steps: number of Adam steps, at least 0.
      rate: learning rate of Adam.
      rank: rank of the adapters of a pretrained model.

    Attributes:
      classes_: `[ways]` labels, sorted.
      n_features_in_: number of features; not set with a model.

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
        """Returns the constructor arguments by name; `deep` has no effect, since none of them is an estimator."""
        del deep
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> FewShotClassifier:
        """Sets constructor arguments.

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
          ValueError: features are not finite real numbers, labels are not classes, there is only one class, or
            `fast_adapt_model` raises an error.
        """
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None")
        if self.model is not None:
            if scores_choices(self.model, self.rank):
                raise ValueError(
                    "model must give features of texts or images, got one that scores choices, which fast_adapt_model "
                    "adapts to questions"
                )
            classes, places = np.unique(_labels(y, len(X)), return_inverse=True)
            task = (X, places.tolist())
            fast = fast_adapt_model(self.model, task, steps=self.steps, rate=self.rate, rank=self.rank)
            self.classes_, self._fast = classes, fast  # set together, so that a failed fit changes nothing
            return self
        features = _features(X)
        classes, places = np.unique(_labels(y, len(features)), return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"y must have two classes at least, got 1 class: {classes.tolist()}")
        scale = _scale(features)
        head = self._fitted(_scaled(features, scale), places, len(classes))
        self.classes_, self.n_features_in_, self._scale, self._head = classes, features.shape[1], scale, head
        names = _names(X)
        if names is not None:
            self.feature_names_in_ = names
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_
        return self

    def _fitted(self, features: np.ndarray, places: np.ndarray, ways: int) -> dict[str, np.ndarray]:
        steps, rate = _validate.int_at_least("steps", self.steps, 0), _validate.positive_float("rate", self.rate)
        learner = _learner(steps, rate)
        extra = padded_size(len(features)) - len(features)
        support = Examples(
            jnp.asarray(np.pad(features, [(0, extra), (0, 0)])), jnp.asarray(np.pad(places, (0, extra)), jnp.int32),
            np.arange(len(features) + extra) < len(features), np.ones(ways, bool),
        )  # fmt: skip
        head = jax.tree.map(np.asarray, _head(support, learner=learner))
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(head)):
            raise ValueError(f"rate must be low enough for a finite result, got {rate}: the head is not finite")
        return head

    def predict_proba(self, X: Any) -> np.ndarray:
        """Returns probabilities `[n, ways]` of the classes in the order of `classes_`.

        Args:
          X: as for `fit`.

        Raises:
          ValueError: `fit` was not called (scikit-learn's `NotFittedError` if it is installed), or `X` has another form
            than in `fit`.
        """
        if not hasattr(self, "classes_"):
            raise _not_fitted(f"This {type(self).__name__} instance is not fitted yet: call fit first")
        if self.model is not None:
            return self._fast.predict_proba(X)
        self._check_names(X)
        features = _features(X)
        if features.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {features.shape[1]} features, but {type(self).__name__} is expecting {self.n_features_in_} "
                "features as input"
            )
        # each row is summed alone, so that a prediction does not depend on the other rows
        products = np.einsum("nd,wd->nw", _scaled(features, self._scale).astype(np.float64), self._head["kernel"])
        return softmax(products + self._head["bias"])

    def predict(self, X: Any) -> np.ndarray:
        """Returns the predicted labels `[n]`; `X` is as for `fit`."""
        places = self.predict_proba(X).argmax(axis=1)
        return self.classes_[places]

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Computes the accuracy, weighted by `sample_weight` `[n]` if it is given."""
        predicted = self.predict(X)
        return float(np.average(predicted == _labels(y, len(predicted)), weights=sample_weight))

    def _check_names(self, X: Any) -> None:
        """Checks that feature columns are those of `fit`, in the same order; the messages are scikit-learn's."""
        names, known, kind = _names(X), getattr(self, "feature_names_in_", None), type(self).__name__
        if names is None or known is None:
            if names is not None:
                warnings.warn(f"X has feature names, but {kind} was fitted without feature names", stacklevel=3)
            elif known is not None:
                told = f"X does not have valid feature names, but {kind} was fitted with feature names"
                warnings.warn(told, stacklevel=3)
        elif names.tolist() != known.tolist():
            raise ValueError(
                "The feature names should match those that were passed during fit, in the same order: "
                f"{', '.join(known)}, got {', '.join(names)}"
            )

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
    """Returns the same object for the same arguments, because it is the key of compiled programs."""
    return proto_maml(_IDENTITY, optax.adam(rate), steps, adapts=None, distance="euclidean")


@functools.partial(jax.jit, static_argnames=("learner",))
def _head(support: Examples, *, learner: Learner) -> Any:
    return learner.adapt({}, support).head


def _names(X: Any) -> np.ndarray | None:
    """Returns the column names of a dataframe, None if they are not all texts."""
    names = list(getattr(X, "columns", ()))
    return np.array(names, dtype=object) if names and all(isinstance(name, str) for name in names) else None


def _scale(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns column means and deviations (1 if constant), scaled by the largest value: its square may overflow."""
    unit = np.abs(features).max(axis=0)
    unit = np.where(unit > 0, unit, 1)
    mean, spread = (part * unit for part in ((features / unit).mean(axis=0), (features / unit).std(axis=0)))
    # compares the values, because rounding often makes the deviation of equal numbers differ from 0
    spread = np.where(features.max(axis=0) > features.min(axis=0), spread, 1)
    # also scaled by the root of the width, so that distances are of order one for any width
    return mean, spread * features.shape[1] ** 0.5


def _scaled(features: np.ndarray, scale: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    mean, spread = scale
    return ((features - mean) / spread).astype(np.float32)


def _features(X: Any) -> np.ndarray:
    """Returns finite features `[n, d]`; the error messages hold the words that scikit-learn's checks look for."""
    if hasattr(X, "tocsr") or hasattr(X, "todense"):
        raise TypeError("X must be dense features, got a sparse matrix; X.toarray() makes it dense")
    features = np.asarray(X)
    if features.dtype.kind == "c":
        raise ValueError("Complex data not supported")
    if features.dtype.kind == "O":
        features = features.astype(np.float64)  # numbers as objects; other objects raise a TypeError or ValueError
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
        if (np.abs(labels) >= 2**53).any():
            raise ValueError(f"y must be texts or integers of 64 bits, got {labels[np.abs(labels).argmax()]}")
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
