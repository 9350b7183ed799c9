"""Products of parameters, thinned out; every combination is slow.

A promise is checked with every pair of values. Costly tests that go over the same long list share it. Of a test marked
`each_value`, whose parameters have little to do with each other, just as many cases are left as it takes for each value
to occur.
"""

import collections
import itertools

import pytest


def leave_each_value(items):
    """Mark those cases of tests with the mark `each_value` slow whose values all occur in others."""
    tests = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("each_value") and not item.get_closest_marker("slow"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        seen = set()
        while cases:
            most = max(cases, key=lambda item: len(_values(item) - seen))
            if _values(most) <= seen:
                break
            seen |= _values(most)
            cases.remove(most)
        for item in cases:
            item.add_marker(pytest.mark.slow)


def _values(item):
    """Of each parameter the object that is in its list; equal ones of two lists, or of two cases of one, may differ."""
    return {(name, id(value)) for name, value in item.callspec.params.items()}


def often(cases, always):
    """All cases for `parametrize`, of which those that are not among `always` are slow."""
    unknown = set(always) - set(cases)
    assert not unknown, unknown
    return [pytest.param(case, marks=() if case in always else pytest.mark.slow) for case in cases]


def shared(cases, turn, tests=2):
    """All cases for one of so many tests that go over the same ones: each is always tried by one test, and slow in others."""
    return [
        pytest.param(case, marks=() if place % tests == turn else pytest.mark.slow) for place, case in enumerate(cases)
    ]


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
