"""The figures of README.md and docs/ are those of bench/results."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from markdown_blocks import PAGES, ROOT

sys.path.insert(0, str(ROOT))  # `bench` is run from the repository's root and is not installed
pytest.importorskip("bench", reason="the sources have no bench/")

from bench import tables
from bench.pictures import Picture

# Pages with figures of their own: development notes, which name the files they quote; a table that another test holds.
NOTES = ("docs/hopper-forward.md", "docs/hopper-backward.md", "docs/triton-kernels.md")
HELD_ELSEWHERE = ("docs/context_parallel.md",)


def test_pages_and_pictures_are_what_the_result_files_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("page", [page for page in PAGES if page not in (*NOTES, *HELD_ELSEWHERE)])
def test_no_other_table_has_figures(page: str) -> None:
    text = re.sub(r"<!-- table: .*?<!-- end of table -->", "", (ROOT / page).read_text(), flags=re.DOTALL)
    cells = [cell.strip(" *") for line in text.splitlines() if line.startswith("|") for cell in line.split("|")]
    assert not [cell for cell in cells if re.fullmatch(r"[\d.,%]+( / [\d.,%]+)?", cell)], "give it to bench.tables"


@pytest.mark.parametrize("page", NOTES)
def test_notes_name_the_files_that_they_quote(page: str) -> None:
    named = re.findall(
        r"`((?:bench/results/)?development(?:/[\w.-]+)?|bench/results/development)`", (ROOT / page).read_text()
    )
    assert named
    for name in named:
        assert (ROOT / "bench" / "results" / name.removeprefix("bench/results/")).exists(), name


def figures_file(path: Path, **changed: float) -> Path:
    """The decode results with other medians for the peers that are named."""
    data = json.loads((tables.RESULTS / "h200-decode.json").read_text())
    for record in data["records"]:
        record["median_us"] = changed.get(record["peer"], record["median_us"])
    path.write_text(json.dumps(data))
    return path


def test_another_figure_is_another_table_and_picture(tmp_path: Path) -> None:
    table = next(table for table in tables.TABLES if table.name == "decode")
    medians = {"cuda": 1.04, "cuda_append": 2.0, "cudnn": 99.04, "fa2_sdpa": 4.0}
    figures = tables.figures_of(figures_file(tmp_path / "results.json", **medians))
    assert "| 2048, 32 | 1.0 | 2.0 | 99.0 | 4.0 |" in table.markdown(figures).splitlines()
    page = (ROOT / table.page).read_text()
    names = tables.tables()[table.page]
    assert tables.filled_in(table.page, page, names) == page
    assert tables.filled_in(table.page, page, {**names, "decode": table.markdown(figures)}) != page


def test_a_table_without_figures_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"h200-attention-fwd\.json has no figure for .*cuda, cudnn, flex"):
        tables.TABLES[0].markdown({})


@pytest.mark.parametrize(
    "text", ["no place", "<!-- table: forward -->\n<!-- end of table -->\n<!-- table: other -->\n<!-- end of table -->"]
)
def test_every_table_has_one_place(text: str) -> None:
    with pytest.raises(ValueError, match=r"README\.md has places for"):
        tables.filled_in("README.md", text, {"forward": "| |"})


def test_a_picture_is_known_by_what_it_shows(tmp_path: Path) -> None:
    picture = tables.drawings()[-1]
    path = tmp_path / "picture.png"
    assert not picture.is_up_to_date(path)
    picture.save(path)
    assert picture.is_up_to_date(path)
    assert not Picture(picture.name, picture.shows + " and more", picture.draw).is_up_to_date(path)
