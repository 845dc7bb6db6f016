"""Scoring within a given memory, and after memory has run out."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from helpers.cli import run
from helpers.data import tiny_image_folder, tiny_text_csv
from helpers.models import saved_model, shared_model
from helpers.runs import examples
from hypothesis import given
from hypothesis import strategies as st

from optin_cli.artefacts.ranking import read_ranking
from optin_cli.data.batches import Batch
from optin_cli.data.sources import DataSpec
from optin_cli.errors import InputError
from optin_cli.execution import memory as room
from optin_cli.execution.peak_memory import LiveStorages
from optin_cli.execution.replay import Replay
from optin_cli.scoring import graphs
from optin_cli.scoring import score as stage
from optin_cli.scoring.graphs import in_pieces
from optin_cli.scoring.losses import draw_signs
from optin_cli.scoring.methods import ablation, curvature
from optin_cli.scoring.plan import ScoreSettings, make_plan

SMALL = ScoreSettings(samples=12, batch_size=6, rows=24, probes=3)


def plan_for(folder, name="bert", head="classifier", memory=None, **changes):
    data = folder / "data"
    if not data.exists():
        tiny_image_folder(data) if name == "vit" else tiny_text_csv(data)
    settings = dataclasses.replace(SMALL, **changes)
    return make_plan(shared_model(name, head), DataSpec(str(data)), settings, memory)


def probed(plan, index=1):
    return curvature.curvature(plan.calibration, index, list(plan.model.anatomy), range(3), sketched=2)


def assert_close(one, two, **tolerance):
    for part in ("trajectory", "output", "trajectory_rows", "output_rows"):
        for name, expected in getattr(one, part).items():
            scale = np.abs(expected).max()
            np.testing.assert_allclose(getattr(two, part)[name] / scale, expected / scale, **tolerance)


@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
@pytest.mark.parametrize("memory", [None, 1 << 21])
def test_probes_that_share_a_backward_pass_find_what_they_find_alone(name, memory, tmp_path, monkeypatch):
    """What a GPU does to be busy, here on a CPU: a graph with a copy of the piece for each probe."""
    plan = plan_for(tmp_path, name, memory=memory, probes=3)
    expected, sizes = probed(plan), []

    def record(model, piece, sites):
        sizes.append(len(piece))
        return graphs.record_graph(model, piece, sites)

    monkeypatch.setattr(curvature, "record_graph", record)
    monkeypatch.setattr(curvature, "_WORK_PER_CALL", {"cpu": 1 << 60})
    found = probed(plan)
    assert_close(found, expected, rtol=1e-3, atol=1e-4)
    if memory is None:
        assert sum(sizes) == 3 * len(plan.calibration.batches.ids(1))


def test_a_backward_pass_has_as_many_probes_as_it_has_work_and_memory_for(tmp_path, monkeypatch):
    calibration = plan_for(tmp_path).calibration
    (piece,) = calibration.batch(0).split(1 << 13)
    one = piece.slots * curvature._block_weights(calibration)
    for share, slots, probes, expected in (
        (0.5, None, 8, 1), (3.9, None, 8, 2), (4.0, None, 8, 4), (99, None, 8, 8), (4.0, None, 3, 3), (2.0, None, 3, 1),
        (99, 5 * piece.slots, 8, 4), (99, piece.slots // 2, 8, 1),
    ):  # fmt: skip
        monkeypatch.setattr(curvature, "_WORK_PER_CALL", {"cpu": int(share * one)})
        calibration.graph_slots = slots
        assert curvature._copies(calibration, piece, piece.slots, probes) == expected
    monkeypatch.setattr(curvature, "_WORK_PER_CALL", {"cuda": 1 << 60})
    calibration.graph_slots = None
    assert curvature._copies(calibration, piece, piece.slots, 8) == 1


def test_threads_draw_what_one_after_the_other_draws():
    found = []
    for where in ("cpu", "cuda"):
        generators = [torch.Generator().manual_seed(seed) for seed in range(20)]
        with curvature._drawn(generators, partial(draw_signs, [1000]), torch.device(where)) as drawn:
            found.append(list(drawn))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(found[0][0], found[0][1])


@examples(60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 40), st.integers(1, 60))
def test_a_piece_holds_at_most_so_many_slots(lengths, overhead, most):
    lengths = sorted(lengths)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    batch = Batch({"input_ids": mask.long()}, mask, list(range(len(lengths))))
    pieces = batch.split(overhead, most)
    assert [i for piece in pieces for i in piece.example_ids] == batch.example_ids
    for piece in pieces:
        assert piece.slots <= most or len(piece) == 1
        assert piece.slots == len(piece) * max(lengths[i] for i in piece.example_ids)
    assert len(batch.split(overhead, 10**6)) == len(batch.split(overhead))


def test_images_and_text_padded_on_the_left_are_cut_between_examples():
    images = Batch({"x": torch.zeros(5, 3, 8, 8)}, None, list(range(5)))
    assert [len(p) for p in images.split(32)] == [5]
    assert sorted(len(p) for p in images.split(32, 2)) == [1, 2, 2]
    mask = torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 1]]).bool()
    left = Batch({"input_ids": mask.long()}, mask, [0, 1, 2])
    assert [tuple(p.inputs["input_ids"].shape) for p in left.split(0)] == [(3, 3)]
    assert [tuple(p.inputs["input_ids"].shape) for p in left.split(0, 3)] == [(1, 3)] * 3


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("bert", "classifier"),
        ("bert", "tagger"),
        pytest.param("roberta", "reader", marks=pytest.mark.slow),
        ("vit", "classifier"),
    ],
)
def test_curvature_does_not_depend_on_how_a_batch_is_cut(name, head, tmp_path):
    found = []
    for slots in (10**6, 2 if name == "vit" else 60, 1):
        plan = plan_for(tmp_path, name, head)
        plan.calibration.graph_slots = slots
        found.append(probed(plan))
    pieces = len(plan.calibration.pieces(1, plan.calibration.graph_slots))
    assert pieces == 6
    for other in found[1:]:
        assert_close(found[0], other, rtol=0, atol=2e-5)


def test_ablation_does_not_depend_on_how_many_variants_share_a_call(tmp_path):
    found = []
    for memory in (None, 1):
        plan = plan_for(tmp_path, memory=memory)
        engine = ablation.Ablation(plan.calibration, 0)
        assert (engine.step == 1) == (memory == 1)
        site = plan.model.anatomy["blocks.0.neurons"]
        found.append(engine.score(site, np.arange(site.units)))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-4)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-3)


def peak_of(work) -> int:
    with LiveStorages() as watch:
        work()
    return watch.peak


@pytest.mark.parametrize("share", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_curvature_stays_within_its_memory(share, tmp_path):
    plan = plan_for(tmp_path)
    free = peak_of(lambda: probed(plan))
    bound = plan_for(tmp_path, memory=free // share)
    assert peak_of(lambda: probed(bound)) <= free // share
    assert bound.calibration.graph_slots < plan.calibration.graph_slots


def test_seeds_that_wait_beside_the_graph_leave_it_less_room(tmp_path):
    slots = []
    for beside in (0, 64):
        calibration = plan_for(tmp_path, memory=2**22).calibration
        in_pieces(calibration, 1, list(calibration.model.anatomy), len, beside=beside)
        slots.append(calibration.graph_slots)
    # 64 times 24 rows of three features of 32 float32
    assert slots[0] > slots[1]
    assert 64 * 24 * 3 * 32 * 4 < 2**22


def test_ablation_stays_within_its_memory(tmp_path):
    def work(plan):
        site = plan.model.anatomy["blocks.0.neurons"]
        engine = ablation.Ablation(plan.calibration, 0)
        engine.score(site, np.arange(site.units))
        return engine

    free = peak_of(lambda: work(plan_for(tmp_path)))
    bound = plan_for(tmp_path, memory=free // 2)
    assert peak_of(lambda: work(bound)) <= free // 2
    assert 1 < work(bound).step < work(plan_for(tmp_path)).step


def test_less_than_one_example_needs_is_said_once(tmp_path, caplog):
    with caplog.at_level("WARNING", logger="optin"):
        for method in ("curvature", "ablation"):
            plan = plan_for(tmp_path, memory=1, method=method, samples=4, batch_size=2, probes=1)
            stage.score(plan, tmp_path / f"{method}.h5")
    told = [text.split(" alone")[0] for text in caplog.messages if " alone" in text]
    assert told == ["one example", "one variant"]


def out_of_memory_above(monkeypatch, module, name, fits):
    """Replace a function by one that runs out of memory unless `fits(arguments)`."""
    real = getattr(module, name)

    def limited(*args, **kwargs):
        if not fits(*args):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, limited)


def test_curvature_halves_its_pieces_when_memory_runs_out(tmp_path, monkeypatch, caplog):
    whole = probed(plan_for(tmp_path))
    plan, told = plan_for(tmp_path), []
    out_of_memory_above(monkeypatch, curvature, "record_graph", lambda _, piece, __: len(piece) <= 2)
    with caplog.at_level("INFO", logger="optin"):
        found = curvature.curvature(
            plan.calibration, 1, list(plan.model.anatomy), range(3), sketched=2, on_probe=told.append
        )
    assert "out of memory: going on with" in caplog.text
    assert_close(whole, found, rtol=0, atol=2e-5)
    assert sum(told) == 3
    caplog.clear()
    probed(plan, 0)  # what was learned holds for the next batch
    assert "out of memory" not in caplog.text


def test_progress_is_told_once_though_work_is_done_twice(tmp_path, monkeypatch):
    plan, told = plan_for(tmp_path), []
    calls, pieces = iter(range(100)), len(plan.calibration.pieces(1))
    monkeypatch.setattr(curvature, "_PROBES_AT_ONCE", 1)
    # the second of three probes runs out of memory, after the first has been told
    out_of_memory_above(monkeypatch, curvature, "record_graph", lambda *_: next(calls) != pieces)
    curvature.curvature(plan.calibration, 1, list(plan.model.anatomy), range(3), on_probe=told.append)
    assert told == [1, 1, 1]


def test_one_example_that_does_not_fit_is_an_input_error(tmp_path, monkeypatch):
    out_of_memory_above(monkeypatch, curvature, "record_graph", lambda *_: False)
    with pytest.raises(InputError, match=r"even with one example at a time(.|\n)*max_length"):
        stage.score(plan_for(tmp_path, method="curvature"), tmp_path / "r.h5")


def test_one_variant_that_does_not_fit_is_an_input_error_and_loses_nothing(tmp_path, monkeypatch):
    plan = plan_for(tmp_path, method="ablation")
    first = plan.calibration.batches.ids(0)
    with monkeypatch.context() as patch:
        out_of_memory_above(patch, Replay, "run", lambda replay, *_: replay.piece.example_ids[0] in first)
        with pytest.raises(InputError, match=r"batch 1 .*one unit removed(.|\n)*batch_size"):
            stage.score(plan, tmp_path / "r.h5")
    items = len(list(plan.calibration.model.anatomy))  # of each site one, whole sublayers included
    assert len(list((tmp_path / ".r.h5.partial").glob("*.npz"))) == items


def test_ablation_goes_on_with_fewer_variants(tmp_path, monkeypatch, caplog):
    plan = plan_for(tmp_path)
    site = plan.model.anatomy["blocks.1.neurons"]
    whole = ablation.Ablation(plan.calibration, 0).score(site, np.arange(site.units))
    out_of_memory_above(monkeypatch, Replay, "run", lambda _, __, units, *___: len(units) <= 3)
    with caplog.at_level("INFO", logger="optin"):
        found = ablation.Ablation(plan.calibration, 0).score(site, np.arange(site.units))
    assert "variants in a call" in caplog.text
    np.testing.assert_allclose(found[0], whole[0], rtol=1e-4)


def test_a_batch_whose_dense_pass_does_not_fit_is_an_input_error(tmp_path, monkeypatch):
    out_of_memory_above(monkeypatch, ablation, "Replay", lambda *_: False)
    with pytest.raises(InputError, match="batch 0 does not fit"):
        ablation.Ablation(plan_for(tmp_path).calibration, 0)


@pytest.mark.parametrize(
    ("error", "ran_out"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (MemoryError(), False),
    ],
)
def test_what_counts_as_out_of_memory(error, ran_out):
    assert room.ran_out(error) is ran_out


def test_other_errors_are_not_taken_for_memory(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(curvature, "record_graph", broken)
    with pytest.raises(RuntimeError, match="something else"):
        probed(plan_for(tmp_path))


def test_the_default_is_a_share_of_what_is_free(monkeypatch, tmp_path):
    monkeypatch.setattr(room, "_free_ram", lambda: 1000)
    assert plan_for(tmp_path).calibration.limit == 500
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert plan_for(tmp_path).calibration.limit == 125
    assert plan_for(tmp_path, memory=77).calibration.limit == 77


def test_a_gpus_default_is_a_share_of_what_its_driver_says_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (900, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 150)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 50)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(room, "_free_ram", lambda: pytest.fail("main memory was asked"))
    gpu = torch.device("cuda", 0)
    assert room.free_bytes([gpu]) == 800
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # two of them on one of the two GPUs
    assert room.free_bytes([gpu]) == 400


def test_a_container_has_what_it_may_use(monkeypatch, tmp_path):
    (tmp_path / "group/inner").mkdir(parents=True)
    (tmp_path / "group/memory.max").write_text("4096\n")
    (tmp_path / "group/inner/memory.max").write_text("max\n")
    monkeypatch.setattr(room, "_GROUPS", tmp_path)
    monkeypatch.setattr(room, "_own_group", lambda: "group/inner")
    assert room._free_ram() == 4096


@pytest.mark.parametrize(
    ("limit", "each", "steps"),
    [(100, 10, 8), (80, 10, 8), (79, 10, 4), (10, 10, 1), (9, 10, 1), (-5, 10, 1), (5, 0, 4)],
)
def test_steps_are_powers_of_two(limit, each, steps):
    assert room.whole_steps(limit, each) == steps


def test_the_command_takes_sizes(tmp_path):
    csv = tiny_text_csv(tmp_path)

    def scored(memory, code=0):
        command = ["score", saved_model("bert"), "--data", csv, "-o", tmp_path / "r.h5", "--samples", "8"]
        command += ["--batch-size", "4", "--memory", memory, "-q"]
        return run(*command, code=code)

    assert "--memory 4GiB" in " ".join(scored("much", code=2).stderr.split())
    scored("200KiB")
    before = read_ranking(tmp_path / "r.h5").created
    scored("4GB")  # how much memory there is does not make it another ranking
    assert read_ranking(tmp_path / "r.h5").created == before
