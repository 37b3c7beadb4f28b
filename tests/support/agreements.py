"""What tests compare `htv.Agreement`s by."""

import math

import pytest

import htv
from htv.ops.agreement import agreement
from htv.ops.factors import StackedFactors

FIELDS = ("kept_fraction", "mean_agreement", "m_coherence", "noise_scale")


def agreements(contributed, rule):
    """Return the `Agreement` of stacked contributions, (E, *shape) by name."""
    return {name: agreement([StackedFactors(c)], rule) for name, c in contributed.items()}


def assert_agreements(found, expected, unknown=(), tolerance=1e-9):
    """Compare `Agreement`s by name; the fields `unknown` must be NaN."""
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert isinstance(found[name], htv.Agreement)
        for field in FIELDS:
            got, value = getattr(found[name], field), getattr(wanted, field)
            if field in unknown:
                assert math.isnan(got), f"{field} of {name} is {got}"
            else:
                assert got == pytest.approx(value, rel=tolerance, nan_ok=True), f"{field} of {name}"
