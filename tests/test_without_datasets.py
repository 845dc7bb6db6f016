"""Models and engines don't need `datasets`: it is imported where a data set is read."""

from __future__ import annotations

import os
import subprocess
import sys

from helpers.models import saved_model

SCRIPT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "datasets":
            raise ModuleNotFoundError(f"No module named {name!r}", name="datasets")

sys.meta_path.insert(0, Missing())
import tempfile
from pathlib import Path
from helpers.memory import serve_words, words
from optin_cli.loading.checkpoint import open_model
from optin_cli.scoring.plan import ScoreSettings, make_plan
from optin_cli.scoring.score import score
from optin_cli.selection.select import select
from optin_cli.pruning.apply import apply
from optin_cli.compensation.plan import make_plan as make_compensation
from optin_cli.compensation.settings import Compensation
import optin_cli.measure.evaluate, optin_cli.measure.latency_table

serve_words()
model = open_model(sys.argv[1], device="cpu")
with tempfile.TemporaryDirectory() as folder:
    ranking = score(make_plan(model, words(8, 10), ScoreSettings(samples=8)), Path(folder) / "r.h5")
    mask = select(ranking, 0.6)
    plan = make_compensation(model, mask, Compensation(samples=8), words(8, 10))
    print(apply(model, mask, Path(folder) / "out", plan=plan).deviation)
assert "datasets" not in sys.modules
"""


def test_a_model_is_scored_and_pruned_without_them():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(saved_model("bert"))],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-4
