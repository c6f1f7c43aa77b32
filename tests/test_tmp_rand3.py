import pytest, torch
from hypothesis import given, settings, HealthCheck, assume, strategies as st
from tests.random_modules import programs
from tests.test_exactness import works_in_eager, checked_values, ANYTHING
from tests.replay import check_exact
from collections import Counter
C = Counter()
from hypothesis import seed
@seed(3)
@settings(max_examples=70, derandomize=False, suppress_health_check=ANYTHING, deadline=None)
@given(programs(), st.integers(2,5))
def test_r(case, g):
    m, x = case
    assume(works_in_eager(m, x))
    torch._dynamo.reset()
    d = check_exact(m, [x.detach().requires_grad_(x.requires_grad)], options={"pattern": "grouped", "groups": g})
    for y in d:
        C[y.pattern, y.detail.split(";")[-1] if y.taken else y.reason.name] += 1
def test_z():
    print(C)
