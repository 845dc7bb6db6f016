"""The pages say what the program does: every command, option and name is on one, and what they show exists."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from helpers.pages import DOCS, ROOT, blocks, commands_in, pages, script

import optin_cli as optin

PAGES = pages()
CLI = script("cli_page")
OPTIONS = {
    command: {name for one in CLI.parameters(command) if not one.argument for name in one.names}
    for command in CLI.commands()
}
EVERY_OPTION = set().union(*OPTIONS.values(), {"-h", "--help", "--version"})
# options of other programs: torchrun, accelerate, the benchmarks, pip
OTHERS = {"--nproc-per-node", "--multi_gpu", "--models", "--shared", "--only", "--constraint", "--damaged",
          "--signals", "--disks", "--soak"}  # fmt: skip
_TEXT = {name: text for name, text in PAGES.items() if name != "docs/cli.md"}


# ---- the reference ----


def test_the_reference_of_the_command_line_is_what_the_app_has():
    assert CLI.PAGE.read_text() == CLI.page(), "run python docs/cli_page.py"


@pytest.mark.parametrize("command", OPTIONS)
def test_every_command_and_option_is_in_the_reference(command):
    section = PAGES["docs/cli.md"].split(f"\n## optin {command}\n")[1].split("\n## ")[0]
    assert OPTIONS[command]
    for option in OPTIONS[command]:
        assert re.search(rf"^\|.*`{option}[ `].*\|", section, re.MULTILINE), option


def test_a_new_option_would_change_the_reference(monkeypatch):
    """The page's test can fail: it follows the app."""
    name, command = next(iter(CLI.commands().items()))
    before = CLI.section(name)
    monkeypatch.setattr(CLI, "parameters", lambda name, all_of=CLI.parameters: all_of(name)[:-1])
    assert CLI.section(name) != before and command.help


@pytest.mark.parametrize("command", OPTIONS)
def test_every_command_is_explained_outside_the_reference(command):
    assert any(f"optin {command}" in text for text in _TEXT.values())


@pytest.mark.parametrize("name", [name for name in optin.__all__ if name != "__version__"])
def test_every_public_name_is_on_a_page(name):
    assert re.search(rf"^### `{name}`$", PAGES["docs/api.md"], re.MULTILINE)


# ---- what pages show ----


@pytest.mark.parametrize("page", PAGES)
def test_commands_on_pages_have_the_options_they_show(page):
    for _, code in blocks(PAGES[page]):
        for line in commands_in(code):
            command, *rest = line.split()
            if command.isupper() or command.startswith("-"):
                continue
            assert command in OPTIONS, line
            wrong = set(re.findall(r"(?<!\S)--?[a-z][\w-]*", " ".join(rest))) - OPTIONS[command]
            assert not wrong, f"optin {line}: no option {wrong}"


def test_pages_show_each_command():
    shown = Counter(
        line.split()[0] for page in PAGES.values() for _, c in blocks(page) for line in commands_in(c)
    )
    assert set(OPTIONS) <= set(shown)


@pytest.mark.parametrize("page", _TEXT)
def test_options_in_the_text_exist(page):
    named = set(re.findall(r"`(--[a-z][\w-]*)", _TEXT[page]))
    named |= set(re.findall(r"`optin [^`]*?(--[a-z][\w-]*)", _TEXT[page]))
    assert named - EVERY_OPTION - OTHERS == set()


@pytest.mark.parametrize("page", PAGES)
def test_python_on_pages_is_python_and_uses_names_there_are(page):
    for language, code in blocks(PAGES[page]):
        if language == "python":
            compile(code, page, "exec")
            assert set(re.findall(r"\boptin\.([A-Za-z_]\w*)", code)) <= set(optin.__all__)
    called = set(re.findall(r"`optin_cli\.(\w+)[(`]", PAGES[page]))
    assert called <= set(optin.__all__)


# ---- links ----


def slug(heading: str) -> str:
    """The anchor of a heading, on GitHub and on the site."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", heading)
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain.strip().lower()))


def anchors(text: str) -> set[str]:
    without_code = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", without_code, re.MULTILINE)}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "benchmarks/RESULTS.md"])
def test_relative_links_lead_somewhere(page):
    text = PAGES.get(page) or (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


def test_every_page_is_in_the_menu_and_what_is_in_it_exists():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def named(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [name for one in (entry if isinstance(entry, list) else entry.values()) for name in named(one)]

    menu = named(config["nav"])
    elsewhere = script("hooks").ELSEWHERE
    assert len(menu) == len(set(menu))
    assert set(menu) == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} | set(elsewhere)
    assert all((ROOT / source).is_file() for source in elsewhere.values())


def test_the_method_has_the_sections_that_code_and_tests_cite():
    sections = set(re.findall(r"^## (\d+)\. ", (DOCS / "method.md").read_text(), re.MULTILINE))
    cited = Counter()
    for folder in ("optin_cli", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            if path != Path(__file__):
                text = path.read_text()
                cited.update(re.findall(r"docs/method\.md,\s+section (\d+)", text))
                assert not re.search(r"\bMETHOD,? section", text), path
    assert set(cited) <= sections and cited.total() >= 15


def test_the_readme_can_be_read_in_a_sitting():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


# ---- how the checks read ----


def test_blocks_and_commands_are_found():
    page = "text\n\n    optin score M --data D   # why\n\n```make\n%.json:\n\toptin select $< -o $@\n```\n\n- item\n"
    page += "```sh\nOMP=1 torchrun -m optin_cli score M | tee\nx=$(optin apply M m.json -q)\n```\n"
    found = blocks(page)
    assert [language for language, _ in found] == ["", "make", "sh"]
    shown = [line for _, code in found for line in commands_in(code)]
    assert shown == ["score M --data D", "select $< -o $@", "score M", "apply M m.json -q"]
    assert slug("`--memory` and [links](a.md): 2") == "--memory-and-links-2"


# ---- promises ----


def test_every_promise_names_a_test_that_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGES["docs/reliability.md"])
    assert len(named) > 20
    for file, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{name}"
