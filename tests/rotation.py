"""Products of parameters, thinned out: a promise is checked with every pair of values; every combination is slow."""

import itertools

import pytest


def often(cases, always):
    """All cases for `parametrize`, of which those that are not among `always` are slow."""
    unknown = set(always) - set(cases)
    assert not unknown, unknown
    return [pytest.param(case, marks=() if case in always else pytest.mark.slow) for case in cases]


def thinned(lists, always):
    """All combinations for `parametrize`, of which those that are not among `always` are slow."""
    always = list(always)
    return [
        pytest.param(*values, marks=() if values in always else pytest.mark.slow)
        for values in itertools.product(*lists)
    ]


def rotated(first, second, *others):
    """All combinations for `parametrize`; always tried is each pair of the first two, with the others in turn."""
    always = []
    for place, pair in enumerate(itertools.product(first, second)):
        turns, stride = [], 1
        for values in others:
            turns.append(values[place // stride % len(values)])
            stride *= len(values)
        always.append((*pair, *turns))
    return thinned((first, second, *others), always)
