"""The figures of README.md and docs/ are those of bench/results."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from markdown_blocks import PAGES, ROOT

sys.path.insert(0, str(ROOT))  # `bench` is run from the repository's root and is not installed
pytest.importorskip("bench", reason="the sources have no bench/")

from bench import tables
from bench.diagrams import backward_items, cache_slots, forward_pipeline, key_tiles, roofline, style
from bench.pictures import Picture
from longgen_kernels import AttentionPattern
from longgen_kernels.cache_layout import CacheLayout

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
        if record["status"] == "ok":
            record["median_us"] = changed.get(record["peer"], record["median_us"])
    path.write_text(json.dumps(data))
    return path


def test_another_figure_is_another_table_and_picture(tmp_path: Path) -> None:
    table = next(table for table in tables.TABLES if table.name == "decode")
    medians = {"cuda": 1.04, "cuda_append": 2.0, "cuda_fp8": 3.04, "cudnn": 99.04, "cudnn_append": 7.0, "fa2_sdpa": 4.0}
    figures = tables.figures_of(figures_file(tmp_path / "results.json", **medians))
    assert "| 2048, 32 | 1.0 | 2.0 | 3.0 | 99.0 | 7.0 | 4.0 |" in table.markdown(figures).splitlines()
    page = (ROOT / table.page).read_text()
    names = tables.tables()[table.page]
    assert tables.filled_in(table.page, page, names) == page
    assert tables.filled_in(table.page, page, {**names, "decode": table.markdown(figures)}) != page


def test_the_last_column_may_be_a_quotient() -> None:
    table = next(table for table in tables.TABLES if table.name == "model")
    figures = {
        (case, peer, "model"): x for peer, x in (("hybrid", 2.0), ("dense", 5.0)) for case in table.rows.values()
    }
    assert "| reading the prompt, s | 2.0 | 5.0 | 2.50 |" in table.markdown(figures).splitlines()


def test_a_table_without_figures_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"h200-attention-fwd\.json: no figure for .*cuda, cudnn, flex"):
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


def test_every_picture_has_a_place_and_an_alternative_text() -> None:
    shown: dict[str, list[str]] = {}
    for page in PAGES:
        for text, name in re.findall(
            r"!\[([^\]]*)\]\((?:docs/|\.\./)?images/([\w-]+)\.png\)", (ROOT / page).read_text()
        ):
            shown.setdefault(name, []).append(text)
    drawn = {picture.name for picture in tables.drawings()}
    assert {path.stem for path in (ROOT / "docs" / "images").glob("*.png")} == drawn
    assert drawn - set(shown) <= {"backward"}  # whose bars are a table of the README
    assert not [name for name, texts in shown.items() if any(len(text.split()) < 5 for text in texts)]


WIDER = AttentionPattern.strided(3, 16, window=41, sink=16)


@pytest.mark.parametrize(
    ("diagram", "name", "value"),
    [
        (forward_pipeline, "ITEMS", ((0, 1, 2, 3), (0,))),
        (forward_pipeline, "size", lambda file, name: style.size(file, name) + (name == "kKeyStages")),
        (key_tiles, "EXAMPLES", key_tiles.EXAMPLES[:1]),
        (key_tiles, "size", lambda file, name: 64),
        (backward_items, "PATTERN", AttentionPattern.sink_window(sink=128, window=384)),
        (backward_items, "size", lambda file, name: 32 if name == "kShortestChunk" else style.size(file, name)),
        (cache_slots, "PATTERN", WIDER),
        (cache_slots, "LAYOUT", CacheLayout(WIDER, ring=80)),
        (roofline, "PEAK_TBPS", 4.9),
    ],
)
def test_a_diagram_of_something_else_is_stale(
    diagram: ModuleType, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = diagram.picture()
    path = ROOT / "docs" / "images" / f"{picture.name}.png"
    assert picture.is_up_to_date(path)
    monkeypatch.setattr(diagram, name, value)
    assert not diagram.picture().is_up_to_date(path)


def test_a_diagram_drawn_by_other_code_is_stale() -> None:
    """Its words and shapes stand there."""
    one, other = (style.diagram("picture", "the same", module.drawn) for module in (key_tiles, cache_slots))
    assert one.fingerprint != other.fingerprint


def test_the_roofline_is_of_the_result_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = roofline.picture()
    results = tmp_path / "results"
    shutil.copytree(tables.RESULTS, results, ignore=shutil.ignore_patterns("development"))
    monkeypatch.setattr(roofline, "RESULTS", results)
    assert roofline.picture().fingerprint == before.fingerprint
    figures_file(results / "h200-decode.json", cudnn=99.0)
    assert roofline.picture().fingerprint != before.fingerprint
    text = (results / "h200-decode.json").read_text()
    (results / "h200-decode.json").write_text(text.replace('"cudnn"', '"another"'))
    with pytest.raises(ValueError, match=r"figures of 'another'; .*PEERS has no name"):
        roofline.picture()


def test_points_of_the_roofline() -> None:
    """Sixteen thousand tokens under dense causal attention; a token that reads 2048 keys."""
    pairs, tensors = 16384 * 16385 // 2 * 32, 16384 * 32 * 128 * 2
    lse = 16384 * 32 * 4
    dense = {(p.peer, p.which): p.flops_per_byte for p in roofline.attention_points() if p.flops_per_byte > 4000}
    per_byte = {p.flops_per_byte for p in roofline.attention_points()}
    assert ("cuda", "fwd") in dense
    assert 4 * 128 * pairs / (4 * tensors + lse) in per_byte
    assert 10 * 128 * pairs / (8 * tensors + lse) in per_byte
    record = {"case": "gqa_2048", "peer": "cuda", "status": "ok", "kept": 2048, "bytes": 2 * 2048 * 8 * 128 * 2}
    (point,) = roofline.decode_points([{**record, "median_us": 10.0}])
    assert (point.flops_per_byte, point.tflops) == (4.0, pytest.approx(4 * 2048 * 32 * 128 / 10e-6 * 1e-12))


@pytest.mark.parametrize(("stages", "ring"), [((1, 3, 2), "Q"), ((2, 1, 2), "K")])
def test_the_pipeline_finds_a_deadlock(stages: tuple[int, int, int], ring: str) -> None:
    with pytest.raises(ValueError, match=rf"so few stages of {ring} \(1\) the producer would wait"):
        forward_pipeline.play(*stages)


def test_sizes_are_read_from_csrc() -> None:
    assert style.size("sm90/fwd/traits.cuh", "kBlockM") == 128
    with pytest.raises(ValueError, match=r"csrc/sm90/fwd/traits\.cuh defines no kMathWarpgroups by a number"):
        style.size("sm90/fwd/traits.cuh", "kMathWarpgroups")


@pytest.mark.parametrize("stages", [(2, 3, 2), (2, 4, 1)])
def test_the_pipeline_could_be(stages: tuple[int, int, int]) -> None:
    """Nothing does two things at once, each product waits for its operands, and softmax runs beside products."""
    spans = forward_pipeline.play(*stages).spans
    by_row: dict[str, list[forward_pipeline.Span]] = {}
    for span in spans:
        by_row.setdefault(span.row, []).append(span)
    assert len([row for row in by_row if "stage" in row]) == sum(stages)
    for row in by_row.values():
        row.sort(key=lambda span: (span.start, span.end))
        assert all(before.end <= after.start for before, after in itertools.pairwise(row))

    there = {span.text: span.start for span in spans if "stage" in span.row and span.text}
    cores = by_row["tensor cores"]
    for product in cores:
        operand = product.text.replace("S", "K").replace("PV", "V")
        assert product.start >= there[operand]
    softmax = {(span.row, span.text): span for span in spans if span.text.startswith("softmax")}
    for product in cores:
        if product.text.startswith("S"):
            of_tile = softmax[product.kind, product.text.replace("S", "softmax")]
            assert of_tile.start >= product.end
    others = [
        s for s in softmax.values() if any(c.kind != s.row and s.start < c.end and c.start < s.end for c in cores)
    ]
    assert len(others) > len(softmax) / 2
