"""Int8: what is measured in torch is what onnxruntime computes, and the layers that cost most stay in float32."""

from __future__ import annotations

import pytest
import torch
from helpers.cli import run
from helpers.data import tiny_text_csv
from helpers.exported import checks_of, emptied, exported, others
from helpers.lazy import needs_onnx
from helpers.models import opened, saved_model
from torch import nn

from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError, UsageError
from optin_cli.runtimes import quantise
from optin_cli.runtimes.checks import Checks, open_checks
from optin_cli.runtimes.export import ExportSettings, export
from optin_cli.runtimes.opening import open_exported
from optin_cli.runtimes.registry import TARGETS

needs_onnx()
ONNX = TARGETS["onnx"]


@pytest.fixture(scope="module")
def written():
    """(model without heads in a block and neurons in another, its float32 file, the layers in it, two batches)."""
    model, made = exported("bert", "onnx")
    return model, made.path, quantise.layers_in(made.path), checks_of(model).batches


def linears(model):
    return {name for name, part in model.module.named_modules() if isinstance(part, nn.Linear)}


def test_layers_have_the_paths_of_their_modules(written):
    model, _, layers, _ = written
    found = {layer.path for layer in layers}
    assert {"bert.encoder.layer.1.attention.self.query", "classifier", "bert.pooler.dense"} <= found
    assert not any("layer.0.attention" in path for path in found)  # it has no heads
    assert not any("layer.1.intermediate" in path for path in found)  # nor this neurons
    for layer in layers:
        if layer.path in linears(model):
            assert layer.weights == model.module.get_submodule(layer.path).weight.numel()


@pytest.mark.parametrize("path", ["bert.encoder.layer.0.output.dense", "classifier"])
def test_a_layer_in_torch_computes_what_onnxruntime_computes(written, tmp_path, path):
    """Only this one is int8: the difference from float32 is the same to a few per cent of itself."""
    model, source, layers, batches = written
    quantise.quantise(source, tmp_path / "q.onnx", layers, [x.path for x in layers if x.path != path])
    session = ONNX.load(tmp_path / "q.onnx", ["logits"])
    moved = 0.0
    for inputs in batches:
        with torch.no_grad():
            plain = model.module(**inputs).logits
            with quantise.int8(model.module.get_submodule(path)):
                ours = model.module(**inputs).logits
        (theirs,) = session(inputs)
        assert float((ours - theirs).abs().max()) < 0.1 * float((ours - plain).abs().max()) + 1e-5
        moved = max(moved, float((ours - plain).abs().max()))
    assert moved > 1e-4
    assert torch.equal(model.module(**inputs).logits, plain)  # and nothing of it is left


def test_without_any_layer_in_int8_the_file_is_the_float_one(written, tmp_path):
    """An empty list of nodes means all of them to the tool that writes it."""
    model, source, layers, batches = written
    quantise.quantise(source, tmp_path / "q.onnx", layers, [layer.path for layer in layers])
    (found,) = ONNX.load(tmp_path / "q.onnx", ["logits"])(batches[0])
    assert float((found - model.module(**batches[0]).logits).abs().max()) < 1e-4


def test_activations_are_rounded_as_the_operator_is_defined():
    """DynamicQuantizeLinear: zero is among the 256 numbers."""
    x = torch.tensor([[-1.0, 0.0, 0.5], [3.0, 2.0, -0.25]])
    found = quantise.rounded_tensor(x)
    assert float(found[0, 1]) == 0
    assert float((found - x).abs().max()) <= 4 / 255 / 2 + 1e-6
    assert len({round(float(v) / (4 / 255), 3) % 1 for v in found.flatten()}) <= 2  # multiples of one step
    assert quantise.rounded_tensor(torch.zeros(2, 0)).shape == (2, 0)


def test_products_of_two_weights_fit_into_sixteen_bits():
    """What kernels without VNNI add up before they widen it."""
    weight = torch.randn(5, 64) * torch.logspace(-3, 3, 5)[:, None]
    steps = quantise.rounded_weights(weight, 1) / (weight.abs().amax(1, keepdim=True) / 64)
    assert float((steps - steps.round()).abs().max()) < 1e-3
    assert 2 * 255 * float(steps.abs().max()) <= 2**15


def test_layers_stay_in_float_until_the_error_is_small(written):
    """Against brute force: errors one at a time, largest for their size first."""
    model, _, layers, batches = written
    loose, tight = (quantise.choose(model, layers, batches, limit) for limit in (10.0, 0.0))
    assert loose.float_layers == [] and set(tight.float_layers) == set(tight.errors)
    total = sum(loose.errors.values())
    half = quantise.choose(model, layers, batches, (total / 2) ** 0.5)
    left = [error for path, error in half.errors.items() if path not in half.float_layers]
    assert sum(left) <= total / 2 < sum(left) + half.errors[half.float_layers[-1]]
    sizes = {layer.path: layer.weights for layer in layers}
    worth = {path: error / sizes[path] for path, error in half.errors.items()}
    assert min(worth[p] for p in half.float_layers) >= max(
        w for p, w in worth.items() if p not in half.float_layers
    )


def test_a_layer_with_a_few_large_inputs_is_found(written):
    model, _, layers, batches = written
    path = "bert.encoder.layer.0.output.dense"
    part = model.module.get_submodule(path)
    handle = part.register_forward_pre_hook(lambda _, given: given[0].index_fill(-1, torch.tensor([0]), 1e3))
    before = part.weight[:, 0].clone()
    part.weight.data[:, 0] = 0  # the large number counts nothing
    try:
        found = quantise.choose(model, layers, batches, 0.3)
        assert max(found.errors, key=found.errors.__getitem__) == path
        assert path in found.float_layers
    finally:
        handle.remove()
        part.weight.data[:, 0] = before


# ---- the whole of it ----


def test_an_int8_file_agrees_and_says_how_much(tmp_path):
    model, data = opened(saved_model("bert", blocks=1)), DataSpec(str(tiny_text_csv(tmp_path)))
    made = export(
        model,
        ExportSettings("onnx", int8=True, max_error=0.2),
        tmp_path / "m",
        lambda plain: open_checks(plain, data),
    )
    facts = made.facts
    assert made.path.name == "model_qint8_avx512_vnni.onnx" and facts["weight_bits"] == 7
    assert set(facts["agreement"]) == {"agreement", "kl"} and facts["examples"] > 8
    assert 50 < facts["agreement"]["agreement"] <= 100 and facts["agreement"]["kl"] < 0.1
    assert "tolerance" not in facts and facts["deviation"] > 1e-4
    left = sum(e for path, e in facts["layer_errors"].items() if path not in facts["float_layers"])
    assert left <= 0.2**2
    found = open_exported(str(made.path))
    assert found.dtype_name == "int8"


@pytest.mark.slow
def test_openvino_quantises_too(tmp_path):
    openvino = pytest.importorskip("openvino", reason="needs the extra openvino")
    pytest.importorskip("nncf", reason="needs the extra openvino")
    model, data = opened(emptied("bert")), DataSpec(str(tiny_text_csv(tmp_path)))
    settings = ExportSettings("openvino", int8=True, max_error=0.3)
    made = export(model, settings, tmp_path / "m", lambda plain: open_checks(plain, data))
    facts = made.facts
    assert made.path.name == "openvino_model_qint8_quantized.xml" and facts["weight_bits"] == 7
    assert (
        1e-4 < facts["error"] <= 0.3 and facts["agreement"]["agreement"] > 50 and "nncf" in facts["versions"]
    )
    found = open_exported(str(made.path))
    inputs = others(model)[0]
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    moved = (found.output(inputs) - model.output(inputs)).abs().max()
    assert found.dtype_name == "int8" and 1e-4 < moved < 0.5
    bits = [one.get_element_type().to_string() for one in openvino.Core().read_model(made.path).get_ops()
            if one.get_type_name() == "Constant" and len(one.shape) == 2]  # fmt: skip
    weighted = [name for name, part in model.module.named_modules()
                if isinstance(part, nn.Linear | nn.Embedding) and part.weight.numel()]  # fmt: skip
    assert bits.count("i8") == len(set(weighted) - set(facts["float_layers"])) > 10


@pytest.mark.parametrize("allowed", [0.0, 0.3, 1.0, 2.5, 9.0])
def test_the_fewest_layers_stay_in_float(allowed):
    """Against brute force, for errors that fall as more layers stay in float."""
    errors = [5.0, 2.5, 2.4, 1.0, 0.5, 0.4, 0.2]
    enough = [count for count, error in enumerate(errors) if error <= allowed]
    assert quantise.fewest(6, allowed, errors.__getitem__) == min(enough, default=6)


def test_noise_is_nothing_to_choose_by(tmp_path):
    model = opened(saved_model("bert"))
    with pytest.raises(UsageError, match="chosen on real examples"):
        export(model, ExportSettings("onnx", int8=True), tmp_path / "m", checks_of)
    assert not (tmp_path / "m").exists()


def test_convolutions_are_refused():
    model = opened(saved_model("timm-resnet"))
    layers = [quantise.Layer("fc", "node", 100)]
    with pytest.raises(InputError, match="are in convolutions"):
        quantise.check_worthwhile(model, layers)
    quantise.check_worthwhile(opened(saved_model("timm-vit")), [quantise.Layer("fc", "node", 100_000)])


def test_missing_data_is_asked_for(tmp_path):
    assert Checks([], "noise", None).count == 0
    message = run(
        "export", saved_model("timm-vit"), "--to", "onnx", "--int8", "-o", tmp_path / "m", code=2
    ).stderr
    assert "give --data DATA" in message
