"""The promises every family makes, for the further ones: one test a promise, all of them in this file."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from helpers.artefacts import keep_sets
from helpers.data import tiny_audio_folder, tiny_image_folder, tiny_text_csv
from helpers.families import (
    BLOCKS,
    CNNS,
    ENCODER_DECODERS,
    HEADS,
    INNER,
    MORE_FAMILIES,
    MORE_TIMM,
    SEGMENTERS,
    TIMM_CNNS,
    WIDTH,
)
from helpers.models import saved_model, shared_model, tiny_model
from helpers.runs import examples, outputs, random_inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from optin_cli.artefacts.pruned import read_pruned
from optin_cli.data.batches import Batch, Batches
from optin_cli.data.examples import sample
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError
from optin_cli.measure import latency_table
from optin_cli.measure.evaluate import evaluate
from optin_cli.measure.inputs import default_size, dummy_inputs
from optin_cli.models.checkpoint import OpenModel, open_model
from optin_cli.models.dissect import dissect
from optin_cli.models.hidden import as_rows, hidden_of
from optin_cli.models.masking import masked, masks_from_keep
from optin_cli.models.slicing import slice_model
from optin_cli.scoring import score as scoring
from optin_cli.scoring.ablation import Ablation
from optin_cli.scoring.calibration import Calibration, block_outputs, measured_blocks
from optin_cli.scoring.curvature import curvature
from optin_cli.scoring.losses import output_change, relational_change, unit_rows
from optin_cli.scoring.plan import ScoreSettings
from optin_cli.scoring.plan import make_plan as make_scoring_plan
from optin_cli.selection.select import select
from optin_cli.surgery import apply as stage
from optin_cli.surgery.plan import make_plan
from optin_cli.surgery.settings import Compensation
from optin_cli.surgery.store import Store
from optin_cli.surgery.streams import BlockCalls
from optin_cli.surgery.sumpoint import find_sum_point

NEURONS_ALONE = {"timm-eva02", "timm-dinov3", "timm-beit", "timm-swinv2"}
SHARED = {"albert": [0], "albert-groups": [0, 2]}
POST_NORM = {"timm-post-norm", "swinv2", "timm-swinv2", "gemma2", "gemma3"}
SWINS = [name for name in MORE_FAMILIES if "swin" in name and name not in SEGMENTERS]
POSITION_BIAS = ("continuous_position_bias_mlp", "cpb_mlp")  # made once a batch: not counted as a unit's
TIMM_WIDTH = 48
# a SwiGLU keeps two thirds of mlp_ratio * width, or splits it into gates and values
NEURON_COUNTS = {**dict.fromkeys(MORE_TIMM, 2 * TIMM_WIDTH), "timm-swiglu": TIMM_WIDTH}
LAYER_SCALES = {
    "beit": ("lambda_1", "lambda_2"),
    "dinov2": ("layer_scale1.lambda1", "layer_scale2.lambda1"),
    "dinov2-swiglu": ("layer_scale1.lambda1", "layer_scale2.lambda1"),
    "dinov2-registers": ("layer_scale1.lambda1", "layer_scale2.lambda1"),
    "timm-deit3": ("ls1.gamma", "ls2.gamma"),
    "timm-registers": ("ls1.gamma", "ls2.gamma"),
    "timm-swiglu": ("ls1.gamma", "ls2.gamma"),
    "timm-eva-rope": ("gamma_1", "gamma_2"),
    "timm-eva-mixed": ("gamma_1", "gamma_2"),
    "timm-dinov3": ("gamma_1", "gamma_2"),
    "timm-beit": ("gamma_1", "gamma_2"),
}

# norms over four positions blow rounding up: in float64, as elsewhere here, nothing is left of it
DEVIATION = {"maskformer-resnet": 1e-4}

every_family = pytest.mark.parametrize("name", MORE_FAMILIES)
every_transformer = pytest.mark.parametrize(
    "name", [name for name in MORE_FAMILIES if name not in (*CNNS, *SEGMENTERS)]
)


def sliced(model: OpenModel, keep: dict[str, list[int]]) -> nn.Module:
    module = copy.deepcopy(model.module)
    slice_model(module, model.anatomy, keep)
    return module


def masked_outputs(model: OpenModel, keep: dict[str, list[int]]) -> torch.Tensor:
    with masked(model.module, model.anatomy, masks_from_keep(model.anatomy, keep)):
        return outputs(model, model.module, random_inputs(model))


def data_for(model: OpenModel, folder) -> DataSpec:
    if model.family.modality == "audio":
        transcripts = len(model.anatomy.streams) > 1
        return DataSpec(str(tiny_audio_folder(folder / "audio", transcripts=transcripts)))
    image = model.family.modality == "image"
    return DataSpec(str(tiny_image_folder(folder / "images") if image else tiny_text_csv(folder)))


def rank(model: OpenModel, folder, method: str = "magnitude"):
    settings = ScoreSettings(method=method, samples=8)
    return scoring.score(make_scoring_plan(model, data_for(model, folder), settings), folder / "r.h5")


# ---- anatomy, slicing, costs ----


@every_transformer
def test_the_sites_are_the_heads_and_neurons_of_every_block(name):
    model = shared_model(name)
    width = TIMM_WIDTH if name in MORE_TIMM else WIDTH
    neurons = NEURON_COUNTS.get(name, INNER)
    blocks = {block: {"heads": (HEADS, width // HEADS), "neurons": (neurons, 1)} for block in range(BLOCKS)}
    if name in SWINS:  # two blocks, what merges patches, two blocks of twice the width
        head = 6 if name == "timm-swin-padded" else 0
        blocks = {
            block: {"heads": (HEADS, head or w // HEADS), "neurons": (2 * w, 1)}
            for block, w in {0: WIDTH, 1: WIDTH, 3: 2 * WIDTH, 4: 2 * WIDTH}.items()
        }
    if name in SHARED:  # the sites stand in the first block of those that share a module
        blocks = dict.fromkeys(SHARED[name], blocks[0])
    if name in (*ENCODER_DECODERS, "whisper"):
        for block in range(BLOCKS, len(model.anatomy.blocks)):
            blocks[block] = {kind: blocks[0].get(kind, (HEADS, 8)) for kind in ("heads", "cross", "neurons")}
    assert [(site.name, site.units, site.width) for site in model.anatomy] == [
        (f"blocks.{block}.{kind}", *sizes)
        for block, kinds in blocks.items()
        for kind, sizes in kinds.items()
        if kind == "neurons" or name not in NEURONS_ALONE
    ]


@every_family
@examples(6)
@given(data=st.data())
def test_a_sliced_model_computes_and_costs_what_the_anatomy_says(name, data):
    model = shared_model(name)
    keep = data.draw(keep_sets(model.anatomy))
    smaller = sliced(model, keep)
    found = outputs(model, smaller, random_inputs(model))
    torch.testing.assert_close(found, masked_outputs(model, keep), rtol=0, atol=1e-5)

    after = dissect(smaller, model.family)
    kept = {site.name: len(keep.get(site.name, range(site.units))) for site in model.anatomy}
    assert {site.name: site.units for site in after} == kept
    counted, tokens = counted_macs(model, smaller)
    rest = 0.0  # of what is never pruned: the attention, where heads are left out, and what merges patches
    nothing = sliced(model, {s.name: [] for s in model.anatomy})
    if name in (*NEURONS_ALONE, *SWINS, *CNNS, *SEGMENTERS):
        rest = counted_macs(model, nothing)[0]
    assert after.macs(tokens) == pytest.approx(counted - rest, rel=0.01)
    assert model.anatomy.macs(tokens, kept) == pytest.approx(after.macs(tokens))  # before it is sliced
    assert parameters(smaller) - parameters(nothing) == sum(s.units * s.params_per_unit for s in after)
    removed = sum((site.units - kept[site.name]) * site.params_per_unit for site in model.anatomy)
    assert parameters(smaller) <= parameters(model.module) - removed
    if not is_shared(model):
        assert parameters(smaller) == parameters(model.module) - removed


def is_shared(model: OpenModel) -> bool:
    """Whether a layer is between two sites."""
    consumers = {site.consumer for site in model.anatomy}
    return any(producer.path in consumers for site in model.anatomy for producer in site.producers)


def counted_macs(model: OpenModel, module: nn.Module) -> tuple[float, int]:
    """(MACs of the blocks by torch's FLOP counter, tokens that they see) for one example."""
    shapes: list[torch.Size] = []
    handle = module.get_submodule(model.anatomy.blocks[0]).register_forward_hook(
        lambda _, __, output: shapes.append(as_rows(hidden_of(output), model.family.layout).shape)
    )
    totals = []
    for batch in (1, 3):  # what relative positions cost once a batch is not counted as a unit's
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(**random_inputs(model, batch=batch))
        flops = {path: sum(counts.values()) for path, counts in counter.get_flop_counts().items()}
        totals.append(
            sum(flops.get(f"{type(module).__name__}.{path}", 0) for path in set(model.anatomy.blocks))
        )
    handle.remove()
    return (totals[1] - totals[0]) / 4, shapes[0][1:-1].numel()


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@every_family
@pytest.mark.parametrize("kept", [[], [2]], ids=["none", "one"])
def test_sites_with_no_unit_or_one_unit_left_work(name, kept):
    model = shared_model(name)
    keep = {site.name: kept for site in model.anatomy}
    found = outputs(model, sliced(model, keep), random_inputs(model))
    # a norm behind a single neuron makes its rounding error as large as itself
    atol = 1e-3 if name in ("gemma2", "gemma3") else 1e-5
    torch.testing.assert_close(found, masked_outputs(model, keep), rtol=0, atol=atol)


@every_family
def test_each_site_changes_the_output(name):
    """Otherwise masked == sliced could hold for a mask that does nothing."""
    model = shared_model(name)
    dense = outputs(model, model.module, random_inputs(model))
    for site in model.anatomy:
        keep = {site.name: list(range(site.units // 2))}
        assert (masked_outputs(model, keep) - dense).abs().max() > 1e-4, site.name


@every_family
def test_a_skeleton_without_weights_gets_the_same_shapes(name):
    model = shared_model(name)
    keep = {site.name: list(range(0, site.units, 3)) for site in model.anatomy}
    skeleton = copy.deepcopy(model.module).to("meta")
    slice_model(skeleton, model.anatomy, keep)
    expected = {key: value.shape for key, value in sliced(model, keep).state_dict().items()}
    assert {key: value.shape for key, value in skeleton.state_dict().items()} == expected


@pytest.mark.parametrize(
    "name",
    [
        "beit",
        "dinov2",
        "dinov2-registers",
        "timm-deit-distilled",
        "timm-eva-rope",
        "swin",
        "timm-swin",
        "deberta",
        "deberta-v3",
        "modernbert",
        "albert",
        "albert-groups",
    ],
)
def test_bare_encoders_have_the_same_sites(name):
    whole = shared_model(name)
    bare = open_model(str(saved_model(name)), task="embedding", device="cpu")
    facts = [(s.name, s.units, s.macs_per_token, s.params_per_unit) for s in whole.anatomy]
    assert [(s.name, s.units, s.macs_per_token, s.params_per_unit) for s in bare.anatomy] == facts
    keep = {site.name: list(range(1, site.units, 2)) for site in bare.anatomy}
    found = outputs(bare, sliced(bare, keep), random_inputs(bare))
    torch.testing.assert_close(found, masked_outputs(bare, keep), rtol=0, atol=1e-5)


# ---- on disk, and again ----


@every_family
def test_written_models_load_and_are_pruned_again(name, tmp_path):
    dense = open_model(str(saved_model(name)))
    mask = select(rank(open_model(str(saved_model(name))), tmp_path), 0.7)
    for kept in mask.keep.values():  # which heads stay must not be the first ones by chance
        kept[:] = kept[1:] if len(kept) > 1 else kept
    inner = [site for site in dense.anatomy if site.block > 0 or name in SHARED]
    mask.keep[inner[0].name] = []  # of a transformer its heads, if it has any
    assert stage.apply(
        open_model(str(saved_model(name))), mask, tmp_path / "once"
    ).deviation <= DEVIATION.get(name, 1e-5)
    once = open_model(str(tmp_path / "once"))
    assert type(once.module) is type(dense.module)
    assert {s.name: s.units for s in once.anatomy} == {n: len(k) for n, k in mask.keep.items()}
    assert_is_masked(once, dense, mask.keep)

    (tmp_path / "second").mkdir()
    again = select(rank(once, tmp_path / "second"), 0.3)
    assert stage.apply(once, again, tmp_path / "twice").deviation <= DEVIATION.get(name, 1e-5)
    record = read_pruned(tmp_path / "twice")
    assert record.kept == {site: [mask.keep[site][i] for i in kept] for site, kept in again.keep.items()}
    assert record.dense["digest"] == dense.digest
    assert_is_masked(open_model(str(tmp_path / "twice")), dense, record.kept)


def assert_is_masked(pruned: OpenModel, dense: OpenModel, keep: dict[str, list[int]]) -> None:
    found = outputs(pruned, pruned.module, random_inputs(dense))
    torch.testing.assert_close(found, masked_outputs(dense, keep), rtol=0, atol=1e-5)


@every_family
def test_all_stages_run_and_compensation_helps(name, tmp_path):
    model, dense = open_model(str(saved_model(name))), shared_model(name)
    mask = select(rank(model, tmp_path, "mixed"), 0.5)
    plan = make_plan(model, mask, Compensation(batch_size=16), at_most=True)
    applied = stage.apply(model, mask, tmp_path / "out", plan=plan)
    assert applied.deviation <= DEVIATION.get(name, 1e-5)
    assert all(fit.after <= fit.before for fit in applied.fits)
    assert any(fit.after < 0.95 * fit.before for fit in applied.fits)
    lost = {fit.site for fit in applied.fits if "no residual" in fit.note}
    if name in POST_NORM:
        assert lost == {site.name for site in model.anatomy}
    elif "maskformer" in name:  # queries begin as zero: nothing varies in the first two sums of the decoder
        first = model.anatomy.streams[-1].first
        assert lost == {f"blocks.{first}.heads", f"blocks.{first}.cross_heads"}
    else:
        assert not lost

    pruned = open_model(str(tmp_path / "out"))
    found = sample(data_for(model, tmp_path), model.family.modality, 6, 0, reader=model.task.reader)
    told = evaluate(pruned, Batches(found, pruned.processor, 3, reader=model.task.reader), dense)
    assert told.fidelity
    inputs = dummy_inputs(pruned, 2, default_size(pruned))
    assert outputs(pruned, pruned.module, inputs).isfinite().all()


@every_family
def test_a_latency_table_adds_up(name, monkeypatch):
    """With a clock that ticks once a FLOP the sub-layers explain the pruned model exactly."""
    monkeypatch.setattr(latency_table, "call_ms", flops)
    model = shared_model(name)
    size = default_size(model)
    table = latency_table.make_table(model, 2, size, repeats=1, seconds=0.0)
    keep = {site.name: list(range(i % (site.units + 1))) for i, site in enumerate(model.anatomy)}
    module = sliced(model, keep)
    pruned = dataclasses.replace(model, module=module, anatomy=dissect(module, model.family))
    inputs = dummy_inputs(pruned, 2, size)
    with torch.inference_mode():
        expected = flops(lambda: pruned.module(**inputs))
    found = table.model_ms({site: len(kept) for site, kept in keep.items()})
    if is_shared(model):  # of a layer between two sites each has a part: together they save more than that
        assert expected * (1 - 1e-6) <= found < table.total_ms
    else:
        assert found == pytest.approx(expected, rel=1e-6)


def flops(call, device=None) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


# ---- position biases and rotations of each head ----


@pytest.mark.parametrize(
    "name",
    [
        "beit",
        "beit-shared",
        "timm-eva-mixed",
        "swin",
        "swinv2",
        "timm-swin",
        "deberta",
        "deberta-v2",
        "deberta-v3",
    ],
)
def test_what_a_head_adds_to_its_scores_stays_its_own(name):
    """Sliced twice to one head, by way of two, each head must still find its own bias or rotation."""
    model = shared_model(name)
    for head in range(1, HEADS):
        keep = {"blocks.1.heads": [head]}
        module = sliced(model, {"blocks.1.heads": [0, head]})
        slice_model(module, dissect(module, model.family), {"blocks.1.heads": [1]})
        found = outputs(model, module, random_inputs(model))
        torch.testing.assert_close(found, masked_outputs(model, keep), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("deberta", {"pos_att_type": ["c2p"]}),
        ("deberta", {"pos_att_type": ["p2c"]}),
        ("deberta", {"relative_attention": False, "pos_att_type": []}),
        ("deberta", {"max_relative_positions": 4}),
        ("deberta-v2", {"pos_att_type": ["p2c"]}),
        ("deberta-v2", {"relative_attention": False, "pos_att_type": []}),
        ("deberta-v2", {"conv_kernel_size": 3, "conv_act": "gelu"}),
    ],
)
def test_variants_of_deberta(name, settings, tmp_path):
    model = open_model(str(tiny_model(name, tmp_path / "m", **settings)), device="cpu")
    keep = {site.name: list(range(site.block, site.units, 2)) for site in model.anatomy}
    keep["blocks.1.heads"] = []
    smaller = sliced(model, keep)
    found = outputs(model, smaller, random_inputs(model))
    torch.testing.assert_close(found, masked_outputs(model, keep), rtol=0, atol=1e-5)
    counted, tokens = counted_macs(model, smaller)
    macs = dissect(smaller, model.family).macs(tokens)
    if "max_relative_positions" in settings:  # fewer than twice as many as tokens
        assert counted < macs < 1.1 * counted
    else:
        assert macs == pytest.approx(counted, rel=0.01)
    calibration = calibrate(model, tmp_path)
    trajectory, output = Ablation(calibration, 0).score(model.anatomy["blocks.0.heads"], np.arange(HEADS))
    for unit in range(HEADS):
        expected, changed = change(calibration, model.anatomy["blocks.0.heads"], unit, 0.0)
        np.testing.assert_allclose(trajectory[unit], expected, rtol=1e-3, atol=1e-9)
        assert output[unit] == pytest.approx(changed, rel=1e-3, abs=1e-9)


def test_heads_that_talk_to_each_other_stay(tmp_path):
    model = open_model(str(tiny_model("deberta", tmp_path / "m", talking_head=True)), device="cpu")
    assert {site.kind for site in model.anatomy} == {"neurons"}


def test_what_runs_between_blocks_is_no_stream_to_refit(tmp_path):
    """DeBERTa's convolution stands between the first two blocks."""
    model = open_model(str(tiny_model("deberta-v2", tmp_path / "m", conv_kernel_size=3)), device="cpu")
    mask = select(rank(model, tmp_path), 0.5)
    plan = make_plan(model, mask, Compensation(batch_size=16), at_most=True)
    with pytest.raises(InputError, match=r"between its blocks(.|\n)*--compensate none"):
        stage.apply(model, mask, tmp_path / "out", plan=plan)
    assert stage.apply(model, mask, tmp_path / "out").deviation <= 1e-5


# ---- layer scales ----


@pytest.mark.parametrize("name", LAYER_SCALES)
def test_a_layer_scale_is_the_gain_of_the_sum_point(name):
    model = shared_model(name)
    path = model.anatomy.blocks[1]
    block = model.module.get_submodule(path)
    inputs = random_inputs(model)
    with Store(1 << 30) as store:
        calls = BlockCalls(model, store)
        arguments = calls.arguments(1, 0, calls.record(0, Batch(inputs, None, [0, 1, 2])))
    for site in model.anatomy.in_block(1):
        scale = block.get_parameter(LAYER_SCALES[name][site.kind == "neurons"]).detach()
        assert float(scale.std()) > 0.01
        point = find_sum_point(block, site.consumer.removeprefix(f"{path}."), arguments)
        assert point.found
        torch.testing.assert_close(point.gain.float(), scale, rtol=1e-4, atol=1e-6)


# ---- engines against brute force ----

MEASURED = [
    "gpt2",
    "llama",
    "opt",
    "gpt-neox",
    "t5",
    "whisper",
    "whisper-classifier",
    "whisper-all-blocks",
    "beit",
    "beit-shared",
    "dinov2-swiglu",
    "clip-text-projected",
    "deberta",
    "deberta-v2",
    "deberta-v3",
    "modernbert",
    "timm-eva-mixed",
    "timm-eva02",
    *SWINS,
    *TIMM_CNNS,
    "segformer",
]


def calibrate(model: OpenModel, folder, rows: int = 24) -> Calibration:
    found = sample(data_for(model, folder), model.family.modality, 12, 0, reader=model.task.reader)
    return Calibration(model, Batches(found, model.processor, 6, reader=model.task.reader), rows, 4.0, seed=0)


def forward(calibration: Calibration, masks: dict[str, torch.Tensor]) -> tuple[dict, torch.Tensor]:
    """Unit rows of every block's feature, and the output, of one full forward of batch 0 under `masks`."""
    model, batch = calibration.model, calibration.batch(0)
    features: dict[int, torch.Tensor] = {}
    with (
        torch.inference_mode(),
        block_outputs(model, features),
        masked(model.module, model.anatomy, masks),
    ):
        output = model.output(batch.inputs)
    rows = calibration.feature_rows(0, [batch], {z: [f.shape[1]] for z, f in features.items()})
    return {z: unit_rows(f.flatten(0, 1)[rows[z][0]]) for z, f in features.items()}, output


def change(calibration: Calibration, site, unit: int, kept: float) -> tuple[list[float], float]:
    """Trajectory and output terms by full forwards, when `kept` of a unit stays."""
    mask = torch.ones(site.units)
    mask[unit] = kept
    dense, y = forward(calibration, {})
    variant, y_without = forward(calibration, {site.name: mask})
    task = calibration.model.task
    weights = calibration.model.row_weights(calibration.batch(0).inputs, y)
    settings = {"temperature": calibration.temperature, "term": task.term}
    columns = measured_blocks(site, len(calibration.model.anatomy.blocks))
    trajectory = [float(relational_change(dense[z], variant[z][None])) for z in columns]
    return trajectory, float(output_change(y, y_without[None], weights, **settings) / weights.sum())


@pytest.mark.parametrize("name", [*MEASURED, "mask2former-swin"])
def test_ablation_equals_a_full_forward(name, tmp_path):
    calibration = calibrate(shared_model(name), tmp_path)
    ablation = Ablation(calibration, 0)
    for site in calibration.model.anatomy:
        units = np.arange(site.units)[:: max(1, site.units // 4)]
        trajectory, output = ablation.score(site, units)
        for row, unit in enumerate(units):
            expected, changed = change(calibration, site, unit, 0.0)
            np.testing.assert_allclose(trajectory[row], expected, rtol=1e-3, atol=1e-9)
            assert output[row] == pytest.approx(changed, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("name", MEASURED)
def test_curvature_estimates_the_change_of_a_small_step(name, tmp_path):
    """Oracle: full forwards with a small part of a unit gone, where the second-order term is all there is."""
    calibration = calibrate(shared_model(name), tmp_path)
    count, step = 100, 0.02
    found = curvature(calibration, 0, list(calibration.model.anatomy), range(count))
    examples = sampled_examples(calibration)
    dense, _ = forward(calibration, {})
    for site in calibration.model.anatomy:
        for unit in np.arange(site.units)[:: max(1, site.units // 4)]:
            mask = torch.ones(site.units)
            mask[unit] = 1 - step
            variant, _ = forward(calibration, {site.name: mask})
            columns = measured_blocks(site, len(calibration.model.anatomy.blocks))
            exact = [across_examples(dense[z], variant[z], examples[z]) / step**2 for z in columns]
            # some units of a tiny model do next to nothing: a step of theirs is lost in rounding
            np.testing.assert_allclose(
                found.trajectory[site.name][unit] / count, exact, rtol=0.35, atol=1e-10
            )
            output = change(calibration, site, unit, 1 - step)[1] / step**2
            assert found.output[site.name][unit] / count == pytest.approx(output, rel=0.35, abs=1e-10)


def sampled_examples(calibration: Calibration) -> dict[int, torch.Tensor]:
    """Which example each sampled row of batch 0 is a position of, for every block."""
    batch = calibration.batch(0)
    features: dict[int, torch.Tensor] = {}
    with torch.inference_mode(), block_outputs(calibration.model, features):
        calibration.model.output(batch.inputs)
    rows = calibration.feature_rows(0, [batch], {z: [f.shape[1]] for z, f in features.items()})
    return {z: rows[z][0] // f.shape[1] for z, f in features.items()}


def across_examples(dense: torch.Tensor, variant: torch.Tensor, examples: torch.Tensor) -> float:
    """||E F^T + F E^T||^2 / K^2 less the products that two rows of one example share: what probes estimate."""
    product = (variant - dense) @ dense.t()  # (K, K)
    same = examples[:, None] == examples[None, :]
    total = 2 * product.square().sum() + 2 * (product * product.t())[same].sum()
    return float(total) / len(dense) ** 2
