"""Shared by all tests: no hub, and the real data and models beside the checkout when they are there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads only wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

# A failing case is shrunk within bounds and never explained: the explain phase traces every line and made one
# failure cost many minutes. The same profile everywhere, so that a failure in CI is a failure at home.
settings.register_profile(
    "optin",
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink],
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("optin")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_runtest_setup() -> None:
    """Numbers that a test draws without a seed are the same whatever ran before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models; the test skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data and models in {SHARED}")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def own_dataset_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """`datasets` caches what it reads: not in the user's home. The tests in tests/cuda do without it."""
    try:
        import datasets
    except ModuleNotFoundError:
        return
    folder = tmp_path_factory.mktemp("datasets")
    datasets.config.HF_DATASETS_CACHE = folder
    os.environ["HF_DATASETS_CACHE"] = str(folder)
