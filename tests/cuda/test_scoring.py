"""Every engine on a GPU against the same engine on the CPU; memory limits; running out of memory."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from helpers.lazy import Lazy
from helpers.memory import pixels, words
from helpers.models import saved_model, tiny_model

from optin_cli.errors import InputError
from optin_cli.execution.memory import free_bytes
from optin_cli.execution.precision import exact_convolutions
from optin_cli.loading.checkpoint import OpenModel, open_model
from optin_cli.scoring.calibration import Calibration
from optin_cli.scoring.methods.ablation import Ablation
from optin_cli.scoring.methods.curvature import curvature
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.scoring.score import score

stats = Lazy("scipy.stats")

pytestmark = pytest.mark.cuda

SETTINGS = {"samples": 12, "batch_size": 6, "rows": 48}
CLOSE = 1e-3
"""Of a site's largest score: what another order of sums may change."""
ROUNDED = 1e-2
"""The same of squared gradients whose products were rounded to TF32: 2^-11 an operand, block after block."""


def opened(name: str, device: str, dtype: str = "float32", head: str = "classifier") -> OpenModel:
    return open_model(str(saved_model(name, head)), device=device, dtype=dtype)


def ranked(model: OpenModel, folder, **settings):
    plan = make_plan(model, words(12, 20), ScoreSettings(**{**SETTINGS, **settings}))
    return score(plan, folder / f"{model.device.type}-{model.dtype}.h5")


def assert_same_scores(one, two, close: float = CLOSE) -> None:
    for ours, theirs in zip(one.sites, two.sites, strict=True):
        scale = np.abs(theirs.score).max()
        np.testing.assert_allclose(ours.score / scale, theirs.score / scale, rtol=0, atol=close)


@pytest.fixture
def exact(monkeypatch):
    """Probes in float32, as on a CPU."""
    for module in ("scoring.graphs", "execution.replay"):
        monkeypatch.setattr(f"optin_cli.{module}.reduced_products", lambda *_: contextlib.nullcontext())


@pytest.mark.parametrize(
    "method",
    [
        "curvature",
        "ablation",
        "mixed",
        "fisher",
        "knowledge",
        "reference",
        "flap",
        "wanda-sp",
        "depth",
        "magnitude",
        "random",
    ],
)
def test_every_method_scores_like_on_the_cpu(method, device, tmp_path, exact):
    found = [ranked(opened("bert", where), tmp_path, method=method, probes=4) for where in (device, "cpu")]
    assert_same_scores(*found)


@pytest.mark.parametrize("method", ["curvature", "mixed"])
def test_rounded_probes_change_little(method, device, tmp_path):
    found = [ranked(opened("bert", where), tmp_path, method=method, probes=4) for where in (device, "cpu")]
    assert_same_scores(*found, ROUNDED)


@pytest.mark.parametrize("name", ["roberta", "gpt2", "llama", "qwen3", "t5"])
@pytest.mark.parametrize("method", ["curvature", "ablation"])
def test_other_architectures_score_like_on_the_cpu(name, method, device, tmp_path, exact):
    found = [ranked(opened(name, where), tmp_path, method=method) for where in (device, "cpu")]
    assert_same_scores(*found)


@pytest.mark.parametrize("name", ["vit", "swin", "timm-resnet"])
def test_images_score_like_on_the_cpu(name, device, exact):
    """Convolutions too: without TF32, whose rounding would drown what one channel changes."""
    found = []
    for where in (device, "cpu"):
        model = opened(name, where)
        calibration = Calibration(model, pixels(model, 6), 48, 4.0, seed=0)
        sites = list(model.anatomy)[:4]
        with exact_convolutions():
            probed = curvature(calibration, 0, sites, range(2))
            exact = Ablation(calibration, 0)
            scores = [exact.score(site, np.arange(min(site.units, 8))) for site in sites]
        found.append([(*two, probed.output[s.name]) for two, s in zip(scores, sites, strict=True)])
    for ours, theirs in zip(*found, strict=True):
        for one, two in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, two, rtol=0.02, atol=CLOSE * np.abs(two).max())


def test_reduced_products_change_little(device, tmp_path):
    found = []
    for precision in ("full", "reduced"):
        folder = tmp_path / precision
        folder.mkdir()
        found.append(ranked(opened("bert", device), folder, method="ablation", precision=precision))
    for ours, theirs in zip(found[0].sites, found[1].sites, strict=True):
        np.testing.assert_allclose(ours.score, theirs.score, rtol=0.05)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_ranks_like_float32(dtype, device, tmp_path):
    found = [ranked(opened("bert", device, of), tmp_path, probes=8) for of in (dtype, "float32")]
    for kind in ("heads", "neurons"):
        a, b = (np.concatenate([s.score for s in r.sites if s.kind == kind]) for r in found)
        assert stats.spearmanr(a, b).statistic > 0.99


def test_a_killed_run_resumes(device, tmp_path):
    plan = make_plan(opened("bert", device), words(12, 20), ScoreSettings(**SETTINGS, method="mixed"))
    whole = score(plan, tmp_path / "whole.h5")

    def stop(done: float, total: float, _: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(plan, tmp_path / "r.h5", stop)
    assert_same_scores(score(plan, tmp_path / "r.h5"), whole)


# ---- memory ----


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose activations are megabytes, so that what an allocator rounds up hardly counts."""
    shape = {"hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 1024}
    return tiny_model("bert", tmp_path_factory.mktemp("wide"), **shape)


def plan_of(folder, device: str, method: str = "curvature", memory: int | None = None):
    model = open_model(str(folder), device=device, dtype="float32")
    settings = ScoreSettings(method=method, samples=32, batch_size=32, probes=2)
    return make_plan(model, words(32, 60), settings, memory)


def work(plan) -> np.ndarray:
    """Scores of what one batch gives: of all units by curvature, of some by ablation."""
    site = plan.model.anatomy["blocks.0.neurons"]
    if plan.settings.method == "curvature":
        return curvature(plan.calibration, 0, list(plan.model.anatomy), range(2)).trajectory[site.name]
    return Ablation(plan.calibration, 0).score(site, np.arange(256))[0]


def peak_of(plan) -> int:
    """Bytes beyond what was there before."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work(plan)
    return torch.cuda.max_memory_allocated() - before


@pytest.fixture
def cap(gpu):
    """A function that lets torch have so many bytes more than it holds, and no more."""

    def allow(extra: float) -> None:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + extra) / total)

    yield allow
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_limit_is_most_of_what_is_free(gpu):
    free, total = torch.cuda.mem_get_info()
    assert 0.5 * free < free_bytes([torch.device(gpu, 0)]) < 0.9 * total


@pytest.mark.parametrize("method", ["curvature", "ablation"])
def test_engines_stay_within_their_memory(method, gpu, wide):
    work(plan_of(wide, gpu, method))  # libraries allocate their workspaces
    free = peak_of(plan_of(wide, gpu, method))
    assert peak_of(plan_of(wide, gpu, method, memory=free // 3)) < 1.2 * free / 3


@pytest.mark.parametrize("method", ["curvature", "ablation"])
def test_engines_go_on_in_smaller_steps_after_running_out(method, gpu, wide, cap, notes):
    """A cap that nothing knows of: the limit says that there is plenty."""
    expected = work(plan_of(wide, gpu, method))
    need = peak_of(plan_of(wide, gpu, method))
    plan = plan_of(wide, gpu, method, memory=1 << 50)
    cap(0.6 * need)
    found = work(plan)
    assert "out of memory: going on with" in notes.text
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDED * expected.max())


def test_what_fits_in_no_way_is_an_input_error(gpu, wide, cap):
    plan = plan_of(wide, gpu)
    cap(6 << 20)
    with pytest.raises(InputError, match="does not fit in the memory of cuda"):
        work(plan)
