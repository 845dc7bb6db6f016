"""Ranks and whole sublayers in rankings and masks: what is read is what was written, and what can't be is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import h5py
import numpy as np
import pytest
from helpers.rankings import refused, resealed
from helpers.selection import ranking

from optin_cli.artefacts.mask import mask_to_json, read_mask, write_mask
from optin_cli.artefacts.ranking import read_ranking, write_ranking
from optin_cli.artefacts.site_losses import SiteLosses
from optin_cli.errors import ArtefactError
from optin_cli.selection.select import select


def made():
    rng = np.random.default_rng(0)
    whole = ranking()
    ranks = [
        SiteLosses(site.name, [1, 2], rng.random((site.width, 2)), rng.random(site.width))
        for site in whole.sites
        if site.kind == "heads"
    ]
    sublayers = [SiteLosses(one.site, [1, 2], one.trajectory[:1], one.output[:1]) for one in ranks]
    return replace(whole, rank_sites=ranks, sublayers=sublayers)


def test_ranks_and_sublayers_come_back_and_are_part_of_the_digest(tmp_path):
    write_ranking(tmp_path / "r.h5", made())
    found = read_ranking(tmp_path / "r.h5")
    for part in ("rank_sites", "sublayers"):
        for one, two in zip(getattr(found, part), getattr(made(), part), strict=True):
            assert (one.site, one.columns) == (two.site, two.columns)
            np.testing.assert_array_equal(one.trajectory, two.trajectory)
            np.testing.assert_array_equal(one.output, two.output)
        assert found.digest == made().digest != replace(made(), **{part: []}).digest


@pytest.mark.parametrize("part", ["ranks", "sublayers"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda group: group["blocks.0.heads/output"].__setitem__(0, np.nan), "are not finite"),
        (lambda group: group.move("blocks.0.heads", "blocks.9.heads"), "no such site"),
        (lambda group: group["blocks.0.heads"].__delitem__("output"), "output is missing"),
    ],
)
def test_damaged_losses_are_named(part, damage, said, tmp_path):
    path = tmp_path / "r.h5"
    write_ranking(path, made())
    with h5py.File(path, "r+") as file:
        damage(file[part])
    assert said in refused(resealed(path))


def test_changed_losses_are_damage(tmp_path):
    path = tmp_path / "r.h5"
    write_ranking(path, made())
    with h5py.File(path, "r+") as file:
        file["sublayers/blocks.0.heads/output"][0] += 1
    assert "does not match its checksum" in refused(resealed(path))


def test_masks_of_before_ranks_are_read_with_the_digest_they_had(tmp_path):
    mask = select(ranking(), 0.5)
    write_mask(tmp_path / "m.json", mask)
    old = json.loads(mask_to_json(mask))
    del old["ranks"]
    old["schema_version"] = 3
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert read_mask(tmp_path / "old.json") == read_mask(tmp_path / "m.json") == mask
    assert read_mask(tmp_path / "old.json").digest == mask.digest


@pytest.mark.parametrize("ranks", [{"blocks.0.heads": -1}, {"blocks.0.heads": 1.5}, {"blocks.7.heads": 2}])
def test_ranks_that_are_none_damage_a_mask(ranks, tmp_path):
    mask = select(made(), 0.5)
    data = json.loads(mask_to_json(mask)) | {"ranks": ranks}
    (tmp_path / "m.json").write_text(json.dumps(data))
    with pytest.raises(ArtefactError, match="is not a rank of blocks"):
        read_mask(tmp_path / "m.json")
