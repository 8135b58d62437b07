"""Numbers as people read them."""

from __future__ import annotations

import pytest

from hpcnn.report.words import milliseconds, number, percent, quantity


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0"), (0.5, "0.5"), (999.4, "999"), (999.999, "1000"), (16000.4, "16000"), (1e15, "1e+15")],
)
def test_numbers_have_no_powers_of_ten_where_that_can_be(value, text):
    assert number(value) == text


def test_the_rest():
    assert quantity(61_100_840) == "61.1 M"
    assert quantity(None, "B") == "–"
    assert quantity(0.0, "B") == "0 B"
    assert milliseconds(0.0123) == "12.3"
    assert percent(0.1234) == "12.3%"
