"""Rows with images: each loss against a plain forward of the row alone, for two families of models."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import ROUNDING
from vision_models import FAMILIES, build, by_hand, image_rows

from ifd_trainer import ImageIFDScorer

MODELS = {family: build(family) for family in FAMILIES}


def columns(scorer, rows) -> dict[str, list]:
    return scorer({name: [row.get(name) for row in rows] for name in rows[0]})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("without", ["both", "image"])
def test_losses_are_those_of_plain_forwards(family, without):
    model, processor = MODELS[family]
    rows = image_rows(5) + [{**row, "row_id": 200} for row in image_rows(1, images=2)]
    found = columns(ImageIFDScorer(model, processor, without=without, batch_size=3), rows)
    assert found["ifd_status"] == ["ok"] * 6
    cas, qas, das = (
        np.array([by_hand(model, processor, row, given) for row in rows]) for given in ("both", "question", "nothing")
    )
    direct = das if without == "both" else qas
    np.testing.assert_allclose(found["cas"], cas, rtol=ROUNDING)
    np.testing.assert_allclose(found["das"], direct, rtol=ROUNDING)
    np.testing.assert_allclose(found["qas"], qas, rtol=ROUNDING)
    np.testing.assert_allclose(found["ifd"], cas / direct, rtol=2 * ROUNDING)
    np.testing.assert_allclose(found["image_gain"], qas - cas, atol=20 * ROUNDING)
    assert np.abs(qas - cas).min() > 1e-3, "the images make a difference"
