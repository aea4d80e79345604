"""The paper's caption templates: how many, each with one place for the word, and the text as published."""

from pathlib import Path

import pytest
from conftest import ROOT

from tinyldm.templates import OBJECT_TEMPLATES, STYLE_TEMPLATES

PUBLISHED = {  # the files that hold them, one template a line, beside the checkout
    ROOT.parent / "shared" / "templates-object.txt": OBJECT_TEMPLATES,
    ROOT.parent / "shared" / "templates-style.txt": STYLE_TEMPLATES,
}


@pytest.mark.parametrize("templates, count", [(OBJECT_TEMPLATES, 27), (STYLE_TEMPLATES, 19)], ids=["object", "style"])
def test_as_many_as_the_paper_has_and_each_has_one_place_for_the_word(templates, count):
    assert len(templates) == count  # two of the styles are there twice, as published
    assert all(template.count("{}") == template.count("{") == template.count("}") == 1 for template in templates)


@pytest.mark.skipif(not all(file.exists() for file in PUBLISHED), reason="../shared has no lists of templates")
@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_they_are_the_published_ones_in_their_order(file: Path):
    assert tuple(file.read_text(encoding="utf-8").splitlines()) == PUBLISHED[file]
