"""Merging tokens: the functions against plain Python, and models that merge against models that don't."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.flops import flop_counter
from helpers.models import shared_model
from helpers.runs import examples, outputs, random_inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optin_cli.architectures.resolve import dissect
from optin_cli.errors import ArtefactError
from optin_cli.execution.macs import observed_tokens
from optin_cli.standalone.merging import match, merge, spread
from optin_cli.structure.hidden_states import hidden_argument, with_hidden
from optin_cli.structure.merge_schedule import most_merged
from optin_cli.transforms.masking import masked, masks_from_keep
from optin_cli.transforms.slicing import slice_model
from optin_cli.transforms.token_merging import install_merges

WITH_TOKENS = [
    "vit", "deit", "timm-vit", "timm-deit-distilled", "timm-deit3", "timm-clip", "timm-post-norm", "timm-registers",
    "dinov2", "dinov2-swiglu", "dinov2-registers", "clip-vision", "clip-image-classifier",
]  # fmt: skip
WITHOUT = ["bert", "beit", "beit-shared", "timm-beit", "timm-eva-rope", "swin", "timm-resnet", "clip-text"]
PREFIX = {
    "vit": 1, "deit": 2, "timm-vit": 1, "timm-deit-distilled": 2, "timm-deit3": 1, "timm-clip": 1,
    "timm-post-norm": 0, "timm-registers": 4, "dinov2": 1, "dinov2-swiglu": 1, "dinov2-registers": 5,
    "clip-vision": 1, "clip-image-classifier": 1,
}  # fmt: skip


def merged_by_hand(
    keys: list[list[float]], tokens: list[list[float]], sizes: list[float], count: int, protected: int
) -> tuple[list[list[float]], list[float], list[set[int]]]:
    """ToMe in plain Python for one sequence: (tokens, sizes, which positions are in each)."""

    def cosine(a: list[float], b: list[float]) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5

    free = list(range(protected, len(keys)))
    pairs = []
    for i in free[::2]:
        best = max(free[1::2], key=lambda j: cosine(keys[i], keys[j]))
        pairs.append((cosine(keys[i], keys[best]), i, best))
    pairs.sort(key=lambda pair: -pair[0])
    groups = {i: {i} for i in range(len(keys))}
    for _, i, j in pairs[:count]:
        groups[j] |= groups.pop(i)
    found = []
    for members in groups.values():
        total = sum(sizes[m] for m in members)
        found.append([sum(tokens[m][c] * sizes[m] for m in members) / total for c in range(len(tokens[0]))])
    return found, [sum(sizes[m] for m in g) for g in groups.values()], list(groups.values())


@examples(60)
@given(st.integers(4, 13), st.integers(0, 2), st.integers(0, 9), st.integers(0, 10_000))
def test_merging_is_what_plain_python_does(tokens, protected, count, seed):
    generator = torch.Generator().manual_seed(seed)
    keys, values = (
        torch.randn(2, tokens, width, generator=generator, dtype=torch.float64) for width in (3, 5)
    )
    sizes = torch.randint(1, 5, (2, tokens), generator=generator).double()
    count = min(count, most_merged(tokens, protected))
    place = match(keys, count, protected)
    found, found_sizes = merge(values, sizes, place, tokens - count)
    for row in range(2):
        expected, sums, groups = merged_by_hand(
            keys[row].tolist(), values[row].tolist(), sizes[row].tolist(), count, protected
        )
        torch.testing.assert_close(found[row], torch.tensor(expected, dtype=torch.float64))
        assert found_sizes[row].tolist() == sums
        assert [set((place[row] == i).nonzero()[:, 0].tolist()) for i in range(tokens - count)] == groups
        assert place[row, :protected].tolist() == list(range(protected))
        assert torch.equal(spread(found, place)[row], found[row][place[row]])


def test_no_more_than_half_of_what_is_free_merges():
    assert [most_merged(n, 1) for n in (1, 2, 3, 4, 17)] == [0, 0, 1, 1, 8]
    assert match(torch.randn(1, 6, 2), 50, 1).max() == 3


@pytest.mark.parametrize("name", WITH_TOKENS)
def test_sites_of_tokens_stand_behind_every_block(name):
    anatomy = shared_model(name).anatomy
    assert [site.block for site in anatomy.token_sites] == list(range(len(anatomy.blocks)))
    assert anatomy.prefix == PREFIX[name]


@pytest.mark.parametrize("name", WITHOUT)
def test_other_families_refuse_a_schedule(name):
    model = shared_model(name)
    with pytest.raises(ArtefactError, match="no sites of tokens"):
        install_merges(model.module, model.anatomy, [1])


@pytest.mark.parametrize(
    ("merges", "told"),
    [([1] * 4, "behind 4 blocks, and the model has 3"), ([1, -1], "-1"), ([0, 0, 1], "behind the last")],
)
def test_a_schedule_that_does_not_fit_is_refused(merges, told):
    model = shared_model("vit")
    with pytest.raises(ArtefactError, match=told):
        install_merges(model.module, model.anatomy, merges)


@pytest.mark.parametrize("name", WITH_TOKENS)
def test_the_schedule_sets_the_tokens_of_each_block(name):
    model = shared_model(name)
    module, inputs = copy.deepcopy(model.module), random_inputs(model)
    seen = watch(module, model.anatomy.blocks)
    dense = outputs(model, module, inputs)
    (whole,) = {hidden.shape[1] for hidden in seen.values()}
    merging = install_merges(module, model.anatomy, [3, 2])
    changed = outputs(model, module, inputs)
    assert [hidden.shape[1] for hidden in seen.values()] == [whole, whole - 3, whole - 5]
    assert changed.shape == dense.shape and (changed - dense).abs().max() > 1e-4
    assert (merging.sizes.sum(dim=1) == whole).all()
    assert (merging.sizes[:, : model.anatomy.prefix] == 1).all()
    with merging.suspended():
        assert torch.equal(outputs(model, module, inputs), dense)
    merging.remove()
    assert torch.equal(outputs(model, module, inputs), dense)


def watch(module, blocks) -> dict[str, Tensor]:
    """What each block gets, filled at every pass."""
    seen: dict[str, Tensor] = {}

    def look(name):
        def hook(_, args, kwargs):
            seen[name] = hidden_argument(args, kwargs)

        return hook

    for path in blocks:
        module.get_submodule(path).register_forward_pre_hook(look(path), with_kwargs=True)
    return seen


@pytest.mark.parametrize("name", WITH_TOKENS)
def test_merging_identical_tokens_changes_nothing(name):
    """Tokens that are the same stay the same in every block; sizes in attention and in the mean make up for them."""
    model = shared_model(name)
    module, inputs = copy.deepcopy(model.module).double(), random_inputs(model)
    inputs = {key: value.double() for key, value in inputs.items()}

    def twins(_, args, kwargs):
        hidden = hidden_argument(args, kwargs).clone()
        free = hidden[:, model.anatomy.prefix :]
        free[:, 1::2] = free[:, ::2]
        return with_hidden((args, kwargs), hidden)

    first = module.get_submodule(model.anatomy.blocks[0])
    first.register_forward_pre_hook(twins, with_kwargs=True)
    dense = outputs(model, module, inputs)
    install_merges(module, model.anatomy, [5, 2])
    torch.testing.assert_close(outputs(model, module, inputs), dense)


@pytest.mark.parametrize("name", ["vit", "timm-vit", "timm-registers", "dinov2-swiglu"])
def test_a_masked_model_merges_what_the_sliced_one_does(name):
    model = shared_model(name)
    inputs = {key: value.double() for key, value in random_inputs(model).items()}
    whole = copy.deepcopy(model.module).double()
    keep = {site.name: list(range(1, site.units, 2)) for site in model.anatomy}
    keep["blocks.1.heads"] = []
    sliced = copy.deepcopy(whole)
    slice_model(sliced, model.anatomy, keep)
    install_merges(whole, model.anatomy, [3, 2], keep)
    install_merges(sliced, dissect(sliced, model.family), [3, 2])
    with masked(whole, model.anatomy, masks_from_keep(model.anatomy, keep)):
        expected = outputs(model, whole, inputs)
    torch.testing.assert_close(outputs(model, sliced, inputs), expected)


def test_a_copy_merges_on_its_own():
    model = shared_model("timm-vit")
    module = copy.deepcopy(model.module)
    merging = install_merges(module, model.anatomy, [2])
    copied = copy.deepcopy(module)
    merging.begin()
    outputs(model, copied, random_inputs(model))
    assert merging.sizes is None
    assert torch.equal(
        outputs(model, copied, random_inputs(model)), outputs(model, module, random_inputs(model))
    )


@pytest.mark.parametrize("name", ["vit", "timm-vit"])
def test_macs_follow_the_schedule(name):
    model = shared_model(name)
    module, inputs = copy.deepcopy(model.module), random_inputs(model, batch=1)
    tokens = observed_tokens(model, inputs)

    def counted() -> float:
        with torch.no_grad(), flop_counter() as counter:
            module(**inputs)
        return counter.get_total_flops() / 2

    dense = counted()
    install_merges(module, model.anatomy, [4, 3])
    saved = model.anatomy.macs(tokens) - model.anatomy.macs(tokens, merges=[4, 3])
    free = tokens - model.anatomy.prefix
    width = model.anatomy["blocks.0.heads"].width
    matching = sum(-(-n // 2) * (n // 2) * width for n in (free, free - 4))
    assert dense - counted() == saved - matching
