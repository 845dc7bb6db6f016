"""The losses against their definitions."""

from __future__ import annotations

import pytest
import torch
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from optin_cli.scoring import losses
from optin_cli.scoring.losses import (
    output_change,
    output_probe,
    relation_probe,
    relational_change,
    unit_rows,
)


@examples(40)
@given(rows=st.integers(1, 40), width=st.integers(1, 12), seed=st.integers(0, 999))
def test_relational_change_is_the_distance_of_the_relation_matrices(rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    dense = unit_rows(torch.randn(rows, width, generator=generator))
    variants = unit_rows(torch.randn(3, rows, width, generator=generator))
    relations = dense.double() @ dense.double().t()
    expected = [((v.double() @ v.double().t() - relations) ** 2).sum() / rows**2 for v in variants]
    torch.testing.assert_close(
        relational_change(dense, variants).double(), torch.stack(expected), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("rows", [20, 200], ids=["K x K", "d x d"])
def test_relational_change_keeps_its_digits_for_tiny_changes(rows):
    generator = torch.Generator().manual_seed(1)
    dense = unit_rows(torch.randn(rows, 16, generator=generator))
    noise = 1e-5 * torch.randn(1, rows, 16, generator=generator)
    exact = dense.double() @ dense.double().t()
    moved = (dense + noise).double()
    expected = ((moved @ moved.transpose(1, 2) - exact) ** 2).sum((1, 2)) / rows**2
    found = relational_change(dense, dense + noise)
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=0)


def test_output_change_is_kl_at_the_temperature():
    dense, variants = torch.randn(4, 2, 5), torch.randn(3, 4, 2, 5)
    weights = torch.tensor([[1.0, 1], [1, 0], [1, 1], [0, 0]])
    found = output_change(dense, variants, weights, temperature=3.0, term="kl")
    for v, value in enumerate(variants):
        rows = F.kl_div(
            (value / 3).log_softmax(-1), (dense / 3).log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        assert found[v] == pytest.approx(float((rows * weights).sum()), rel=1e-5)


def test_output_change_is_the_same_a_few_examples_at_a_time(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    dense, variants = (torch.randn(*shape, 5, 7, generator=generator) for shape in ((6,), (3, 6)))
    weights = torch.rand(6, 5, generator=generator)
    for term in ("kl", "binary_kl"):
        whole = output_change(dense, variants, weights, temperature=2.0, term=term)
        for held in (1, 2 * 3 * 5 * 7):
            monkeypatch.setattr(losses, "_HELD", held)
            found = output_change(dense, variants, weights, temperature=2.0, term=term)
            torch.testing.assert_close(found, whole)
        monkeypatch.undo()


def test_output_change_of_values_is_squared_error():
    dense, variants = torch.randn(4, 1, 5), torch.randn(2, 4, 1, 5)
    found = output_change(dense, variants, torch.ones(4, 1), temperature=4.0, term="squares")
    torch.testing.assert_close(found, (variants - dense).square().sum((-1, -2)).sum(1))


def test_relation_probe_is_the_gradient_of_the_probed_relations():
    features = unit_rows(torch.randn(9, 4)).requires_grad_()
    signs = torch.randint(0, 2, (9, 9), generator=torch.Generator().manual_seed(5)) * 2.0 - 1
    ((signs * (features @ features.t())).sum() / 9).backward()
    found = relation_probe(features.detach(), torch.Generator().manual_seed(5))
    torch.testing.assert_close(found, features.grad)


def test_relation_probes_estimate_the_change_of_relations():
    generator = torch.Generator().manual_seed(0)
    features = unit_rows(torch.randn(12, 6, generator=generator))
    direction = torch.randn(12, 6, generator=generator)
    change = direction @ features.t() + features @ direction.t()
    exact = float(change.square().sum() / 12**2)
    draws = [float((relation_probe(features, generator) * direction).sum()) ** 2 for _ in range(4000)]
    assert sum(draws) / len(draws) == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("term", ["kl", "binary_kl", "squares"])
def test_output_probes_estimate_the_second_order_change(term):
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(5, 1, 3, generator=generator, dtype=torch.float64)
    direction = torch.randn(5, 1, 3, generator=generator, dtype=torch.float64)
    weights = torch.ones(5, 1, dtype=torch.float64)
    step = 1e-3
    moved = (dense + step * direction)[None]
    settings = {"temperature": 2.0, "term": term}
    exact = float(output_change(dense, moved, weights, **settings)) / step**2
    total = 0.0
    for _ in range(3000):
        gradient = output_probe(dense, weights, generator, **settings)
        total += float((gradient * direction).sum()) ** 2
    assert total / 3000 == pytest.approx(exact, rel=0.12)


def test_signs_are_the_same_draws_as_ever():
    """Drawn in bytes, they are those of whole numbers: rankings that are stored were made with them."""
    signs = losses._signs((13, 7), torch.Generator().manual_seed(3), torch.device("cpu"))
    drawn = torch.randint(0, 2, (13, 7), generator=torch.Generator().manual_seed(3))
    assert signs.dtype == torch.float32
    assert torch.equal(signs, 2 * drawn.float() - 1)
