"""Uniform masks become directories that the library's own class opens, without optin and without code of theirs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers.families import ALL, CNNS, MORE_FAMILIES, RANKED
from helpers.models import copy_of, opened, saved_model, shared_model, tiny_model
from helpers.pruning import data_for, pruned_uniformly, rank, uniform
from helpers.runs import outputs, random_inputs

import optin_cli
from optin_cli.artefacts.pruned import read_pruned
from optin_cli.errors import UsageError
from optin_cli.execution.rotation import rankable
from optin_cli.loading.from_module import copy_of as copy_of_model
from optin_cli.pruning.apply import apply, prune_model
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.scoring.score import score
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request

UNSIZED = {*CNNS, "segformer", "timm-swiglu", "timm-dinov3", "timm-eva02"}
"""Families whose config says no size of what is pruned: one a stage, or none at all."""
HEADS = {
    "vit", "deit", "beit", "dinov2", "dinov2-swiglu", "dinov2-registers", "t5", "t5-gated", "llama", "qwen2", "qwen3",
    "mistral", "gemma", "gemma2", "gemma3", "gemma3-one-group", "phi",
}  # fmt: skip
"""Families whose config says the width of a head beside their number."""
FEW = {"maskformer-resnet": 0.99, "deberta-v2": 0.85}
"""Budgets of those of which little can be sized."""
HEADS_ALONE = {"dinov2", "dinov2-swiglu", "dinov2-registers"}


def stock(folder: Path) -> torch.nn.Module:
    """The model in a directory as its library opens it."""
    config = json.loads((folder / "config.json").read_text())
    if "architectures" in config:
        import transformers

        cls = getattr(transformers, config["architectures"][0])
        return cls.from_pretrained(folder, dtype="auto").eval()
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@pytest.mark.parametrize("name", [*ALL, *MORE_FAMILIES])
def test_the_stock_class_opens_a_uniform_model(name, tmp_path):
    model = opened(saved_model(name))
    if name in UNSIZED:
        with pytest.raises(UsageError, match="says no sizes"):
            uniform(model, tmp_path)
        return
    mask = uniform(model, tmp_path, FEW.get(name, 0.8))
    sized = {site.kind for site in model.anatomy} - set(mask.objective["free"]["whole"])
    assert ("heads" in sized) == (name in HEADS) and ("neurons" in sized) == (name not in HEADS_ALONE)
    assert any(len(mask.keep[s.name]) < s.units for s in model.anatomy)
    out = tmp_path / "out"
    apply(model, mask, out)  # compares what is written with the masked model

    config = json.loads((out / "config.json").read_text())
    assert not list(out.glob("*.py"))
    assert "auto_map" not in config and "per_layer_config" not in config
    assert config.get("model_type", "") != "optin"
    small, theirs = opened(out), stock(out)
    assert type(theirs) is type(small.module)
    ours, reference = (outputs(small, one, random_inputs(small)) for one in (small.module, theirs))
    torch.testing.assert_close(ours, reference, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["vit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "timm-vit"))]
)
def test_a_uniform_model_is_pruned_again_freely_and_the_other_way_round(name, tmp_path):
    first = opened(pruned_uniformly(name, tmp_path))
    (tmp_path / "again").mkdir()
    freely = select(rank(first, tmp_path / "again"), 0.4)
    dense = {site.name: site.units for site in shared_model(name).anatomy}
    apply(first, freely, tmp_path / "free")
    second = opened(tmp_path / "free")
    assert {site.name: site.units for site in second.anatomy} == {n: len(k) for n, k in freely.keep.items()}
    assert (tmp_path / "free" / "modeling_optin.py").is_file()
    assert all(unit < dense[site] for site, kept in second.record.kept.items() for unit in kept)

    (tmp_path / "third").mkdir()
    ranking = rank(second, tmp_path / "third")
    if min(site.units for site in second.anatomy):
        mask = select(ranking, Request(flops=0.35, uniform=True))
        apply(second, mask, tmp_path / "uniform")
        assert not (tmp_path / "uniform" / "modeling_optin.py").exists()
        assert type(stock(tmp_path / "uniform")) is type(second.module)


def test_a_model_in_memory_has_the_sizes_in_its_config(tmp_path):
    from transformers import ViTForImageClassification

    module = ViTForImageClassification.from_pretrained(saved_model("vit"))
    before = module.config.to_dict()
    model = optin_cli.open_model(module)
    mask = uniform(opened(saved_model("vit")), tmp_path)
    small = prune_model(copy_of_model(opened(saved_model("vit"))), mask)
    assert small.module.config.num_attention_heads == len(mask.keep["blocks.0.heads"])
    assert small.module.config.intermediate_size == len(mask.keep["blocks.0.neurons"])
    assert small.module.config.head_dim == 8
    assert module.config.to_dict() == before and model.module.config.to_dict() == before


def test_what_is_saved_again_stays_stock(tmp_path):
    out = pruned_uniformly("vit", tmp_path)
    module = optin_cli.load(out)
    module.save_pretrained(tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == {
        "config.json",
        "model.safetensors",
        "optin.json",
    }
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "vit"
    assert read_pruned(tmp_path / "again").kept == read_pruned(out).kept
    small = opened(tmp_path / "again")
    inputs = random_inputs(small)
    assert torch.equal(outputs(small, small.module, inputs), outputs(small, module.eval(), inputs))


def test_a_class_that_takes_other_shapes_is_refused(tmp_path, monkeypatch):
    """A config entry that the installed library does not know."""
    from dataclasses import replace

    from optin_cli.architectures import families
    from optin_cli.architectures.bert import BERT_SITES

    heads = replace(BERT_SITES[0], config={"num_attention_heads": "heads", "head_dim": "head_width"})
    family = replace(shared_model("bert").family, sites=(heads, BERT_SITES[1]))
    monkeypatch.setitem(families._REGISTRY, "bert", family)
    model = opened(copy_of(saved_model("bert"), tmp_path / "bert"))
    mask = uniform(model, tmp_path, only="heads")
    assert len(mask.keep["blocks.0.heads"]) == 2
    says = r"can't be what the mask leaves: .*output\.dense\.weight is \[32, 16\] and would be \[32, 32\]"
    with pytest.raises(UsageError, match=says):
        apply(model, mask, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(HEADS & set(RANKED)))
def test_the_stock_class_opens_heads_of_a_common_lower_rank(name, tmp_path):
    """Its class computes the scale of the logits from the width of a head: queries make up for that."""
    model = opened(saved_model(name))
    mask = uniform(model, tmp_path)
    width = {site.width for site in rankable(model)}.pop()
    mask = dataclasses.replace(mask, ranks={site.name: width // 2 for site in rankable(model)})
    out = tmp_path / "out"
    apply(model, mask, out)
    config = json.loads((out / "config.json").read_text())
    entry = "d_kv" if name.startswith("t5") else "head_dim"
    assert config[entry] == width // 2 and not list(out.glob("*.py"))
    small, theirs = opened(out), stock(out)
    ours, reference = (outputs(small, one, random_inputs(small)) for one in (small.module, theirs))
    torch.testing.assert_close(ours, reference, atol=1e-6, rtol=1e-5)


def test_select_chooses_a_common_rank_and_the_config_has_it(tmp_path):
    dense = tiny_model("vit", tmp_path / "vit", num_attention_heads=2)
    model = opened(dense)
    plan = make_plan(model, data_for(model), ScoreSettings(samples=8, probes=1))
    ranking = score(plan, tmp_path / "r.h5")
    assert ranking.model["config"]["blocks.0.heads"]["width"] == "head_dim"
    mask = select(ranking, Request(flops=0.75, uniform=True, only="heads", min_heads=2))
    assert set(mask.ranks) == {site.name for site in rankable(model)} and len(set(mask.ranks.values())) == 1
    apply(model, mask, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_attention_heads"], config["head_dim"]) == (2, mask.ranks["blocks.0.heads"])


def test_heads_are_of_a_number_that_the_config_accepts(tmp_path):
    """A Llama's hidden size is a multiple of its heads: 6 of 8, in groups of 2, would be refused when it is read."""
    model = opened(saved_model("llama"))
    ranking = rank(model, tmp_path)
    assert ranking.model["config"]["blocks.0.heads"]["counts"] == [1, 2, 4]
    assert "counts" not in ranking.model["config"]["blocks.0.neurons"]
    mask = select(ranking, Request(flops=0.9, uniform=True, max_prune=0.3))
    assert len(mask.keep["blocks.0.heads"]) == 4


def test_blocks_that_share_position_biases_keep_the_same_heads(tmp_path):
    """The first block of a T5's encoder makes the biases of all its blocks, the decoder's those of the decoder."""
    model = opened(saved_model("t5"))
    ranking = rank(model, tmp_path)
    mask = select(ranking, Request(flops=0.6, uniform=True, only="heads"))
    encoder, decoder = ([f"blocks.{block}.heads" for block in blocks] for blocks in ((0, 1, 2), (3, 4, 5)))
    for names in (encoder, decoder):
        scores = sum(next(site.score for site in ranking.sites if site.name == name) for name in names)
        best = sorted(sorted(range(4), key=lambda unit: -scores[unit])[: len(mask.keep[names[0]])])
        assert [mask.keep[name] for name in names] == [best] * 3
    out = tmp_path / "out"
    apply(model, mask, out)
    small = stock(out)
    assert small.config.num_heads == len(mask.keep["blocks.0.heads"])
    table = small.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    whole = (
        opened(saved_model("t5"))
        .module.encoder.block[0]
        .layer[0]
        .SelfAttention.relative_attention_bias.weight
    )
    assert torch.equal(table, whole[:, mask.keep["blocks.0.heads"]])
    with pytest.raises(UsageError, match="share them"):
        select(ranking, Request(flops=0.6, uniform=True, interactions="layer"))
