"""The least squares of compensation against numpy, and what it does where there is too little to fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.compensation import least_squares
from optin_cli.compensation.least_squares import BIAS, FULL, NONE, SCALE, Layer, Moments, Rows, refit

TINY = (1e-10,)


def draw(rows, features, outputs, seed=0):
    """(x, errors, weights of the rows) without any structure."""
    rng = np.random.default_rng(seed)
    return rng.normal(1, 1, (rows, features)), rng.normal(2, 1, (rows, outputs)), rng.uniform(0.5, 2, rows)


def moments(x, e, weight=None):
    made = Moments.zeros(x.shape[1], e.shape[1])
    weight = np.ones(len(x)) if weight is None else weight
    for part in np.array_split(np.arange(len(x)), 3):  # as batches come
        made.add(*(torch.as_tensor(a[part]) for a in (x, e, weight)))
    return made


def consumer(features, outputs, *, bias=True, width=1, gain=None, seed=5):
    weight = torch.as_tensor(np.random.default_rng(seed).normal(size=(outputs, features)))
    return Layer(weight, bias, torch.ones(outputs) if gain is None else torch.as_tensor(gain), width)


def squares(x, e, weight, change, gain=1.0):
    """The loss, computed row by row."""
    left = e - x @ change.weight.numpy().T - change.bias.numpy()
    return float((weight[:, None] * (left * gain) ** 2).sum())


def both(x, e, weight=None):
    """Every fifth row held out."""
    weight = np.ones(len(x)) if weight is None else weight
    held = np.arange(len(x)) % 5 == 4
    return moments(x[~held], e[~held], weight[~held]), moments(x[held], e[held], weight[held])


@examples(40)
@given(st.integers(1, 7), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_full_is_weighted_least_squares(features, outputs, bias, seed):
    x, e, weight = draw(60, features, outputs, seed)
    found = refit(*both(x, e, weight), consumer(features, outputs, bias=bias), FULL, TINY).change
    root = np.sqrt(weight)[:, None]
    columns = np.column_stack([x, np.ones(60)]) if bias else x
    expected = np.linalg.lstsq(root * columns, root * e, rcond=None)[0]
    np.testing.assert_allclose(found.weight.numpy(), expected[:features].T, atol=1e-6)
    np.testing.assert_allclose(found.bias.numpy(), expected[features] if bias else 0, atol=1e-6)


@examples(40)
@given(st.integers(1, 4), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_scale_is_least_squares_over_one_factor_a_unit(units, width, bias, seed):
    x, e, weight = draw(60, units * width, 5, seed)
    gain = np.random.default_rng(seed).uniform(0.5, 2, 5)
    layer = consumer(units * width, 5, bias=bias, width=width, gain=gain)
    found = refit(*both(x, e, weight), layer, SCALE, TINY).change
    # unit u adds factor_u * (its features times its columns): a regression with one column a unit
    parts = np.einsum(
        "nuw,ouw->nou", x.reshape(60, units, width), layer.weight.numpy().reshape(5, units, width)
    )
    root = np.sqrt(weight)[:, None, None]
    mean = (lambda a: (weight[:, None, None] * a).sum(0) / weight.sum()) if bias else (lambda a: 0 * a[0])
    design = (root * gain[None, :, None] * (parts - mean(parts))).reshape(-1, units)
    target = (root * gain[None, :, None] * (e[..., None] - mean(e[..., None]))).reshape(-1)
    factors = np.linalg.lstsq(design, target, rcond=None)[0]
    expected = layer.weight.numpy() * np.repeat(factors, width)
    np.testing.assert_allclose(found.weight.numpy(), expected, atol=1e-6)
    if not bias:
        assert not found.bias.any()


def test_bias_takes_up_the_weighted_mean():
    x, e, weight = draw(50, 3, 2)
    found = refit(*both(x, e, weight), consumer(3, 2), BIAS).change
    np.testing.assert_allclose(found.bias.numpy(), np.average(e, axis=0, weights=weight))
    assert not found.weight.any()


@examples(30)
@given(st.sampled_from([FULL, SCALE, BIAS, "auto"]), st.integers(0, 99), st.booleans())
def test_errors_are_those_of_held_out_rows_under_what_the_others_fitted(method, seed, bias):
    x, e, weight = draw(80, 4, 3, seed)
    e += x @ np.random.default_rng(seed).normal(size=(4, 3))
    layer = consumer(4, 3, bias=bias, gain=[0.5, 1.0, 2.0])
    held = np.arange(80) % 5 == 4
    found = refit(*both(x, e, weight), layer, method, (0.01,))
    rest = refit(  # the fit before the last one, which takes all rows
        moments(x[~held], e[~held], weight[~held]), Moments.zeros(4, 3), layer, method, (0.01,)
    )
    assert rest.change.method == NONE  # no rows to hold out: nothing is changed
    arguments = (x[held], e[held], weight[held])
    nothing = rest.change
    assert found.before == pytest.approx(squares(*arguments, nothing, layer.gain.numpy()))
    if found.change.method != NONE:
        fitted = _fitted_without_held(found.change.method, layer, x[~held], e[~held], weight[~held])
        assert found.after == pytest.approx(squares(*arguments, fitted, layer.gain.numpy()))


def _fitted_without_held(method, layer, x, e, weight):
    """What `refit` tries: here its final fit, to half of the rows twice over, so that nothing is left out."""
    half = moments(x, e, weight / 2)
    return refit(half, half, layer, method, (0.01,)).change


def test_the_ridge_pulls_toward_the_weight_there_is():
    x, e, _ = draw(100, 3, 2)
    sizes = [
        float(refit(*both(x, e), consumer(3, 2), FULL, (r,)).change.weight.norm()) for r in (0, 0.1, 1, 1e9)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == pytest.approx(0, abs=1e-6)


def test_a_ridge_is_relative_to_the_size_of_the_inputs():
    x, e, _ = draw(100, 3, 2)
    one = refit(*both(x, e), consumer(3, 2), FULL, (0.1,)).change.weight
    ten = refit(*both(10 * x, e), consumer(3, 2), FULL, (0.1,)).change.weight
    torch.testing.assert_close(one, 10 * ten)


def test_the_ridge_with_the_smallest_held_out_error_is_taken():
    x, e, _ = draw(40, 20, 1)  # noise only: the strongest pull is best
    found = refit(*both(x, e), consumer(20, 1), FULL, (1e-6, 1e-2, 1.0, 1e4))
    assert found.change.ridge == 1e4
    y = x @ np.ones((20, 1))  # no noise: none is needed
    assert refit(*both(x, y), consumer(20, 1), FULL, (1e-6, 1e-2, 1.0, 1e4)).change.ridge == 1e-6


# ---- what `auto` takes ----


def test_auto_takes_what_the_data_calls_for():
    x, noise, _ = draw(400, 4, 3)
    noise = noise - noise.mean(0)
    layer = consumer(4, 3)
    weight = layer.weight.numpy()
    cases = {
        FULL: x @ np.random.default_rng(1).normal(size=(4, 3)) + 0.01 * noise,
        SCALE: x @ (weight * [0.5, -0.3, 1, 0.2]).T + 3 * noise,
        BIAS: np.array([5.0, -2.0, 1.0]) + noise,
    }
    for expected, e in cases.items():
        assert refit(*both(x, e), layer).change.method == expected
    # held-out rows that contradict the fitted ones: every change makes them worse
    held = np.arange(400) % 5 == 4
    e = np.where(held[:, None], -1, 1) * cases[FULL]
    found = refit(moments(x[~held], e[~held]), moments(x[held], e[held]), layer)
    assert found.change.method == NONE
    assert found.after == found.before


@examples(40)
@given(st.integers(1, 12), st.integers(2, 40), st.booleans(), st.integers(0, 999))
def test_auto_never_raises_the_held_out_error(features, rows, bias, seed):
    x, e, weight = draw(rows, features, 3, seed)
    found = refit(*both(x, e, weight), consumer(features, 3, bias=bias))
    assert found.after <= found.before
    assert torch.isfinite(found.change.weight).all()


def test_nothing_is_changed_where_nothing_lacks():
    x, _, _ = draw(50, 4, 3)
    fit, held = both(x, np.zeros((50, 3)))
    for method in ("auto", FULL, SCALE, BIAS):
        change = refit(fit, held, consumer(4, 3), method).change
        assert not change.weight.any()
        assert not change.bias.any()
    assert refit(fit, held, consumer(4, 3)).change.method == NONE


# ---- too little to fit ----


def test_inputs_without_full_rank():
    x, e, _ = draw(80, 2, 3)
    x = np.column_stack([x, x[:, 0], np.zeros(80), np.full(80, 7.0)])  # a twin, a dead and a constant feature
    for ridge in (0.0, 1e-8):  # the Cholesky factor of a singular matrix is not used
        found = refit(*both(x, e), consumer(5, 3), FULL, (ridge,)).change
        columns = np.column_stack([x, np.ones(80)])
        expected = columns @ np.linalg.lstsq(columns, e, rcond=None)[0]
        np.testing.assert_allclose(x @ found.weight.numpy().T + found.bias.numpy(), expected, atol=1e-5)
        assert float(found.weight.abs().max()) < 10


def test_dead_inputs_leave_the_weight_alone():
    _, e, _ = draw(50, 1, 2)
    for x in (np.zeros((50, 3)), np.full((50, 3), 2.0)):
        change = refit(*both(x, e), consumer(3, 2), FULL).change
        assert not change.weight.any()
        np.testing.assert_allclose(change.bias.numpy(), e.mean(0))


def test_a_site_without_units_has_only_its_bias():
    _, e, _ = draw(50, 1, 2)
    none = np.zeros((50, 0))
    for method in ("auto", FULL, SCALE):
        found = refit(*both(none, e), consumer(0, 2), method)
        assert found.change.method == BIAS
        assert found.change.weight.shape == (2, 0)
        np.testing.assert_allclose(found.change.bias.numpy(), e.mean(0))
        assert found.note == "no units left"
    assert refit(*both(none, e), consumer(0, 2, bias=False)).change.method == NONE


def test_a_site_with_one_unit_is_not_broken():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 1)) * 1e-4  # hardly alive: a fit would need a huge weight
    x[::5] *= 1e4  # and on the rows that are held out it would show (every fifth, from the fifth)
    e = rng.normal(size=(60, 2))
    fit, held = moments(x[1::5], e[1::5]), moments(x[::5], e[::5])
    found = refit(fit, held, consumer(1, 2))
    assert float(found.change.weight.abs().max()) < 1
    assert found.after <= found.before


def test_fewer_rows_than_features_fall_back_and_say_so():
    x, e, _ = draw(40, 60, 3)
    fit, held = both(x, e)
    found = refit(fit, held, consumer(60, 3, width=10), FULL)  # 60 features, but 6 factors
    assert found.change.method == SCALE
    assert found.note == "32 rows are too few for 60 features"
    found = refit(fit, held, consumer(60, 3), FULL)
    assert found.change.method == BIAS
    assert found.note == "32 rows are too few for 60 features; 32 rows are too few for 60 factors"
    assert refit(fit, held, consumer(60, 3, bias=False), FULL).change.method == NONE


def test_weights_count_as_fewer_rows():
    x, e, _ = draw(200, 30, 3)
    weight = np.full(200, 1e-3)
    weight[::10] = 10  # 20 rows that matter
    found = refit(*both(x, e, weight), consumer(30, 3), FULL)
    assert found.change.method == BIAS
    assert "too few for 30 features" in found.note
    assert refit(*both(x, e), consumer(30, 3), FULL).change.method == FULL


def test_factors_out_of_bounds_reject_scale():
    x, _, _ = draw(60, 3, 2)
    layer = consumer(3, 2)
    for factor, expected in ((8.9, SCALE), (9.1, BIAS), (-10.9, SCALE), (-11.1, BIAS)):
        e = x @ (layer.weight.numpy() * [factor, 0, 0]).T
        found = refit(*both(x, e), layer, SCALE, (1e-12,))
        assert found.change.method == expected, factor
        assert ("limits" in found.note) == (expected == BIAS)


def test_without_rows_to_hold_out_nothing_is_changed():
    x, e, _ = draw(4, 2, 2)
    found = refit(*both(x, e), consumer(2, 2))
    assert found.change.method == NONE
    assert "too few rows" in found.note


@pytest.mark.parametrize(("least", "within"), [(1e-2, 1e-6), (1e-3, 1e-13)])
def test_rows_that_wait_give_the_moments_of_all(monkeypatch, least, within):
    """In float32 where every ridge is far above what that rounds off; a flush lies between any two adds, or none."""
    x, e, weight = draw(500, 20, 6)
    expected = moments(x, e, weight)
    for most in (1, 2_000, 2**22):
        monkeypatch.setattr(Rows, "_MOST", most)
        rows = Rows(20, 6, ridges=(least, 1.0))
        for part in np.array_split(np.arange(500), 40):
            rows.add(*(torch.as_tensor(a[part]) for a in (x, e, weight)))
        found = rows.moments()
        for name in ("gram", "cross", "ee"):
            one, other = getattr(found, name), getattr(expected, name)
            assert one.dtype == torch.float64
            np.testing.assert_allclose(one, other, rtol=0, atol=within * float(other.abs().max()))
        assert found.effective_rows == pytest.approx(expected.effective_rows)


def test_a_fit_of_float32_products_is_that_of_float64_ones():
    """With features far from zero, and one that is a hundred times as large as the others."""
    x, e, weight = draw(2000, 30, 5)
    x, x[:, 3] = x + 5, x[:, 3] * 100
    layer = consumer(30, 5)
    rows, held = Rows(30, 5), Rows(30, 5)
    for to, part in ((rows, slice(0, 1600)), (held, slice(1600, 2000))):
        to.add(*(torch.as_tensor(a[part]) for a in (x, e, weight)))
    found = refit(rows.moments(), held.moments(), layer)
    exact = refit(*(moments(x[p], e[p], weight[p]) for p in (slice(0, 1600), slice(1600, 2000))), layer)
    assert (found.change.method, found.change.ridge) == (exact.change.method, exact.change.ridge)
    assert found.after == pytest.approx(exact.after, rel=1e-5)
    predicted = [x @ one.change.weight.numpy().T + one.change.bias.numpy() for one in (found, exact)]
    np.testing.assert_allclose(*predicted, atol=1e-4 * float(np.abs(predicted[1]).max()))


@examples(30)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 99))
def test_sums_made_in_strips_are_those_of_all_rows(features, strip, seed):
    x, e, weight = draw(30, features, 2, seed)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(least_squares, "_STRIP", strip)
        found = moments(x, e, weight)
    ones = np.column_stack([x, np.ones(30)])
    np.testing.assert_allclose(found.gram, (ones.T * weight) @ ones, rtol=1e-10)
    np.testing.assert_allclose(found.cross, (ones.T * weight) @ e, rtol=1e-10)


def test_products_are_exact_whatever_the_process_allows():
    """float32 products that a process rounds to bfloat16 would be wrong in the third digit."""
    x, e, weight = (torch.as_tensor(a).float() for a in draw(400, 64, 64))
    before = torch.get_float32_matmul_precision()
    expected = moments(x.double(), e.double(), weight.double())
    try:
        torch.set_float32_matmul_precision("medium")
        found = Moments.zeros(64, 64)
        found.add(x, e, weight)
    finally:
        torch.set_float32_matmul_precision(before)
    largest = float(expected.gram.abs().max())
    np.testing.assert_allclose(found.gram, expected.gram, atol=1e-5 * largest)
