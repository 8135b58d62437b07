"""The loss wrapper: shares of a batch add up, and the formula holds."""

from __future__ import annotations

import numpy as np
import pytest

from hpcnn.nn.loss import SoftmaxCrossEntropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_equals_the_formula(smoothing) -> None:
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(7, 4)) * 5, random.integers(0, 4, 7)
    loss, correct, grad = SoftmaxCrossEntropy(smoothing).forward(logits, labels, 7)
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    target = np.eye(4)[labels] * (1 - smoothing) + smoothing / 4
    assert -(target * np.log(probability)).sum() / 7 == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(grad, (probability - target) / 7, rtol=1e-10, atol=1e-14)
    assert (logits.argmax(1) == labels).sum() == correct


def test_shares_of_a_split_batch_add_up() -> None:
    random = np.random.default_rng(1)
    logits, labels = random.normal(size=(7, 4)), random.integers(0, 4, 7)
    loss = SoftmaxCrossEntropy(0.2)
    whole, parts = (
        loss.forward(logits, labels, 7),
        [loss.forward(logits[s], labels[s], 7) for s in (slice(3), slice(3, 7))],
    )
    assert whole[0] == pytest.approx(parts[0][0] + parts[1][0], rel=1e-12)
    assert whole[1] == parts[0][1] + parts[1][1]
    np.testing.assert_allclose(np.concatenate([part[2] for part in parts]), whole[2], rtol=1e-12)
