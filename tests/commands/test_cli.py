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

import h5py
import pytest
from helpers.data import tiny_image_folder, tiny_text_csv
from helpers.models import saved_model, tiny_model
from helpers.runs import hear_interrupts
from typer.testing import CliRunner

import optin_cli
from optin_cli.main import COMMANDS, app

ROOT = Path(__file__).resolve().parents[2]
FAST = ["--samples", "12", "--batch-size", "6", "--probes", "1"]


def run(*args, code: int = 0):
    """Run a command in this process and check its exit code."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    return result


def process(*args, **options):
    """Run the real command in a process of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, "-m", "optin_cli", *(str(arg) for arg in args)],
        capture_output=True, text=True, env=environment, **options,
    )  # fmt: skip


@pytest.fixture
def scored(tmp_path):
    """(model, data, ranking) of a tiny BERT classifier."""
    data = tiny_text_csv(tmp_path)
    run("score", saved_model("bert"), "--data", data, "-o", tmp_path / "r.h5", *FAST, "-q")
    return saved_model("bert"), data, tmp_path / "r.h5"


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
    """The example of docs/families.md, as written there."""
    table = (ROOT / "docs/families.md").read_text().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "ernie.yaml").write_text(table)
    from helpers.models import save_tokenizer, vocabulary
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
    assert re.search(r"known: .*\bbert \(bert\)", refused.stderr)
    assert "docs/families.md" in refused.stderr
    run("prune", tmp_path / "ernie", *arguments, "--anatomy", tmp_path / "ernie.yaml")
    optin_cli.load(tmp_path / "out")  # the folder carries the table: no registration, no file


def test_the_python_table_in_the_docs_is_the_yaml_one(monkeypatch):
    import yaml

    from optin_cli.models import families

    page = (ROOT / "docs/families.md").read_text()
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
    out = process("eval", scored[0], "--data", scored[1], "--split", "train")
    assert out.returncode == 0
    assert "\x1b" not in out.stdout + out.stderr
    assert "accuracy" in out.stderr


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


# ---- bad input: one message, the right code, nothing half-written ----


def bad(tmp_path, *args, code: int, says: str) -> None:
    before = sorted(p for p in tmp_path.rglob("*"))
    result = run(*args, code=code)
    text = " ".join(result.stderr.split())  # rich wraps long lines
    assert says in text, text
    assert text.count("error:") == 1
    assert "Traceback" not in text
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_missing_paths(scored, tmp_path):
    model, data, ranking = scored
    out = tmp_path / "new"
    bad(tmp_path, "score", tmp_path / "no", "--data", data, "-o", out, code=2, says="no model directory")
    bad(tmp_path, "score", model, "--data", tmp_path / "no.csv", "-o", out, code=2, says="no data at")
    bad(tmp_path, "select", tmp_path / "no.h5", "--flops", 0.5, "-o", out, code=2, says="no ranking")
    bad(tmp_path, "apply", model, tmp_path / "no.json", "-o", out, code=2, says="can't read a mask")
    bad(tmp_path, "inspect", tmp_path / "no", code=2, says="nothing at")
    bad(
        tmp_path,
        "select",
        ranking,
        "--flops",
        0.5,
        "-o",
        data / "m.json",
        code=2,
        says="can't create the folder",
    )


def test_data_that_can_not_be_used(tmp_path):
    model = saved_model("bert")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("sentence,label\n")
    (tmp_path / "numbers.csv").write_text("a,b\n1,2\n3,4\n")
    images = tiny_image_folder(tmp_path / "images")
    out = tmp_path / "r.h5"
    for name, code, says in (
        ("empty.csv", 1, "empty"),
        ("header.csv", 1, "empty"),
        ("numbers.csv", 1, "no text column"),
    ):
        bad(tmp_path, "score", model, "--data", tmp_path / name, "-o", out, code=code, says=says)
    bad(tmp_path, "score", model, "--data", images, "-o", out, code=1, says="no text column")
    text = tiny_text_csv(tmp_path)
    bad(tmp_path, "score", saved_model("vit"), "--data", text, "-o", out, code=1, says="no image column")
    bad(
        tmp_path, "score", model, "--data", text, "--text", "nope", "-o", out, code=2, says="no column 'nope'"
    )


def test_fewer_rows_than_asked_are_used_with_a_warning(tmp_path):
    data = tiny_text_csv(tmp_path, rows=8)
    result = run(
        "score",
        saved_model("bert"),
        "--data",
        data,
        "-o",
        tmp_path / "r.h5",
        "--samples",
        100,
        "--method",
        "random",
    )
    assert "fewer than the 100 asked for" in " ".join(result.stderr.split())


@pytest.mark.parametrize(("flops", "code"), [("0", 2), ("-1", 2), ("1.5", 2), ("x", 2), ("nan", 2)])
def test_budgets_that_are_no_fraction(scored, tmp_path, flops, code):
    run("select", scored[2], f"--flops={flops}", "-o", tmp_path / "m.json", code=code)
    assert not (tmp_path / "m.json").exists()


def test_budgets_out_of_reach_name_the_smallest(scored, tmp_path):
    args = ["select", scored[2], "--min-heads", 2, "--min-neurons", 30, "-o", tmp_path / "m.json"]
    bad(tmp_path, *args, "--flops", 0.1, code=4, says="smallest budget that can be reached is --flops")
    text = run(*args, "--flops", 0.1, code=4).stderr
    smallest = re.search(r"reached is\s+--flops\s+([\d.]+)", text)[1].rstrip(".")
    run(*args, "--flops", smallest)


def test_damaged_rankings(scored, tmp_path):
    ranking = scored[2]
    (tmp_path / "cut.h5").write_bytes(ranking.read_bytes()[: ranking.stat().st_size // 2])
    (tmp_path / "text.h5").write_text("hello")
    (tmp_path / "half.h5").write_bytes(ranking.read_bytes())
    with h5py.File(tmp_path / "half.h5", "a") as file:
        del file.attrs["complete"]
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = [1]
    out = tmp_path / "m.json"
    for name, says in (
        ("cut.h5", "not a readable ranking"),
        ("text.h5", "not a readable ranking"),
        ("half.h5", "incomplete"),
        ("other.h5", "not a ranking"),
    ):
        bad(tmp_path, "select", tmp_path / name, "--flops", 0.5, "-o", out, code=3, says=says)


def test_a_ranking_of_another_model(scored, tmp_path):
    _, data, ranking = scored
    other = tiny_model("bert", tmp_path / "other", seed=9)
    args = [
        "prune",
        other,
        "--data",
        data,
        "--flops",
        0.5,
        "--ranking",
        ranking,
        "-o",
        tmp_path / "out",
        *FAST,
    ]
    bad(tmp_path, *args, code=3, says="ranks other weights")


def test_prune_refuses_before_it_scores(scored, tmp_path):
    model, data, _ = scored
    new = tmp_path / "new.h5"
    args = ["prune", model, "--data", data, "--ranking", new, *FAST]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    bad(tmp_path, *args, "--flops", 2, "-o", tmp_path / "out", code=2, says="not a fraction")
    bad(tmp_path, *args, "--flops", 0.5, "-o", tmp_path / "mine", code=2, says="not made by optin")
    assert not new.exists()


def test_masks_that_do_not_fit(scored, tmp_path):
    model, _, ranking = scored
    mask, out = tmp_path / "m.json", tmp_path / "out"
    run("select", ranking, "--flops", 0.5, "-o", mask, "-q")
    other = tiny_model("bert", tmp_path / "other", seed=9)
    bad(tmp_path, "apply", other, mask, "-o", out, code=3, says="other weights")
    deeper = tiny_model("bert", tmp_path / "deeper", num_hidden_layers=4)
    bad(tmp_path, "apply", deeper, mask, "-o", out, code=3, says="other sites")
    content = json.loads(mask.read_text())
    for indices, says in (([0, 99], "out of range"), ([1, 1], "twice"), ([3, 0], "not ascending")):
        content["keep"]["blocks.0.heads"] = indices
        (tmp_path / "bad.json").write_text(json.dumps(content))
        bad(tmp_path, "apply", model, tmp_path / "bad.json", "-o", out, code=3, says=says)


def test_model_directories_without_usable_weights(scored, tmp_path):
    data, out = scored[1], tmp_path / "out.h5"
    empty = tiny_model("bert", tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    bad(tmp_path, "score", empty, "--data", data, "-o", out, code=1, says="holds no weights")
    (tmp_path / "nothing").mkdir()
    bad(tmp_path, "score", tmp_path / "nothing", "--data", data, "-o", out, code=1, says="no config.json")


def test_the_quality_gate(scored, tmp_path):
    model, data, ranking = scored
    run("select", ranking, "--flops", 0.05, "-o", tmp_path / "m.json", "-q")
    run("apply", model, tmp_path / "m.json", "-o", tmp_path / "out", "-q")
    arguments = ["eval", tmp_path / "out", "--baseline", model, "--data", data, "--split", "train"]
    run(*arguments, "--max-drop", 100)
    failed = run(*arguments, "--max-drop", -100, code=5)
    assert "points" in failed.stderr
    run("eval", model, "--data", data, "--split", "train", "--max-drop", 1, code=2)


def test_a_full_disk_leaves_nothing(scored, tmp_path):
    """A real failing write: the process may not write files beyond 8 KiB."""
    model, data, ranking = scored
    run("select", ranking, "--flops", 0.5, "-o", tmp_path / "m.json", "-q")
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)); "
    limit += "sys.argv = ['optin', *sys.argv[1:]]; runpy.run_module('optin_cli', run_name='__main__')"
    before = sorted(p for p in tmp_path.rglob("*"))
    for args in (
        ["score", model, "--data", data, "-o", tmp_path / "new.h5", "--method", "magnitude"],
        ["apply", model, tmp_path / "m.json", "-o", tmp_path / "out"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", limit, *map(str, args)],
            capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == 1, done.stderr
        assert "disk is full" in " ".join(done.stderr.split()), done.stderr
    left = [p for p in sorted(tmp_path.rglob("*")) if p not in before and ".partial" not in str(p)]
    assert left == []


def test_wrong_options(scored, tmp_path):
    model, data, _ = scored
    out = tmp_path / "r2.h5"
    bad(
        tmp_path,
        "score",
        model,
        "--data",
        data,
        "-o",
        out,
        "--method",
        "guess",
        code=2,
        says="unknown method",
    )
    bad(tmp_path, "score", model, "--data", data, "-o", out, "--dtype", "int3", code=2, says="unknown dtype")
    bad(
        tmp_path, "score", model, "--data", data, "-o", out, "--device", "moon", code=2, says="unknown device"
    )
    bad(
        tmp_path, "score", model, "--data", data, "-o", out, "--task", "juggling", code=2, says="unknown task"
    )
    bad(tmp_path, "bench", model, "--batch-size", "a", code=2, says="whole numbers")
    bad(tmp_path, "bench", model, "--image-size", "32", code=2, says="--seq-len")
    bad(tmp_path, "bench", model, "--seq-len", "4096", code=2, says="64")
    run("score", model, code=2)


# ---- the process itself ----


def test_control_c_exits_with_130_and_the_next_run_resumes(tmp_path):
    data = tiny_text_csv(tmp_path)
    command = [sys.executable, "-m", "optin_cli", "score", str(saved_model("bert")), "--data", str(data)]
    command += ["-o", str(tmp_path / "r.h5"), "--samples", "60", "--batch-size", "1", "--method", "ablation"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / ".r.h5.partial").glob("*.npz")) and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "interrupted" in stderr
    assert not (tmp_path / "r.h5").exists()
    resumed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0
    assert "resuming" in resumed.stderr
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
def test_every_command_is_in_the_readme(name):
    assert f"optin {name}" in (ROOT / "README.md").read_text()


def test_version():
    assert run("--version").stdout == f"optin {optin_cli.__version__}\n"


def test_help_and_select_do_not_import_torch(scored, tmp_path):
    ranking = scored[2]
    script = (
        "import sys; sys.argv = ['optin', *sys.argv[1:]]\n"
        "from optin_cli.main import app\n"
        "app(standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'timm', 'datasets', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for args in (["--help"], ["select", "--help"], ["families"], ["inspect", ranking],
                 ["select", ranking, "--flops", "0.5", "-o", tmp_path / "m.json"]):  # fmt: skip
        done = subprocess.run([sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
