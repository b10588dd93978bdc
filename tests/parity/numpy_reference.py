"""Networks and learners in plain NumPy, written from the papers and without a look at the library.

Gradients of inner losses are worked out by hand (`mlp_slope`); hypergradients are left to finite differences.
"""

from __future__ import annotations

import math

import numpy as np

EPSILON = 1e-5


def mlp(layers, inputs):
    """`layers` is a list of (kernel, bias), ReLU between them. Returns what enters each layer, and the outputs."""
    values = [inputs.reshape(len(inputs), -1)]
    for kernel, bias in layers[:-1]:
        values.append(np.maximum(values[-1] @ kernel + bias, 0))
    kernel, bias = layers[-1]
    return values, values[-1] @ kernel + bias


def mlp_slope(layers, inputs, output_slope):
    """The gradient with respect to each (kernel, bias), by backpropagation."""
    values, outputs = mlp(layers, inputs)
    slope, slopes = output_slope(outputs), []
    for (kernel, _), value in zip(layers[::-1], values[::-1], strict=True):
        slopes.append((value.T @ slope, slope.sum(0)))
        slope = (slope @ kernel.T) * (value > 0)
    return slopes[::-1]


def softmax(logits):
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def cross_entropy(logits, labels):
    return -np.mean(np.log(softmax(logits)[np.arange(len(labels)), labels]))


def cross_entropy_slope(logits, labels):
    return (softmax(logits) - np.eye(logits.shape[1])[labels]) / len(labels)


def convolution(images, kernel, stride=1):
    """3x3, zeros around the image as in "same" padding, written as six loops."""
    count, height, width, _ = images.shape
    out_h, out_w = -(-height // stride), -(-width // stride)
    pad_h, pad_w = (max((out - 1) * stride + 3 - size, 0) for out, size in ((out_h, height), (out_w, width)))
    padded = np.pad(images, ((0, 0), (pad_h // 2, pad_h - pad_h // 2), (pad_w // 2, pad_w - pad_w // 2), (0, 0)))
    outputs = np.zeros((count, out_h, out_w, kernel.shape[3]))
    for n in range(count):
        for i in range(out_h):
            for j in range(out_w):
                window = padded[n, i * stride : i * stride + 3, j * stride : j * stride + 3]
                for channel in range(kernel.shape[3]):
                    outputs[n, i, j, channel] = np.sum(window * kernel[..., channel])
    return outputs


def max_pool(images):
    """The largest of each 2x2 window; what fills no window is dropped."""
    count, height, width, channels = images.shape
    outputs = np.zeros((count, height // 2, width // 2, channels))
    for i in range(height // 2):
        for j in range(width // 2):
            outputs[:, i, j] = images[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max((1, 2))
    return outputs


def normalise(values, policy, scale, bias, stats=None):
    """Returns the normalised values, and the (mean, variance) of each channel where the policy has them."""
    if policy == "none":
        return values + bias, None
    spatial = tuple(range(1, values.ndim - 1))
    if policy in ("batch", "support"):
        mean, variance = (values.mean((0, *spatial)), values.var((0, *spatial))) if stats is None else stats
        return (values - mean) / np.sqrt(variance + EPSILON) * scale + bias, (mean, variance)
    outputs = np.zeros_like(values)
    groups = 1 if policy == "layer" else 8
    size = values.shape[-1] // groups
    for n in range(len(values)):
        for g in range(groups):
            part = values[n, ..., g * size : (g + 1) * size]
            outputs[n, ..., g * size : (g + 1) * size] = (part - part.mean()) / np.sqrt(part.var() + EPSILON)
    return outputs * scale + bias, None


def conv4(params, images, *, policy, pool, stats=None):
    """Blocks of convolution, normalisation, ReLU and halving, then the head, if any."""
    values, found, index = images, [], 0
    while f"block_{index}" in params:
        block = params[f"block_{index}"]
        values = convolution(values, block["kernel"], 1 if pool else 2)
        given = None if stats is None else stats[index]
        values, used = normalise(values, policy, block["norm"].get("scale"), block["norm"]["bias"], given)
        values = np.maximum(values, 0)
        values = max_pool(values) if pool else values
        found.append(used)
        index += 1
    values = values.reshape(len(values), -1)
    return (values @ params["head"]["kernel"] + params["head"]["bias"] if "head" in params else values), found


def resnet12(params, images, *, policy, stats=None):
    """Residual blocks of three convolutions beside one of a single pixel, the mean over the image, the head, if any."""

    def convolve(values, part, given):
        kernel = part["kernel"]
        outputs = convolution(values, kernel) if len(kernel) == 3 else np.einsum("nijc,cd->nijd", values, kernel[0, 0])
        return normalise(outputs, policy, part["norm"].get("scale"), part["norm"]["bias"], given)

    def leaky(values):
        return np.where(values > 0, values, 0.1 * values)

    values, found, index = images, [], 0
    while f"block_{index}" in params:
        block, given = params[f"block_{index}"], [None] * 4 if stats is None else stats[index]
        path, used = values, []
        for part in range(3):
            path, statistics = convolve(leaky(path) if part else path, block[f"conv_{part}"], given[part])
            used.append(statistics)
        beside, statistics = convolve(values, block["shortcut"], given[3])
        values = max_pool(leaky(path + beside))
        found.append([*used, statistics])
        index += 1
    values = values.mean((1, 2))
    return (values @ params["head"]["kernel"] + params["head"]["bias"] if "head" in params else values), found


def layer_norm(values, part, epsilon):
    mean, variance = values.mean(-1, keepdims=True), values.var(-1, keepdims=True)
    return (values - mean) / np.sqrt(variance + epsilon) * part["scale"] + part["bias"]


def vit(params, images, *, patch, heads, epsilon, pooling):
    """One image, one head and one block after the other."""

    def linear(values, part):
        return values @ part["kernel"] + part["bias"]

    outputs = []
    for image in images:
        corners = [(i, j) for i in range(0, image.shape[0], patch) for j in range(0, image.shape[1], patch)]
        patches = np.stack([image[i : i + patch, j : j + patch].ravel() for i, j in corners])
        values = np.concatenate([params["class_token"][None], linear(patches, params["embed"])]) + params["position"]
        for index in range(len(params["blocks"]["query"]["bias"])):
            block = {name: {leaf: a[index] for leaf, a in part.items()} for name, part in params["blocks"].items()}
            normed = layer_norm(values, block["attention_norm"], epsilon)
            query, key, value = (np.split(linear(normed, block[n]), heads, axis=1) for n in ("query", "key", "value"))
            mixed = [softmax(q @ k.T / np.sqrt(q.shape[1])) @ v for q, k, v in zip(query, key, value, strict=True)]
            values = values + linear(np.concatenate(mixed, axis=1), block["out"])
            hidden = linear(layer_norm(values, block["mlp_norm"], epsilon), block["up"])
            hidden = hidden * np.vectorize(lambda x: (1 + math.erf(x / math.sqrt(2))) / 2)(hidden)  # GELU
            values = values + linear(hidden, block["down"])
        values = layer_norm(values, params["norm"], epsilon)
        outputs.append(values[0] if pooling == "cls" else values[1:].mean(0))
    features = np.stack(outputs)
    return linear(features, params["head"]) if "head" in params else features


def maml(layers, support, query, rate, steps, output_slope, loss):
    """The query loss after gradient descent on the support set from `layers`."""
    for _ in range(steps):
        slopes = mlp_slope(layers, support[0], lambda outputs: output_slope(outputs, support[1]))
        layers = [(k - rate * dk, b - rate * db) for (k, b), (dk, db) in zip(layers, slopes, strict=True)]
    return loss(mlp(layers, query[0])[1], query[1]), layers


def prototypes(features, labels, ways):
    return np.stack([features[labels == way].mean(0) for way in range(ways)])


def euclidean_logits(features, centres):
    return np.array([[-np.sum((feature - centre) ** 2) for centre in centres] for feature in features])


def cosine_logits(features, centres, scale=10.0):
    norm = np.linalg.norm
    return np.array([[scale * feature @ c / (norm(feature) * norm(c)) for c in centres] for feature in features])


def fit_linear_head(features, labels, ways, rate, steps):
    """Gradient descent on softmax regression from zero; kernel `[ways, d]` and bias."""
    kernel, bias = np.zeros((ways, features.shape[1])), np.zeros(ways)
    for _ in range(steps):
        slope = cross_entropy_slope(features @ kernel.T + bias, labels)
        kernel, bias = kernel - rate * slope.T @ features, bias - rate * slope.sum(0)
    return kernel, bias


def fit_cosine_head(features, labels, ways, rate, steps, scale=10.0):
    """Gradient descent on the weights of a cosine classifier, from the class means."""
    kernel = prototypes(features, labels, ways)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for _ in range(steps):
        lengths = np.linalg.norm(kernel, axis=1, keepdims=True)
        direction = kernel / lengths
        slope = scale * cross_entropy_slope(scale * unit @ direction.T, labels).T @ unit
        # a unit vector moves only across itself
        kernel = kernel - rate * (slope - np.sum(slope * direction, 1, keepdims=True) * direction) / lengths
    return kernel
