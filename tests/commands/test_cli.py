"""The command line as a user meets it: the pipeline, streams, exit codes, help."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import forks
from helpers.cli import FAST, process, run
from helpers.data import tiny_image_folder, tiny_text_csv
from helpers.models import saved_model

import optin_cli
from optin_cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]


# ---- the pipeline ----


def test_score_select_apply_eval_bench_inspect(scored, tmp_path):
    model, data, ranking = scored
    run("select", ranking, "--flops", "0.6", "-o", tmp_path / "m.json")
    run("apply", model, tmp_path / "m.json", "-o", tmp_path / "out")
    for artefact in (ranking, tmp_path / "m.json", tmp_path / "out", model):
        assert run("inspect", artefact).stdout
        assert json.loads(run("inspect", artefact, "--json").stdout)["schema_version"] == 1
    evaluated = json.loads(
        run(
            "eval", tmp_path / "out", "--baseline", model, "--data", data, "--split", "train", "--json"
        ).stdout
    )
    assert 0 <= evaluated["metrics"]["accuracy"] <= 100
    assert evaluated["fidelity"]["kl"] >= 0
    timed = json.loads(
        run(
            "bench", tmp_path / "out", "--baseline", model, "--batch-size", "1,2", "--seq-len", "16",
            "--repeats", 2, "--seconds", 0, "--json",
        ).stdout
    )  # fmt: skip
    assert [t["setting"]["batch_size"] for t in timed["timings"]] == [1, 1, 2, 2]
    dense, pruned = timed["timings"][:2]
    assert pruned["macs"] < dense["macs"]
    assert pruned["ideal_speedup"] > 1


def test_prune_does_the_same_and_keeps_the_ranking(scored, tmp_path, monkeypatch):
    model, data, ranking = scored
    monkeypatch.chdir(tmp_path)
    run("select", ranking, "--flops", "0.5", "-o", "m.json")
    run("apply", model, "m.json", "-o", "steps", "--batch-size", 6)
    first = json.loads(
        run("prune", model, "--data", data, "--flops", 0.5, "-o", "once", *FAST, "--json").stdout
    )
    assert not first["ranking_reused"]
    assert (tmp_path / "once/model.safetensors").read_bytes() == (
        tmp_path / "steps/model.safetensors"
    ).read_bytes()
    second = json.loads(
        run("prune", model, "--data", data, "--flops", 0.7, "-o", "more", *FAST, "--json").stdout
    )
    assert second["ranking_reused"]
    assert second["ranking"] == first["ranking"]


def test_a_vision_model_goes_the_same_way(tmp_path):
    images = tiny_image_folder(tmp_path / "images")
    model = saved_model("timm-vit")
    run(
        "prune",
        model,
        "--data",
        images,
        "--flops",
        0.5,
        "-o",
        tmp_path / "out",
        "--ranking",
        tmp_path / "r.h5",
        *FAST,
    )
    result = run("eval", tmp_path / "out", "--baseline", model, "--data", images, "--json")
    assert json.loads(result.stdout)["fidelity"].keys() >= {"agreement", "kl"}
    run("bench", tmp_path / "out", "--batch-size", 1, "--repeats", 1, "--seconds", 0, "--json")


def test_embeddings_agree_with_themselves(tmp_path):
    data = tiny_text_csv(tmp_path, labels=None)
    model = saved_model("mpnet", "encoder")
    result = run("eval", model, "--baseline", model, "--data", data, "--split", "train", "--json")
    fidelity = json.loads(result.stdout)["fidelity"]
    assert fidelity["cosine"] == pytest.approx(100, abs=1e-3)
    assert fidelity["top10_overlap"] == pytest.approx(100)


def test_families_lists_them_all():
    out = run("families").stdout
    for name in ("bert", "roberta", "distilbert", "electra", "mpnet", "vit", "timm-vit"):
        assert re.search(rf"^{name} ", out, re.MULTILINE)
    assert re.search(r"^timm-eva .* image +heads, neurons +\S", out, re.MULTILINE)  # each kind once


def test_a_family_from_a_file_prunes_a_model_nobody_listed(tmp_path):
    """The example of docs/anatomy.md, as written there."""
    table = (ROOT / "docs/anatomy.md").read_text().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "ernie.yaml").write_text(table)
    from helpers.tokenizers import save_tokenizer, vocabulary
    from transformers import ErnieConfig, ErnieForSequenceClassification

    config = ErnieConfig(
        vocab_size=len(vocabulary("bert")), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    ErnieForSequenceClassification(config).save_pretrained(tmp_path / "ernie")
    save_tokenizer("bert", tmp_path / "ernie")
    data = tiny_text_csv(tmp_path)
    arguments = [
        "--data",
        data,
        "--flops",
        0.5,
        "-o",
        tmp_path / "out",
        "--ranking",
        tmp_path / "r.h5",
        *FAST,
    ]
    refused = run("prune", tmp_path / "ernie", *arguments, code=1)
    nearest = re.search(r"nearest known are (.*); `optin families`", " ".join(refused.stderr.split()))[1]
    assert (
        re.findall(r"(\S+) \(", nearest)[0] == "bert" or "bert (bert)" in nearest
    )  # their layers are its own
    assert len(re.findall(r" \(", nearest)) == 5
    assert "docs/anatomy.md" in refused.stderr
    run("prune", tmp_path / "ernie", *arguments, "--anatomy", tmp_path / "ernie.yaml")
    optin_cli.load(tmp_path / "out")  # the folder carries the table: no registration, no file


def test_the_python_table_in_the_docs_is_the_yaml_one(monkeypatch):
    import yaml

    from optin_cli.architectures import families

    page = (ROOT / "docs/anatomy.md").read_text()
    blocks = {kind: page.split(f"```{kind}\n")[1].split("```")[0] for kind in ("yaml", "python")}
    monkeypatch.setattr(families, "_REGISTRY", dict(families._REGISTRY))
    exec(blocks["python"], {})
    assert families.find_family(["ernie"]) == families.family_from_dict(yaml.safe_load(blocks["yaml"]))


# ---- streams ----


def test_quiet_prints_the_path_and_nothing_else(scored, tmp_path):
    model, _, ranking = scored
    for command in (
        ["select", ranking, "--flops", 0.5, "-o", tmp_path / "m.json", "-q"],
        ["apply", model, tmp_path / "m.json", "-o", tmp_path / "out", "-q"],
    ):
        result = run(*command)
        assert result.stdout == f"{command[command.index('-o') + 1]}\n"
        assert result.stderr == ""


def test_stdout_holds_the_path_and_stderr_the_rest(scored, tmp_path):
    result = run("select", scored[2], "--flops", 0.5, "-o", tmp_path / "m.json")
    assert result.stdout == f"{tmp_path / 'm.json'}\n"
    assert "of the MACs" in result.stderr


def test_a_pipe_gets_plain_text_and_no_colours(scored, tmp_path):
    written = process("select", scored[2], "--flops", 0.5, "-o", tmp_path / "m.json")
    table = process("families")
    assert written.returncode == table.returncode == 0
    assert "\x1b" not in written.stdout + written.stderr + table.stdout + table.stderr
    assert "of the MACs" in written.stderr
    assert "bert" in table.stdout


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m optin_cli families | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in result.stderr


# ---- reuse and overwriting ----


def test_finished_work_is_reused_and_other_work_is_refused(scored, tmp_path):
    model, data, ranking = scored
    again = run("score", model, "--data", data, "-o", ranking, *FAST)
    assert "already" in again.stderr
    refused = run("score", model, "--data", data, "-o", ranking, *FAST, "--seed", 3, code=2)
    assert "--force" in refused.stderr
    run("score", model, "--data", data, "-o", ranking, *FAST, "--seed", 3, "--force", "-q")
    mask = tmp_path / "m.json"
    run("select", ranking, "--flops", 0.5, "-o", mask)
    assert json.loads(run("select", ranking, "--flops", 0.5, "-o", mask, "--json").stdout)["reused"]
    run("select", ranking, "--flops", 0.6, "-o", mask, code=2)
    run("apply", model, mask, "-o", tmp_path / "out")
    assert "already" in run("apply", model, mask, "-o", tmp_path / "out").stderr
    run("select", ranking, "--flops", 0.6, "-o", mask, "--force")
    run("apply", model, mask, "-o", tmp_path / "out", code=2)
    run("apply", model, mask, "-o", tmp_path / "out", "--force")


def test_dry_run_scores_nothing(tmp_path):
    data = tiny_text_csv(tmp_path)
    result = run("score", saved_model("bert"), "--data", data, "-o", tmp_path / "r.h5", *FAST, "--dry-run")
    assert "would score" in result.stderr
    assert not (tmp_path / "r.h5").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["train.csv"]


# ---- the process itself ----


def test_control_c_exits_with_130_and_the_next_run_resumes(tmp_path):
    data = tiny_text_csv(tmp_path)
    arguments = ["score", saved_model("bert"), "--data", data, "-o", tmp_path / "r.h5"]
    arguments += ["--samples", 6, "--batch-size", 1, "--method", "ablation"]
    running = forks.start(arguments, tmp_path / "log")
    deadline = time.monotonic() + 120
    while not list((tmp_path / ".r.h5.partial").glob("*.npz")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(running, signal.SIGINT)
    assert forks.ended(running) == 130
    assert "interrupted" in (tmp_path / "log").read_text()
    assert not (tmp_path / "r.h5").exists()
    assert "resuming" in run(*arguments).stderr
    assert (tmp_path / "r.h5").exists()


def test_unexpected_failures_are_one_line_unless_debugging(monkeypatch):
    import optin_cli.commands.families as module

    def broken():
        raise RuntimeError("boom")

    monkeypatch.setattr(module, "known_families", broken)
    monkeypatch.delenv("OPTIN_DEBUG", raising=False)
    result = run("families", code=1)
    assert "unexpected RuntimeError: boom" in result.stderr
    assert "Traceback" not in result.stderr
    monkeypatch.setenv("OPTIN_DEBUG", "1")
    assert "Traceback" in run("families", code=1).stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name):
    for flag in ("-h", "--help"):
        text = run(name, flag).stdout
        assert f"optin {name}" in text.split("Example")[1]
    callback = COMMANDS[name]
    assert callback.__doc__


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_in_help_can_be_copied(name, monkeypatch):
    """On a terminal of 80 columns each is one line, and the list of commands cuts no summary off."""
    monkeypatch.setenv("COLUMNS", "80")
    shown = [line.strip() for line in run(name, "--help").stdout.splitlines()]
    told = [line.strip() for line in (COMMANDS[name].__doc__ or "").split("Examples:")[1].splitlines()]
    assert [line for line in told if line not in shown] == []
    assert "..." not in run("--help").stdout.split(" Commands ")[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_readme(name):
    assert f"optin {name}" in (ROOT / "README.md").read_text()


def test_version():
    assert run("--version").stdout == f"optin {optin_cli.__version__}\n"


def test_help_and_select_do_not_import_torch(scored, tmp_path):
    ranking = scored[2]
    commands = [
        ["--help"], ["select", "--help"], ["families"], ["inspect", ranking],
        ["select", ranking, "--flops", "0.5", "-o", tmp_path / "m.json"],
    ]  # fmt: skip
    script = (
        "import ast, sys\n"
        "from optin_cli.main import app\n"
        "for args in ast.literal_eval(sys.argv[1]):\n"
        "    try: app(args, standalone_mode=False)\n"
        "    finally: heavy = {'torch', 'transformers', 'timm', 'datasets', 'pandas'} & set(sys.modules)\n"
        "    assert not heavy, (args, heavy)\n"
    )
    given = repr([[str(arg) for arg in args] for args in commands])
    done = subprocess.run([sys.executable, "-c", script, given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "m.json").exists()
