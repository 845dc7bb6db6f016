"""What is pruned in memory is what is written, and what the command line writes."""

from __future__ import annotations

import pytest
import torch
from helpers.cli import run
from helpers.data import tiny_text_csv
from helpers.models import new_timm_vit, saved_model

import optin_cli as optin


def outputs(model, inputs):
    with torch.inference_mode():
        return model.output(inputs)


def test_in_memory_on_disk_and_by_the_command_line_it_is_one_model(tmp_path):
    data, spec = tiny_text_csv(tmp_path), saved_model("bert")
    model = optin.open_model(spec)
    ranking = optin.score(model, data, samples=16, output=tmp_path / "r.h5")
    mask = optin.select(tmp_path / "r.h5", flops=0.5, output=tmp_path / "m.json")
    small = optin.apply(model, mask, data, samples=24)
    written = optin.apply(model, mask, data, samples=24, output=tmp_path / "small")
    run("score", spec, "--data", data, "--samples", 16, "-o", tmp_path / "cli.h5")
    run("select", tmp_path / "cli.h5", "--flops", 0.5, "-o", tmp_path / "cli.json")
    run("apply", spec, tmp_path / "cli.json", "--data", data, "--samples", 24, "-o", tmp_path / "cli")
    assert optin.read_ranking(tmp_path / "cli.h5").digest == ranking.digest
    assert optin.read_mask(tmp_path / "cli.json") == mask
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("small", "cli")]
    assert files[0] == files[1]
    state = optin.load(tmp_path / "small").state_dict()
    for found in (small, written):
        assert all(torch.equal(found.module.state_dict()[name], tensor) for name, tensor in state.items())
    assert written.spec == str(tmp_path / "small")
    assert written.digest == optin.open_model(tmp_path / "small").digest
    assert written.processor.tokenizer("the cat")


def test_an_output_of_the_same_mask_is_reused_and_another_refused(tmp_path, bert, tokenizer, batches):
    model = optin.open_model(bert, processor=tokenizer)
    ranking = optin.score(model, batches, samples=16)
    masks = [optin.select(ranking, flops=share) for share in (0.6, 0.5)]
    first = optin.apply(model, masks[0], batches, output=tmp_path / "small")
    again = optin.apply(model, masks[0], batches, output=tmp_path / "small")
    assert again.report.reused and not first.report.reused
    assert again.report.deviation == first.report.deviation
    with pytest.raises(optin.UsageError, match="another mask"):
        optin.apply(model, masks[1], batches, output=tmp_path / "small")
    with pytest.raises(optin.UsageError, match="holds a pruned model"):
        optin.save(optin.apply(model, masks[1], batches), tmp_path / "small")
    optin.apply(model, masks[1], batches, output=tmp_path / "small", force=True)
    assert optin.read_pruned(tmp_path / "small").kept == masks[1].keep


def test_a_module_is_saved_with_its_tokenizer_and_opens_by_its_directory(tmp_path, bert, tokenizer, batches):
    small = optin.prune(optin.open_model(bert, processor=tokenizer), batches, flops=0.6, samples=16)
    saved = optin.save(small, tmp_path / "small")
    inputs = {name: tensor for name, tensor in batches[0].items() if name != "labels"}
    weights = small.module.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in saved.module.state_dict().items())
    # kernels choose by where weights lie in memory: the last digits of outputs are not promised
    torch.testing.assert_close(outputs(saved, inputs), outputs(small, inputs), rtol=1e-5, atol=1e-6)
    there = optin.open_model(tmp_path / "small")
    assert there.processor.tokenizer("the cat")["input_ids"] == tokenizer("the cat")["input_ids"]
    assert there.record.dense["id"] == "BertForSequenceClassification"


def test_what_was_pruned_in_memory_is_pruned_further(tmp_path, batches, bert):
    once = optin.prune(bert, batches, flops=0.7, samples=16)
    twice = optin.prune(once, batches, flops=0.4, samples=16)
    assert len(twice.record.history) == 2
    dense = optin.open_model(bert)
    tokens = twice.mask.budget["tokens"]
    assert twice.anatomy.macs(tokens) <= 0.4 * dense.anatomy.macs(tokens)
    for name, kept in twice.record.kept.items():
        assert set(kept) <= set(once.record.kept[name])


def test_steps_in_memory_are_those_on_disk(tmp_path):
    from optin_cli import pipeline
    from optin_cli.data.opening import as_data
    from optin_cli.scoring.plan import ScoreSettings, make_plan
    from optin_cli.selection.settings import Request

    data, spec = tiny_text_csv(tmp_path), saved_model("bert")
    plan = make_plan(optin.open_model(spec), as_data(data), ScoreSettings(samples=16))
    *_, expected = pipeline.prune_in_steps(
        plan, Request(flops=0.4), tmp_path / "out", tmp_path / "r.h5", 2, rankings=tmp_path
    )
    found = optin.prune(spec, data, flops=0.4, samples=16, steps=2, compensate="none")
    assert found.mask.keep == expected.mask.keep
    state = optin.load(tmp_path / "out").state_dict()
    assert all(torch.equal(found.module.state_dict()[name], tensor) for name, tensor in state.items())


def test_a_vision_module_takes_its_transform_and_a_folder_of_images(tmp_path):
    from helpers.data import tiny_image_folder
    from torchvision import transforms

    vit = new_timm_vit()
    transform = transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()])
    model = optin.open_model(vit, processor=transform)
    small = optin.prune(model, tiny_image_folder(tmp_path / "images"), flops=0.6, samples=8)
    image = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(small.module(image)[:, None].float(), outputs(small, {"x": image}))
    assert small.report.params < small.report.dense_params


def test_half_precision_weights_are_computed_in_float32_and_stay_half_for_the_caller(bert, batches):
    bert.to(torch.bfloat16)
    model = optin.open_model(bert)
    assert model.dtype == torch.float32 and bert.dtype == torch.bfloat16
    small = optin.apply(bert, optin.select(optin.score(bert, batches, samples=16), flops=0.5), batches,
                        inplace=True)  # fmt: skip
    assert bert.dtype == torch.bfloat16
    assert sum(p.numel() for p in bert.parameters()) == small.report.params
