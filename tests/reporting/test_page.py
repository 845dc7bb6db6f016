"""The page of a report: whole, readable, and about the artefacts that it was given."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest
import typer
from helpers.artefacts import chain_ranking, latency_table, tiny_ranking
from helpers.cli import run

from optin_cli.artefacts.latency import write_latency_table
from optin_cli.artefacts.mask import read_mask, write_mask
from optin_cli.artefacts.ranking import write_ranking
from optin_cli.main import app
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request

VOID = {"meta", "link", "input", "br", "img"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects ids, links, loads and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.open, self.ids, self.loads, self.links = text, [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.loads += [value for name, value in found.items() if name in ("src", "srcset", "data", "action")]
        self.links += [found["href"]] if "href" in found else []
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def budgets(self) -> list[dict]:
        return json.loads(re.search(r'type="application/json">(.*?)</script>', self.text, re.DOTALL)[1])


@pytest.fixture
def folder(tmp_path):
    """A ranking and two masks of it."""
    ranking = tiny_ranking()
    write_ranking(tmp_path / "r.h5", ranking)
    for share in (0.8, 0.5):
        write_mask(tmp_path / f"m-{share}.mask.json", select(ranking, Request(flops=share)))
    return tmp_path


def report(folder, *paths, **options):
    run("report", *(folder / path for path in paths), "-o", folder / "report.html", **options)
    return Page((folder / "report.html").read_text())


def test_a_page_is_whole_and_needs_nothing_else(folder):
    page = report(folder, "r.h5", "m-0.8.mask.json", "m-0.5.mask.json")
    assert len(page.ids) == len(set(page.ids))
    assert not page.loads
    assert {link for link in page.links if not link.startswith("data:")} <= {f"#{name}" for name in page.ids}
    assert "http" not in page.text and "@import" not in page.text and "url(" not in page.text
    drawn = re.findall(r"<svg.*?</svg>", page.text, re.DOTALL)
    assert len(drawn) == 1 + 3  # the heat map, and the neurons of each block
    for svg in drawn:
        ElementTree.fromstring(svg)
    for sign in (
        'lang="en"',
        "viewport",
        "prefers-color-scheme: dark",
        'type="range"',
        '<label for="budget">',
    ):
        assert sign in page.text


def test_the_slider_shows_what_each_mask_keeps(folder):
    page = report(folder, "m-0.5.mask.json", "r.h5", "m-0.8.mask.json")
    budgets = page.budgets()
    assert [budget["label"] for budget in budgets] == ["dense", "m-0.8", "m-0.5"]
    masks = [read_mask(folder / f"m-{share}.mask.json") for share in (0.8, 0.5)]
    for budget, mask in zip(budgets[1:], masks, strict=True):
        assert budget["kept"] == {name: len(kept) for name, kept in mask.keep.items()}
        assert budget["heads"] == {name: kept for name, kept in mask.keep.items() if name.endswith("heads")}
        assert f"{100 * mask.reached['flops']:.1f} % of the MACs" in budget["note"]
    assert all(share == 100 for row in budgets[0]["blocks"] for share, _ in row)
    assert page.text.count("<g data-site=") == 12


def test_without_masks_it_shows_what_budgets_would_keep(folder):
    labels = [budget["label"] for budget in report(folder, "r.h5").budgets()]
    assert labels[:3] == ["dense", "0.9 of the MACs", "0.8 of the MACs"] and len(labels) == 9


def test_channels_of_a_chain_and_predicted_latency(tmp_path):
    chain = chain_ranking(1)
    for site in chain.sites:  # the parts of scores, which files need
        site.trajectory, site.output = np.zeros((site.units, len(site.columns))), np.zeros(site.units)
        site.by_batch = np.zeros((0, site.units, 2), np.float32)
    write_ranking(tmp_path / "chain.h5", chain)
    page = report(tmp_path, "chain.h5")
    assert page.text.count("<figure data-profile") == 3 and "Heads" not in page.text
    ranking = tiny_ranking()
    write_ranking(tmp_path / "r.h5", ranking)
    write_latency_table(tmp_path / "cpu.json", latency_table(ranking.sites))
    timed = report(tmp_path, "r.h5", "cpu.json")
    assert "milliseconds" in timed.text and all(len(row) == 3 for row in timed.budgets()[1]["blocks"])


def test_names_can_not_break_out_of_the_page(tmp_path):
    evil = "</script><script>alert(1)</script>"
    ranking = tiny_ranking()
    ranking.model["id"] = evil
    write_ranking(tmp_path / "r.h5", ranking)
    write_mask(tmp_path / "m<b>.mask.json", select(ranking, Request(flops=0.5)))
    page = report(tmp_path, "r.h5", "m<b>.mask.json")
    assert "alert(1)</script>" not in page.text and page.text.count("<script") == 2
    assert page.budgets()[1]["label"] == "m<b>"


def test_a_large_model_stays_under_three_megabytes(tmp_path):
    ranking = tiny_ranking(blocks=32, heads=32, neurons=4000)
    write_ranking(tmp_path / "r.h5", ranking)
    report(tmp_path, "r.h5")
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


# ---- provenance ----


def test_the_commands_are_commands(folder):
    text = report(folder, "r.h5", "m-0.5.mask.json").text
    lines = re.search(r"<pre[^>]*>(.*?)</pre>", text, re.DOTALL)[1].strip().splitlines()
    assert [shlex.split(line)[1] for line in lines] == ["score", "select"]
    options = {
        name: {flag for one in command.params for flag in (*one.opts, *one.secondary_opts)}
        for name, command in typer.main.get_command(app).commands.items()
    }
    for line in lines:
        _, command, *rest = shlex.split(line)
        assert {word for word in rest if word.startswith("-")} <= options[command]
    assert "--flops 0.5" in lines[1]


def test_the_select_command_makes_the_same_mask(folder, monkeypatch):
    monkeypatch.chdir(folder)
    ranking = tiny_ranking()
    request = Request(params=0.9, min_heads=1, max_prune=0.5, interactions="none")
    write_mask("guarded.mask.json", select(ranking, request))
    run("report", "r.h5", "guarded.mask.json", "-o", "report.html")
    line = next(
        line for line in (folder / "report.html").read_text().splitlines() if line.startswith("optin select")
    )
    before = read_mask(folder / "guarded.mask.json")
    (folder / "guarded.mask.json").unlink()
    run(*shlex.split(line)[1:])
    assert read_mask(folder / "guarded.mask.json") == before


# ---- other forms ----


def test_pictures_and_a_table(folder):
    pytest.importorskip("matplotlib")
    done = run(
        "report",
        folder / "r.h5",
        folder / "m-0.5.mask.json",
        "--png",
        folder / "p",
        "--csv",
        folder / "t.csv",
    )
    assert [line.rpartition("/")[2] for line in done.stdout.split()] == [
        "heads.png",
        "kept.png",
        "blocks.png",
        "t.csv",
    ]
    for name in ("heads", "kept", "blocks"):
        assert (folder / f"p/{name}.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((folder / "t.csv").open()))
    mask = read_mask(folder / "m-0.5.mask.json")
    assert [row["name"] for row in rows] == ["dense", "m-0.5"]
    assert float(rows[1]["macs"]) == mask.reached["macs"]


@pytest.mark.parametrize(
    ("paths", "code", "says"),
    [
        (["m-0.5.mask.json"], 2, "no ranking"),
        (["r.h5", "other.h5"], 2, "one ranking"),
        (["other.h5", "m-0.5.mask.json"], 3, "another ranking"),
        (["r.h5", "nothing"], 2, "nothing at"),
        (["r.h5", "."], 2, "neither a pruned model nor a sweep"),
    ],
)
def test_what_does_not_belong_together_is_refused(folder, paths, code, says):
    write_ranking(folder / "other.h5", replace(tiny_ranking(seed=5), row_ids=[2, 3]))
    result = run("report", *(folder / path for path in paths), "-o", folder / "x.html", code=code)
    assert says in result.stderr and not (folder / "x.html").exists()


def test_something_must_be_written(folder):
    assert "nothing is to be written" in run("report", folder / "r.h5", code=2).stderr


def test_a_report_needs_no_torch(folder):
    script = (
        "import sys; from optin_cli.reporting.write import write; from pathlib import Path\n"
        f"write([{str(folder / 'r.h5')!r}], Path({str(folder / 'x.html')!r}))\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stderr == ""


# ---- in a browser ----

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def browse(page, folder, *options):
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_runs_the_page_without_errors(folder):
    report(folder, "r.h5", "m-0.8.mask.json", "m-0.5.mask.json")
    page = folder / "report.html"
    moved = folder / "moved.html"  # the last budget, as the arrow keys choose it
    moved.write_text(
        page.read_text().replace(
            "show();\n})();", "slider.value = 2; slider.dispatchEvent(new Event('input'));\n})();"
        )
    )
    for file, share in ((page, 0.8), (moved, 0.5)):
        mask = read_mask(folder / f"m-{share}.mask.json")
        done = browse(file, folder, "--dump-dom")
        assert "CONSOLE" not in done.stderr, done.stderr
        gone = {
            (site, int(unit))
            for site, unit in re.findall(
                r'<g data-site="([^"]+)" data-unit="(\d+)" class="gone"', done.stdout
            )
        }
        assert gone == {
            (name, head)
            for name, kept in mask.keep.items()
            if name.endswith("heads")
            for head in set(range(4)) - set(kept)
        }
        for name in ("blocks.0.neurons", "blocks.2.neurons"):
            assert re.search(
                rf'data-profile="{name}".*?class="kept">{len(mask.keep[name])}/6<', done.stdout, re.DOTALL
            )


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_page_fits_a_desktop_and_a_phone(folder):
    """Nothing but what scrolls in a frame is wider than the window, and the picture is not empty."""
    from PIL import Image

    report(folder, "r.h5")
    page, frames = folder / "report.html", folder / "frames.html"
    frames.write_text(  # Chromium's own windows are 500 pixels wide at least
        "".join(
            f'<iframe width="{width}" height="9000" frameborder="0" srcdoc="{escape(page.read_text())}" '
            'onload="this.name = this.contentDocument.documentElement.scrollWidth"></iframe>'
            for width in (1200, 390)
        )
    )
    found = browse(frames, folder, "--dump-dom").stdout
    assert re.findall(r'width="(\d+)" height="9000"', found) == ["1200", "390"]
    assert re.findall(r'name="(\d+)"', found) == ["1200", "390"]
    browse(page, folder, f"--screenshot={folder / 'shot.png'}", "--hide-scrollbars", "--window-size=390,1600")
    pixels = np.asarray(Image.open(folder / "shot.png").convert("L"))
    assert pixels.shape == (1600, 390)
    assert (pixels < 128).mean() > 0.002 and (pixels > 200).mean() > 0.5
