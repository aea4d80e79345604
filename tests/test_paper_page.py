"""The page and its plots, of a few cells made by hand."""

import re
import sys
from collections.abc import Iterator

import pytest
from PIL import Image
from test_paper_table import line

from tinyldm import InputError
from tinyldm.lab.paper import table as tables
from tinyldm.lab.paper.page import Page, in_short, write_page
from tinyldm.lab.paper.plots import in_lines, new_figure, points_of
from tinyldm.lab.paper.table import mean, table_of
from tinyldm.latent_diffusion import Learning

CONCEPTS = ("purple star", "yellow bolt", "face")
REFERENCES = {
    "image only": {"reconstruction": 0.95, "editability": 0.1},
    "prompt only": {"reconstruction": 0.2, "editability": 0.9},
}


def learned(recipe, concept, value, seconds=30.0, seed=0):
    times = [[50, seconds / 3], [150, seconds]]
    return line(recipe, concept, value, seed, norm=2.0, steps=150, seconds=seconds, times=times)


def curve(recipe, concept, steps=(50, 150)):
    return {"recipe": recipe, "concept": concept, "points": [line(recipe, concept, 0.4, steps=done) for done in steps]}


USUAL = Learning("thing", "falling", 7), Learning("art", "paper", 9)
CELLS = [
    *(
        learned("paper", concept, value, seed=seed)
        for concept, value in zip(CONCEPTS, (0.5, 0.6, 0.7), strict=True)
        for seed in (0, 1)
    ),
    *(learned("falling", concept, value, 20.0) for concept, value in zip(CONCEPTS, (0.61, 0.69, 0.83), strict=True)),
    *(learned("2-word", concept, value, 12.0) for concept, value in zip(CONCEPTS, (0.7, 0.65, 0.77), strict=True)),
    *(line("untrained", concept, 0.1, norm=1.0, references=REFERENCES) for concept in CONCEPTS),
    line("plain words", "purple star", 0.9, norm=1.1),
]
CURVES = [curve("falling", "face"), curve("falling", "yellow bolt")]


@pytest.fixture(scope="module", autouse=True)
def three_concepts_decide() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "FEW", 3)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    write_page(Page(CELLS, CURVES, USUAL, "reporting"), out)
    return out


@pytest.fixture
def page(folder):
    """Its text."""
    return (folder / "README.md").read_text()


def test_the_page_says_which_recipe_to_use_and_why(page):
    text = " ".join(page.split())
    assert (
        "`falling` comes first of 3, which is partly luck: 85.5% (80.5% to 91.5%), where a word that has not learned "
        "has 55.0%." in text
    )
    assert "as the interval of the difference holds 0: `2-word`. The quickest of these is `2-word`: 12 seconds" in text
    assert (
        "with 1 to 2 seeds a concept" in text
        and "whose recipe" not in text
        and "without any options: an object in 7 steps of `falling`, and a style in 9 steps of `paper`." in text
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            (0.3, 0.4, 0.5),
            "by +15.5 points (+14.5 to +16.5), most of it at the face (+16.5) and the purple star (+15.5). So it is "
            "better. **Begin with `train.py --recipe falling --steps 150 --batch 16 --lr 0.01`.**",
        ),
        (
            (0.65, 0.68, 0.78),
            "leads `default`, `train.py` without any options, by +0.3 points (-2.0 to +2.5), most of it at the face "
            "(+2.5) and the yellow bolt (+0.5). Whether it is better is not decided. **Begin with `train.py` without",
        ),
        ((0.6, 0.69, 0.82), "So they are equal. **Begin with `train.py` without any options**."),
        ((0.9, 0.9, 0.9), "`default` comes first of 4"),
    ],
)
def test_the_default_is_told_by_how_far_the_best_leads(values, said):
    cells = [*CELLS, *(learned("default", concept, value) for concept, value in zip(CONCEPTS, values, strict=True))]
    text = " ".join(in_short(table_of(cells)).split())
    assert said in text and "Begin with" in text
    assert "leads" not in in_short(table_of(CELLS))


def test_one_concept_decides_nothing():
    cells = [cell for cell in CELLS if cell["concept"] == "face"] + [learned("default", "face", 0.5)]
    text = " ".join(in_short(table_of(cells)).split())
    assert "holds 0: `2-word`, `paper`, `default`." in text and "Whether it is better is not decided" in text


def test_the_editability_of_a_style_counts_by_itself(tmp_path):
    cells = [learned("paper", concept, 0.5) for concept in CONCEPTS] + [learned("paper", "blueprint", 0.9)]
    table = table_of(cells)
    assert mean(table, "paper", "editability")[::3] == (0.5, 3)
    assert mean(table, "paper", "editability of a style")[::3] == (pytest.approx(0.1), 1)
    write_page(Page(cells, [], USUAL, "reporting"), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| recipe | combination (1) | shape (1) | figure (1) | style (1) | editability of a style |" in text
    assert "| `paper` | 75 | 75 | 75 | 95 | 0.100 |" in text  # of so few no interval is told
    alone = [*CELLS, learned("pairs", "blueprint", 0.5)]  # it has no editability of a thing
    write_page(Page(alone, [], USUAL, "reporting"), tmp_path)


def test_plain_words_have_the_papers_own_way_on_the_same_concepts_beside_them(page):
    assert "On those concepts `paper` has 75.0% (75.0% to 75.0%), 0.500" in " ".join(page.split())


def test_claims_come_with_their_numbers_and_verdicts(page):
    assert "- `2-word` minus `paper`, reconstruction, expected higher: +0.107 (+0.050 to +0.200): **agrees**" in page
    assert "- `2-word` minus `paper`, editability, expected lower: -0.107 (-0.200 to -0.050): **agrees**" in page
    assert (
        "`falling` minus `paper`, what is checked is right, expected higher: +5.5 points (+4.5 to +6.5): **agrees**"
        in page
    )
    assert "`regularised` minus" not in page and "near known words by regularisation" not in page  # it was not measured


def test_tables_have_a_row_for_each_recipe_and_reference(page):
    rows = dict(re.findall(r"^\| (?:`([^`]+)` |)(.+) \|$", page, re.MULTILINE))
    assert {"paper", "falling", "2-word"} <= rows.keys()
    table = page[page.index("## The table") : page.index("## Against")]
    names = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
    assert names == [
        "recipe",
        "---",
        "`falling`",
        "`2-word`",
        "`paper`",
        "image only",
        "prompt only",
        "plain words",
        "untrained",
    ]
    assert (
        "| `paper` | 80.0% (75.0% to 85.0%) | 0.600 (0.500 to 0.700) | 0.400 (0.300 to 0.500) | 2.0 | 150 | 30 |"
        in table
    )
    assert "plain words for those 1 concepts" in " ".join(table.split())
    against = page[page.index("## Against") : page.index("## What is right, by kind")]
    assert "| `falling` | **+5.5 (+4.5 to +6.5)** |" in against and "| `paper` |" not in against
    shares = page[page.index("## What their pictures") : page.index("## How long")]
    assert (
        "| recipe | likeness (3) | colours (3) | edits (3) | two (3) |" in shares
        and "| `paper` | 60 ±10 | 60 ±10 | 100 ±0 | 100 ±0 |" in shares
    )


def test_pictures_that_are_shown_are_there_and_no_line_is_too_long(page, folder):
    shown = re.findall(r"!\[[^\]]+\]\((.+)\)", page)
    assert shown == ["scatter.png", "norms.png", "curves.png"]
    assert all(Image.open(folder / file).width > 500 for file in shown)
    assert max(len(text) for text in page.splitlines() if text[:1] not in "|-    ") <= 120


def test_a_recipe_with_options_is_explained_and_plots_break_its_name(page, tmp_path):
    name = 'low-variance --init "striped halved square" --vectors 3 --steps 600'
    write_page(Page([*CELLS, *(learned(name, concept, 0.6) for concept in CONCEPTS)], [], USUAL, "reporting"), tmp_path)
    said = "Options in a recipe's name, which `--only` was given, take the place of these."
    assert said in " ".join((tmp_path / "README.md").read_text().split()) and "take the place of these" not in page
    assert in_lines(name) == 'low-variance --init "striped halved square"\n--vectors 3 --steps 600'


def test_without_curves_strips_or_the_papers_own_recipe_their_parts_are_left_out(tmp_path):
    cells = [cell for cell in CELLS if cell["recipe"] in ("falling", "2-word", "untrained")]
    (tmp_path / "strips.png").write_bytes(b"")
    write_page(Page(cells, [], USUAL, "choosing"), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "Against the paper" not in text and "curves.png" not in text and "](strips.png)" in text
    assert "there to choose settings by" in " ".join(text.split())


def test_a_recipe_with_fewer_concepts_says_so(tmp_path):
    write_page(Page([*CELLS, learned("pairs", "face", 0.99)], [], USUAL, "reporting"), tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| `pairs` (1 of 3 concepts) |" in text and "`falling` comes first of 3" in " ".join(text.split())


def test_a_point_of_a_curve_is_the_mean_over_concepts_at_the_time_of_its_cells():
    cells = [learned("falling", "face", 0.5, 30.0), learned("falling", "yellow bolt", 0.5, 60.0)]
    points = points_of([*CURVES, curve("falling", "purple star")], cells)[
        "falling"
    ]  # of the last no cell tells the time
    assert [(point["steps"], point["seconds"]) for point in points] == [(50, 15.0), (150, 45.0)]
    assert points[0]["right"] == pytest.approx(0.7) and points[0]["reconstruction"] == 0.4


def test_without_matplotlib_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=re.escape('type pip install -e ".[plot]"')):
        new_figure(1, 1)


def test_a_page_of_a_table_that_is_not_finished_says_so(page, tmp_path):
    write_page(Page(CELLS, [], USUAL, "reporting", missing=7), tmp_path)
    text = " ".join((tmp_path / "README.md").read_text().split())
    assert "**7 words are still to be learned and scored**; the same command goes on." in text
    assert "still to be learned" not in page
