"""Shared by all tests: no hub, and the real data and models beside the checkout when they are there."""

from __future__ import annotations

import functools
import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

gc.disable()  # until all is collected: libraries and tests are made by the million, and nothing of them is garbage
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

# one family of each kind: what the engines, the stages and the tracer meet in all others, they meet in these
REPRESENTATIVE = {"bert", "llama", "timm-vit", "timm-resnet"}
EVERY_FAMILY = "tests/architectures/test_all_families.py"
"""Checks every family at every run, but for the dearest: the others only where `pytest -m slow` does."""
SAME_PARTS = {"maskformer-swin", "mask2former-resnet"}
"""Segmenters whose backbone and head another one has, too: slow everywhere."""
DEAREST = "test_a_sliced_model_computes_and_costs_what_the_anatomy_says"
MANY = 4
"""Families from which on a test is about families, not about some that its author chose."""
NOT_FAST = (
    "commands", "api", "pruning", "scoring", "compensation", "measure", "tracing", "execution", "loading", "transforms",
    "architectures", "tasks", "reporting", "standalone", "vocabulary", "runtimes", "trials", "cuda", "test_steps.py",
    "test_interrupts.py", "test_without_datasets.py", "test_gpu_benchmark.py", "test_whisper_benchmark.py",
    "test_workers.py", "test_builtin_docs.py", "test_builtin_prose.py", "test_likeness.py", "test_stream.py",
    "test_facts.py", "test_coupled_latency.py", "test_atomic.py", "test_earlier_files.py", "test_hostile_rankings.py",
    "test_uniform.py", "test_broken_files.py",
)  # fmt: skip
"""Folders and files whose tests open models, start processes or read every docstring."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as `slow` what another family stands for, and as `fast` what opens no model and starts no process."""
    from helpers.families import ALL, MORE_FAMILIES

    families: dict[str, set[str]] = {}
    known = {*ALL, *MORE_FAMILIES}
    for item in items:
        if (name := _family(item)) in known:
            families.setdefault(_function(item), set()).add(name)
    for item in items:
        every = EVERY_FAMILY in item.nodeid and DEAREST not in item.nodeid
        many = len(families.get(_function(item), ())) >= MANY and not every
        family = _family(item)
        if family in SAME_PARTS or (many and family not in REPRESENTATIVE):
            item.add_marker(pytest.mark.slow)
        opens = _opens_models(item.path)
        if not opens and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.fast)
    # a worker runs whole files: those that cost much begin, many small ones fill up the end
    items.sort(key=lambda item: not _opens_models(item.path))


@functools.cache
def _opens_models(path: Path) -> bool:
    return not set(path.relative_to(Path(__file__).parent).parts).isdisjoint(NOT_FAST)


TOGETHER = {
    "tests/runtimes/": "exported files",
    "tests/commands/test_export.py": "exported files",
    "tests/data/test_builtin_docs.py": "docstrings of the standard library",
    "tests/data/test_likeness.py": "docstrings of the standard library",
}
"""Where a node id begins -> what its tests make once in a process, and which costs seconds."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Workers run whole files, in the order of `items`: what the tests of a file share is made once."""
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Whole(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            shared = (name for start, name in TOGETHER.items() if nodeid.startswith(start))
            return next(shared, super()._split_scope(nodeid))

    config.option.loadscopereorder = False  # by the number of tests, which says nothing of their cost
    return Whole(config, log)


def pytest_collection_finish() -> None:
    """What lives as long as the session is looked through once, and the rest less often: libraries are large."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 40)
    gc.enable()


def _family(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    name = callspec.params.get("name") if callspec else None
    return name if isinstance(name, str) else ""


def _function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_runtest_setup() -> None:
    """A test draws the same numbers, and sees the same log, whatever ran before it."""
    import torch

    torch.manual_seed(0)
    logging.getLogger("optin").propagate = True  # a command in this process sends its notes to stderr alone


def pytest_sessionfinish() -> None:
    from helpers.models import remove_folders

    remove_folders()


@pytest.fixture(scope="session", autouse=True)
def clean_repository() -> Iterator[None]:
    """`prune` keeps its ranking in the working directory: no test does so in the repository, where others find it."""
    folder = Path(__file__).resolve().parents[1] / "rankings"
    before = set(folder.glob("*"))
    yield
    assert set(folder.glob("*")) <= before


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models; the test skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data and models in {SHARED}")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def processor_rounds() -> Iterator[bool]:
    """Whether this processor rounds the operands of products that may be rounded (`execution/precision.py`).

    In tests none does: they compare with algebra, and one with AMX would spend more on the shapes of tiny models than
    on their numbers. `reduced_products` of tests/scoring/conftest.py switches that on.
    """
    import torch

    rounds = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
        yield rounds


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
