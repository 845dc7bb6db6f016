"""A model that the caller holds stays as it is, whatever is done with it, unless pruning in place is asked for."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.models import new_timm_vit

import optin_cli as optin


def state_of(module) -> dict:
    """Everything about a module that using it could change."""
    return {
        "weights": {name: tensor.clone() for name, tensor in module.state_dict().items()},
        "places": {name: tensor.data_ptr() for name, tensor in module.state_dict().items()},
        "training": {name: part.training for name, part in module.named_modules()},
        "grads": {name: (p.requires_grad, p.grad is None) for name, p in module.named_parameters()},
        "hooks": {
            name: [list(getattr(part, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
            for name, part in module.named_modules()
        },
        "classes": {name: (type(part), sorted(vars(part))) for name, part in module.named_modules()},
        "config": module.config.to_dict() if hasattr(module, "config") else None,
    }  # fmt: skip


def assert_same(before: dict, module) -> None:
    after = state_of(module)
    assert list(before["weights"]) == list(after["weights"])
    assert all(torch.equal(after["weights"][name], tensor) for name, tensor in before["weights"].items())
    assert {k: v for k, v in before.items() if k != "weights"} == {
        k: v for k, v in after.items() if k != "weights"
    }


@pytest.fixture
def held(bert):
    """A module with a hook, a frozen part and modes of its own."""
    bert.bert.embeddings.requires_grad_(False)
    bert.bert.encoder.layer[0].eval()
    seen = []
    bert.classifier.register_forward_hook(lambda *given: seen.append(len(given)))
    return bert


def test_every_stage_leaves_it_alone(held, tokenizer, batches, tmp_path):
    before = state_of(held)
    given = copy.deepcopy(batches)
    padding = tokenizer.padding_side
    model = optin.open_model(held, processor=tokenizer)
    assert_same(before, held)
    ranking = optin.score(model, batches, samples=16)
    assert_same(before, held)
    mask = optin.select(ranking, flops=0.5)
    small = optin.apply(model, mask, batches)
    assert_same(before, held)
    optin.apply(model, mask, batches, output=tmp_path / "small")
    assert_same(before, held)
    optin.evaluate(small, batches, baseline=model)
    optin.bench(small, baseline=model, batch_size=2, seq_len=8, repeats=1, seconds=0)
    assert_same(before, held)
    optin.prune(held, batches, flops=0.6, samples=16, steps=2)
    assert_same(before, held)
    assert tokenizer.padding_side == padding
    for one, other in zip(given, batches, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_open_model_can_be_pruned_again_and_again(tmp_path):
    vit = new_timm_vit()
    images = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    model = optin.open_model(vit)
    ranking = optin.score(model, images, samples=16, tokens=True)
    masks = [optin.select(ranking, flops=0.5), optin.select(ranking, flops=0.9, tokens="only")]
    first = [optin.apply(model, mask, images) for mask in masks]
    again = optin.apply(model, masks[0], images)
    pairs = zip(first[0].module.state_dict().values(), again.module.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert first[0].report.params < first[1].report.params == first[1].report.dense_params
    assert model.anatomy["blocks.0.heads"].units == 4
    # what was merged once can be scored, selected and merged again
    merged = first[1]
    assert any(merged.merges) and not first[0].merges
    twice = optin.prune(merged, images, flops=0.3, samples=16)
    assert len(twice.record.history) == 2
    assert merged.merging is not None and any(merged.merges)


def test_in_place_the_callers_own_module_shrinks(held, batches):
    before = state_of(held)
    mask = optin.select(optin.score(held, batches, samples=16), flops=0.5)
    small = optin.apply(held, mask, batches, inplace=True)
    assert sum(p.numel() for p in held.parameters()) == small.report.params < small.report.dense_params
    after = state_of(held)
    for kept in ("training", "hooks", "config"):
        assert after[kept] == before[kept]
    assert {n: g for n, (g, _) in after["grads"].items()} == {n: g for n, (g, _) in before["grads"].items()}
    inputs = {name: tensor for name, tensor in batches[0].items() if name != "labels"}
    held.eval()
    with torch.inference_mode():
        assert torch.equal(held(**inputs).logits[:, None], small.output(inputs))


def test_in_place_on_an_open_model_makes_no_copy(tmp_path, held, tokenizer, batches):
    held.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    model = optin.open_model(tmp_path / "dense")
    mask = optin.select(optin.score(model, batches, samples=16), flops=0.5)
    small = optin.apply(model, mask, batches, inplace=True)
    assert small.module is model.module


def test_a_module_whose_forward_is_replaced_is_refused(bert):
    bert.forward = bert.forward
    with pytest.raises(optin.InputError, match="forward is replaced"):
        optin.open_model(bert)


def test_what_a_notebook_shows_is_a_line(bert, batches):
    ranking = optin.score(bert, batches, samples=16)
    mask = optin.select(ranking, flops=0.5)
    small = optin.apply(bert, mask, batches)
    for shown in (ranking, mask, small, optin.open_model(bert)):
        assert len(repr(shown)) < 120 and repr(shown).startswith("<") and "\n" not in repr(shown)
    assert "BertForSequenceClassification" in repr(small) and "curvature" in repr(ranking)
