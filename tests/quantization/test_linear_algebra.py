"""Factors and solutions are LAPACK's, across block boundaries."""

import numpy as np
import pytest

from medgemma_quantization import linear_algebra
from medgemma_quantization.linear_algebra import factorize, solve_lower, solve_upper


@pytest.mark.parametrize("block", [7, 16, 64])
def test_factor_and_solutions_are_those_of_lapack(monkeypatch, block):
    monkeypatch.setattr(linear_algebra, "BLOCK", block)
    rng = np.random.default_rng(3)
    root = rng.normal(size=(50, 80))
    matrix, right = root @ root.T, rng.normal(size=(50, 9))
    lower = factorize(matrix.copy())
    np.testing.assert_allclose(np.tril(lower), np.linalg.cholesky(matrix), rtol=1e-9, atol=1e-9)
    solution = right.copy()
    solve_lower(lower, solution)
    np.testing.assert_allclose(np.tril(lower) @ solution, right, atol=1e-9)
    solve_upper(lower, solution)
    np.testing.assert_allclose(solution, np.linalg.solve(matrix, right), atol=1e-9)


def test_what_has_no_factor_is_refused():
    with pytest.raises(np.linalg.LinAlgError):
        factorize(-np.eye(5))


def test_work_is_done_in_place():
    matrix, right = np.eye(5) * 4, np.ones((5, 1))
    assert factorize(matrix) is matrix
    solve_lower(matrix, right)
    np.testing.assert_array_equal(right, np.full((5, 1), 0.5))
