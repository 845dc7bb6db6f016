"""benchmarks/gpu.py: what is left of its parts when they fail, hang or have no time. Its numbers need a GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/gpu.py"


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu", module)
    spec.loader.exec_module(module)
    return module


def test_a_part_that_hangs_is_stopped_with_all_it_started_and_loses_nothing(gpu, tmp_path):
    (tmp_path / "team.json").write_text('{"found": 1}')
    code = "import subprocess, sys, time; subprocess.Popen(['sleep', '600']); print('up', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    (child,) = psutil.Process(process.pid).children()
    gpu._finish("team", process, time.perf_counter(), tmp_path)
    process.stdout.close()
    assert process.poll() is not None
    deadline = time.monotonic() + 10  # a killed process takes a moment to go
    while (
        alive := child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    ) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive
    assert json.loads((tmp_path / "team.json").read_text()) == {"found": 1, "stopped": "its time was up"}


def test_a_part_that_fails_is_noted(gpu, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], start_new_session=True)
    gpu._finish("bench", process, time.perf_counter() + 60, tmp_path)
    assert json.loads((tmp_path / "bench.json").read_text()) == {"stopped": "ended with exit code 3"}


def test_what_times_nothing_runs_side_by_side(gpu):
    names = list(gpu.PARTS)
    assert gpu._groups(names, together=True) == [
        ["card"], ["tests", "team", "half"], ["scoring"], ["decoder"], ["ranks"], ["bench"]
    ]  # fmt: skip
    assert gpu._groups(names, together=False) == [[name] for name in names]
    assert gpu._groups(["half", "bench"], together=True) == [["half"], ["bench"]]


def test_a_step_that_fails_is_told_and_the_next_one_runs(gpu, tmp_path):
    from gpu_parts.job import Job

    job = Job("half", "cpu", True, tmp_path, tmp_path, 60.0)
    with job.step("first"):
        raise ValueError("no such kernel")
    with job.step("second"):
        job.write(done=True)
    assert json.loads((tmp_path / "half.json").read_text()) == {
        "failed": {"first": "ValueError: no such kernel"}, "done": True
    }  # fmt: skip


MARKED = """
import pytest
@pytest.mark.cuda
@pytest.mark.parametrize("number", [1, 2])
def test_number(number):
    kernel = "no such kernel"
    assert number == 1, kernel
def test_unmarked():
    pass
"""


def test_outcomes_and_tracebacks_of_the_tests_are_kept(gpu, tmp_path, capsys):
    from gpu_parts.job import Job
    from gpu_parts.tests import failures, watched

    (tmp_path / "test_marked.py").write_text(MARKED)
    watched(Job("tests", "cpu", True, tmp_path, tmp_path, 60.0), str(tmp_path / "test_marked.py"))
    facts = json.loads((tmp_path / "tests.json").read_text())
    assert facts["exit_code"] == 1
    assert facts["counts"] == {"failed": 1, "passed": 1}
    assert [name.partition("::")[2] for name in facts["outcomes"]] == ["test_number[1]", "test_number[2]"]
    assert "AssertionError: no such kernel" in facts["failures"]
    assert facts["failures"].startswith("=")
    assert (tmp_path / "tests.log").read_text().endswith(facts["failures"])
    capsys.readouterr()
    gpu.print_failures(facts)
    assert "no such kernel" in capsys.readouterr().out
    assert failures("a::b PASSED\n==== 1 passed in 1s ====\n") == ""
    assert failures("a::b PASSED\nFatal Python error: Aborted\n").endswith("Aborted\n")


def rows(batch: int, speedup: float, knee: bool) -> list[dict]:
    """A dense and a pruned model at one batch."""
    setting = {"shape": "BERT-base", "precision": "tf32", "execution": "eager", "batch": batch, "knee": knee}
    dense = {
        "model": "dense",
        "ms": 2.0 * batch,
        "tflops": 50.0,
        "speedup": 1.0,
        "ideal": 1.0,
        "of_ideal": 1.0,
    }
    small = {
        "model": "0.5 round auto",
        "ms": 2.0 * batch / speedup,
        "speedup": speedup,
        "of_ideal": speedup / 2,
    }
    return [{**setting, **dense}, {**setting, **small}]


def shape_row(name: str, ms: float) -> dict:
    return {
        "shape": "BERT-base, heads x rank", "precision": "bfloat16", "execution": "eager", "batch": 32, "model": name,
        "ms": ms, "tflops": 50.0, "speedup": 5 / ms, "of_ideal": 0.9,
    }  # fmt: skip


def test_a_report_has_what_was_measured_and_says_what_was_not(gpu, tmp_path):
    from gpu_parts.report import AIMS, NOT_MEASURED, read, report

    card = {
        "name": "Card",
        "driver": "1.2",
        "torch": "2",
        "transformers": "5",
        "python": "3",
        "tflops": {"tf32": 400.0},
    }
    facts = {
        "card": card,
        "bench": {"rows": [*rows(1, 0.97, False), *rows(8, 1.8, True)], "stopped": "its time was up"},
        "ranks": {"rows": [shape_row("dense", 5.0), shape_row("6 x 64", 4.0), shape_row("12 x 32", 5.0)]},
        "scoring": {
            "curvature_8": {"seconds": 4.0, "tflops": 40.0},
            "failed": {"ablation, full": "ValueError: bad"},
        },
        "tests": {"outcomes": {"a::b": "passed", "a::c": "failed"}, "counts": {"failed": 1, "passed": 1}},
    }
    for part, found in facts.items():
        (tmp_path / f"{part}.json").write_text(json.dumps(found))
    text = report(read(tmp_path, gpu.PARTS))
    assert "Card, driver 1.2, torch 2" in text
    assert "| 4.0 s; 40 TFLOP/s, 10 % of the tf32 rate |" in text
    assert "0.97x at worst (BERT-base 0.5 round auto, tf32, eager, batch 1), of 2 settings" in text
    assert "BERT-base tf32 0.90 to 0.90" in text
    assert "| tf32 | eager | 8 (knee) | 16.000 | 50 | 1.80x (90 %) |" in text
    assert "- test a::c" in text
    assert "- scoring, ablation, full: ValueError: bad" in text
    assert "- bench: its time was up" in text
    assert "BERT-base bfloat16 batch 32 +25 %" in text
    assert text.count(NOT_MEASURED) == len(AIMS) - 5


@pytest.mark.slow
def test_it_runs_on_a_cpu(tmp_path):
    asked = ["--device", "cpu", "--tiny", "--only", "card", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, str(SCRIPT), *asked], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "card.json").read_text())["tflops"]["float32"] >= 0
    assert (tmp_path / "report.md").read_text() in done.stdout
