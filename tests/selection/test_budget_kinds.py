"""Kinds of budgets from outside the package: on heads, on activations, on kernels that compute whole tiles.

Trying all sizes is the oracle. The built-in kinds are checked where masks are.
"""

from __future__ import annotations

import inspect
import json
from itertools import product

import numpy as np
import pytest
from helpers.artefacts import chain_ranking, latency_table
from helpers.cli import run
from helpers.plugins import install
from helpers.selection import kept, macs_of, ranking

import optin_cli as optin
from optin_cli.artefacts.mask import read_mask, write_mask
from optin_cli.artefacts.ranking import write_ranking
from optin_cli.commands.budgets import with_budgets
from optin_cli.errors import BudgetError, UsageError
from optin_cli.main import make_app
from optin_cli.pipeline import check_steps
from optin_cli.selection import budgets
from optin_cli.selection.budget import Budget
from optin_cli.selection.budgets import MIB, Latency, Macs, Memory, Params, register_budget
from optin_cli.selection.select import select
from optin_cli.selection.settings import Request


class Heads(Budget):
    """A share of the heads."""

    name, option = "heads", "--heads"

    def unit_cost(self, case, site):
        return site.kind == "heads"

    def scale(self, case):
        return sum(site.units for site in case.sites if site.kind == "heads")


class Activations(Budget):
    """MiB that the consumers' inputs of all sites take, for a sequence, in float32."""

    name, option, is_share = "activations", "--activations", False

    def unit_cost(self, case, site):
        return 4 * site.width * case.tokens

    def scale(self, case):
        return MIB

    def words(self, relative_to):
        return f"{self.amount:g} MiB of activations"


class Tiles(Budget):
    """Milliseconds of kernels that compute 6 units at a time."""

    name, option, linear, is_share = "tiles", "--tiles", False, False

    def scale(self, case):
        return 1.0

    def fixed(self, case):
        return 2.0

    def costs(self, case, site, counts):
        return 0.5 * np.ceil(counts / 6)


@pytest.fixture
def kinds(monkeypatch):
    """What is registered within a test is gone after it."""
    monkeypatch.setattr(budgets, "_KINDS", dict(budgets._KINDS))
    monkeypatch.setattr(budgets, "_offered", False)


@pytest.fixture
def registered(kinds):
    return register_budget(Heads)


@pytest.fixture
def written(tmp_path):
    write_ranking(tmp_path / "r.h5", ranking())
    return tmp_path / "r.h5"


def best_of(made, allowed) -> float:
    """The best score of all sizes that are `allowed`, as a share of the whole."""
    scores = [np.append(0, np.cumsum(np.sort(site.score)[::-1])) for site in made.sites]
    choices = product(*(range(site.units + 1) for site in made.sites))
    return max(
        sum(s[n] for s, n in zip(scores, counts, strict=True)) for counts in choices if allowed(counts)
    ) / sum(s[-1] for s in scores)


def of_kind(made, counts, kind: str) -> int:
    return sum(n for site, n in zip(made.sites, counts, strict=True) if site.kind == kind)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_a_budget_on_heads_prunes_heads_alone_and_takes_the_best(share):
    made = ranking(blocks=2, neurons=6)
    mask = select(made, Request(budgets=(Heads(share),)))
    left = kept(mask)
    assert sum(n for name, n in left.items() if "heads" in name) == int(share * 8)
    assert all(n == 6 for name, n in left.items() if "neurons" in name)
    best = best_of(made, lambda counts: of_kind(made, counts, "heads") <= share * 8)
    assert mask.objective["kept"] == pytest.approx(best)
    assert mask.objective["optimal"]
    assert mask.budget["heads"] == share and mask.budget["flops"] is None
    assert mask.reached["heads"] == int(share * 8) / 8


def test_it_holds_together_with_a_budget_on_macs():
    made = ranking(blocks=2, neurons=6)
    mask = select(made, Request(flops=0.7, budgets=(Heads(0.5),)))
    macs = made.dense_macs(10.0)

    def allowed(counts) -> bool:
        used = sum(n * s.macs_per_unit(10.0) for n, s in zip(counts, made.sites, strict=True))
        return used <= 0.7 * macs and of_kind(made, counts, "heads") <= 4

    assert macs_of(made, mask) <= 0.7 * macs
    assert mask.objective["kept"] == pytest.approx(best_of(made, allowed))


def test_an_absolute_budget_on_activations():
    made = ranking(blocks=2, neurons=6)
    each = [4 * site.width * 10.0 for site in made.sites]
    room = 0.4 * sum(cost * site.units for cost, site in zip(each, made.sites, strict=True))
    mask = select(made, Request(budgets=(Activations(room / MIB),)))
    best = best_of(made, lambda counts: np.dot(each, counts) <= room)
    assert mask.objective["kept"] == pytest.approx(best)
    used = sum(cost * n for cost, n in zip(each, kept(mask).values(), strict=True))
    assert mask.reached["activations"] == pytest.approx(used / MIB) and used <= room


def test_costs_may_follow_any_curve():
    made = ranking(blocks=2, heads=4, neurons=7)
    mask = select(made, Request(budgets=(Tiles(3.6),)))
    best = best_of(made, lambda counts: 2 + 0.5 * sum(-(-n // 6) for n in counts) <= 3.6)
    assert mask.objective["kept"] == pytest.approx(best)
    assert mask.reached["tiles"] == 2 + 0.5 * sum(-(-n // 6) for n in kept(mask).values()) == 3.5


def test_a_kind_without_pairs_works_beside_layers_between_two_sites():
    class Channels(Heads):
        name, option = "channels", "--channels"

        def unit_cost(self, case, site):
            return 1

        def scale(self, case):
            return sum(site.units for site in case.sites)

    made = chain_ranking(2)
    mask = select(made, Request(flops=0.8, budgets=(Channels(0.6),)))
    assert mask.reached["channels"] == sum(kept(mask).values()) / 15 <= 0.6
    assert mask.reached["flops"] <= 0.8


def test_what_can_t_be_met_is_said_in_its_terms():
    with pytest.raises(BudgetError, match=r"heads=0.1 can't be met: what must stay takes 0\.2500") as caught:
        select(ranking(), Request(budgets=(Heads(0.1),), min_heads=1))
    assert "heads=0.2500" in caught.value.hint
    assert select(ranking(), Request(budgets=(Heads(0.25),), min_heads=1)).reached["heads"] == 0.25


def test_a_share_outside_0_and_1_and_two_budgets_of_one_kind_are_refused():
    with pytest.raises(UsageError, match=r"heads=1.5 is not a fraction"):
        select(ranking(), Request(budgets=(Heads(1.5),)))
    with pytest.raises(UsageError, match=r"two budgets are given for flops"):
        select(ranking(), Request(flops=0.5, budgets=(Macs(0.4),)))


def test_the_mask_is_read_back_and_shown(tmp_path, registered):
    mask = select(ranking(), Request(flops=0.9, budgets=(registered(0.5),)))
    write_mask(tmp_path / "m.json", mask)
    assert read_mask(tmp_path / "m.json") == mask
    assert "0.9 of the dense MACs, 0.5 of the dense heads" in run("inspect", tmp_path / "m.json").stdout


def test_options_are_read_by_their_kinds(registered):
    found = with_budgets(Request(min_heads=1), {"--heads": "0.5, 0.25", "--flops": "0.9"})
    assert list(found) == ["0.5", "0.25"]
    assert [request.asked for request in found.values()] == [
        (Macs(0.9), registered(0.5)), (Macs(0.9), registered(0.25)),
    ]  # fmt: skip
    assert all(request.min_heads == 1 for request in found.values())
    with pytest.raises(UsageError, match=r"heads 'half' is not a number") as caught:
        with_budgets(Request(), {"--heads": "half"})
    assert "write heads=0.6" in caught.value.hint


def test_a_kind_has_its_option_on_the_command_line(registered, written, tmp_path):
    app = make_app()
    for command in ("select", "prune"):
        shown = run(command, "--help", app=app).stdout
        assert "--heads" in shown and "A share of the heads." in shown
    args = ["select", written, "--heads", 0.5, "--flops", 0.9, "-o", tmp_path / "m.json"]
    told = json.loads(run(*args, "--json", app=app).stdout)
    assert told["budget"]["heads"] == 0.5 and told["reached"]["heads"] <= 0.5
    assert "No such option" in run(*args, code=2).stderr  # of an app that was made before
    refused = run("select", written, "--heads", 2, "-o", tmp_path / "n.json", code=2, app=app)
    assert "--heads 2 is not a fraction" in refused.stderr


def test_a_kind_that_takes_another_option_s_name_is_refused(kinds):
    class Split(Heads):
        option = "--split"

    register_budget(Split)
    with pytest.raises(UsageError, match="two options of one command set split"):
        make_app()


def test_a_package_offers_a_kind(kinds, written, tmp_path, monkeypatch):
    code = f"from optin_cli import Budget\n\n\n{inspect.getsource(Heads)}"
    install(tmp_path / "site", monkeypatch, code, budgets.ENTRY_POINTS, "heads = otherpackage:Heads")
    app = make_app()
    run("select", written, "--heads", 0.5, "-o", tmp_path / "m.json", app=app)
    assert read_mask(tmp_path / "m.json").reached["heads"] == 0.5
    assert "0.5 of the dense heads" in run("inspect", tmp_path / "m.json", app=app).stdout


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("heads = nosuchpackage:Heads", "No module named 'nosuchpackage'"),
        ("heads = otherpackage:Nothing", "Nothing"),
        ("necks = otherpackage:Heads", "not a Budget with the option --necks"),
    ],
)
def test_what_a_package_offers_in_vain_says_so_once_it_is_asked_for(
    kinds, written, tmp_path, monkeypatch, entry, why
):
    code = f"from optin_cli import Budget\n\n\n{inspect.getsource(Heads)}"
    install(tmp_path / "site", monkeypatch, code, budgets.ENTRY_POINTS, entry)
    app, name = make_app(), entry.partition(" ")[0]
    assert "Can't be used" in run("select", "--help", app=app).stdout
    run("select", written, "--flops", 0.5, "-o", tmp_path / "m.json", app=app)
    told = run("select", written, f"--{name}", 0.5, "-o", tmp_path / "n.json", code=1, app=app).stderr
    assert why in " ".join(told.split()) and f"for --{name}" in told


def test_budgets_of_any_kind_from_python(kinds):
    made = ranking()
    assert optin.select(made, budgets=[Macs(0.6)]) == optin.select(made, flops=0.6)
    assert optin.select(made, flops=0.9, budgets=[Heads(0.5)]).reached["heads"] <= 0.5


def test_a_kind_can_t_take_a_built_in_one_s_place():
    class Flops(Heads):
        option = "--flops"

    class Milliseconds(Heads):
        option = "--latency_ms"

    for kind in (Flops, Milliseconds):
        with pytest.raises(UsageError, match=kind.option):
            register_budget(kind)


def test_steps_ease_shares_and_leave_amounts_for_the_last():
    check_steps(2, Request(budgets=(Heads(0.5),)))
    with pytest.raises(UsageError, match="a budget that is a share"):
        check_steps(2, Request(budgets=(Activations(0.5),)))
    assert Heads(0.25).eased(0.5) == Heads(0.5)
    assert [b.eased(0.5) for b in (Activations(1.0), Memory(60.0), Latency(9.0, ms=True))] == [None] * 3
    assert Latency(0.25).eased(0.5) == Latency(0.5)


@pytest.mark.parametrize(
    ("text", "kind", "budget"),
    [
        ("0.6", Macs, Macs(0.6)),
        ("0.6", Params, Params(0.6)),
        ("60", Memory, Memory(60.0)),
        ("1.5GiB", Memory, Memory(1536.0)),
        ("0.6", Latency, Latency(0.6)),
        ("12.5ms", Latency, Latency(12.5, ms=True)),
    ],
)
def test_the_built_in_kinds_read_their_options_and_what_they_wrote(text, kind, budget):
    assert kind.parse(text) == budget
    assert kind.recorded({budget.key: budget.amount, "relative_to": "dense"}) == [budget]
    assert kind.recorded(dict.fromkeys(kind.entries())) == []


def test_budgets_by_name_and_as_objects_give_the_same_mask():
    made = ranking()
    table = latency_table(made.sites)
    named = Request(flops=0.6, params=0.9, memory=0.03, latency=0.7, latency_ms=5.0, table=table)
    objects = Request(table=table, budgets=named.asked)
    assert objects.asked == named.asked
    assert select(made, objects) == select(made, named)
    assert Request(table=table, flops=0.1).with_budgets(named.asked) == named
