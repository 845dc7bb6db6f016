"""The estimate of a dry run: the formula, the parts that are timed, and the work of a real run, counted in FLOPs."""

from __future__ import annotations

import pytest
from helpers.data import tiny_text_csv
from helpers.flops import flop_counter
from helpers.models import shared_model

from optin_cli.data.sources import DataSpec
from optin_cli.scoring import score as stage
from optin_cli.scoring.estimate import Law, Timing, estimate_seconds
from optin_cli.scoring.plan import Plan, make_plan
from optin_cli.scoring.runner import Worker
from optin_cli.scoring.settings import ScoreSettings


def plan_for(
    name: str, method: str, folder, rows: int = 4, strata: int | None = None, samples: int = 32
) -> Plan:
    """Batches of eight; few rows, since relations grow with the square of their number."""
    settings = ScoreSettings(method=method, samples=samples, batch_size=8, rows=rows, strata=strata)
    data = tiny_text_csv(folder, samples, pairs=False)
    return make_plan(shared_model(name), DataSpec(str(data)), settings)


def test_the_law_gives_its_timings_and_is_linear_between_and_beyond():
    def seconds(tokens: float, work: float) -> float:
        return (0.5 + 2.0 * work) * (1 + 0.01 * tokens)

    timings = [
        Timing(tokens, work, seconds(tokens, work)) for tokens, work in ((10, 1.5), (10, 4.0), (40, 1.5))
    ]
    law = Law.through(*timings)
    for tokens, work in ((10, 1.5), (10, 4.0), (40, 1.5), (25, 2.0), (4096, 23.0)):
        assert law.seconds(tokens, work) == pytest.approx(seconds(tokens, work))


@pytest.mark.parametrize(
    ("more_work", "more_tokens"),
    [(Timing(10, 2.0, 6.0), Timing(10, 2.0, 6.0)), (Timing(10, 4.0, 12.0), Timing(20, 2.0, 30.0))],
)
def test_without_more_of_something_seconds_are_in_proportion_to_it(more_work, more_tokens):
    law = Law.through(Timing(10, 2.0, 6.0), more_work, more_tokens)
    assert law.seconds(30, 6.0) == pytest.approx(6.0 * 3 * 3)


def test_timings_that_scatter_make_nothing_faster():
    law = Law.through(Timing(10, 2.0, 6.0), Timing(10, 4.0, 5.0), Timing(20, 2.0, 5.0))
    assert law.seconds(100, 50.0) == 6.0


def test_a_part_of_a_batch_has_evenly_spaced_rows_of_it(tmp_path):
    batches = plan_for("bert", "fisher", tmp_path).calibration.batches
    ids, part = batches.ids(2), batches.part(2, 2)
    assert len(part) == 1 and part.ids(0) == [ids[2], ids[6]]
    assert part.tokens(0) == sum(len(part.encoded.inputs[i]["input_ids"]) for i in part.ids(0))
    assert part[0].valid is not None and int(part[0].valid.sum()) == part.tokens(0)
    assert batches.part(2, 100).ids(0) == ids and len(batches) == 4


@pytest.mark.parametrize("method", ["curvature", "ablation", "knowledge", "reference", "fisher", "flap"])
def test_what_is_timed_is_a_small_part_of_an_item(method, tmp_path):
    worker = Worker(plan_for("bert", method, tmp_path))
    for item in worker.items():
        small, large = worker.method.samples(item)
        assert 0 < small.work <= large.work <= item.work
        assert set(small.units) <= set(large.units) <= set(item.units)
        assert small.batch == item.batch and small.site == item.site


@pytest.mark.parametrize(
    ("name", "method", "more"),
    [
        pytest.param("bert", "ablation", {}, marks=pytest.mark.slow),
        pytest.param("gemma3", "curvature", {}, marks=pytest.mark.slow),
        ("bert", "curvature", {"strata": 1, "samples": 48}),
        pytest.param("gemma3", "curvature", {"strata": 1, "samples": 48}, marks=pytest.mark.slow),
        ("bert", "fisher", {}),
        ("bert", "depth", {}),
    ],
)
def test_the_estimate_is_the_work_of_the_run(name, method, more, tmp_path):
    """With a clock that counts FLOPs instead of seconds: the estimate, and what the dry run itself takes."""
    with flop_counter() as counter:
        found = estimate_seconds(
            plan_for(name, method, tmp_path, **more), clock=lambda: float(counter.get_total_flops())
        )
        spent = counter.get_total_flops()
    plan = plan_for(name, method, tmp_path, **more)
    with flop_counter() as counter:
        stage.score(plan, tmp_path / "r.h5")
        real = counter.get_total_flops()
    assert found == pytest.approx(real, rel=0.2)
    assert spent < 0.4 * real
