"""The page, its figures and its tables, and the page in a browser. Run: pytest tests/report/test_page.py

The browser tests need Debian's chromium: apt-get install --no-install-recommends chromium fonts-dejavu-core
"""

import csv
import io
import json
import math
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fontTools.ttLib import TTFont
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from summaries import EVIL, contrast, curves_of, many, quickstart, write_run
from test_tasks import three_tasks

from cola.compare.ablation_records import Ablation
from cola.compare.records import Interval, Spread, Summary
from cola.compare.tasks import summarize_tasks
from cola.report.charts import PRICES, costs_of, pareto
from cola.report.drawing import Look, clipped, looks, new_figure, save, settle, svg
from cola.report.figures import FIGURES, figures_of
from cola.report.forest import p_text
from cola.report.heatmaps import _percent
from cola.report.marks import of, say
from cola.report.numbers import count, duration, given, interval, number, p_value, size, small, spread, value_range
from cola.report.page import page_states, write_ablation, write_report, write_tasks
from cola.report.table import NONE, Cell, Table
from cola.report.tables import page_tables
from cola.tree.run_folder import FORMAT

pytestmark = pytest.mark.drawn

CHROMIUM = shutil.which("chromium")
# One length, no CPU time, and of a version that expected nothing.
OF_QUICKSTART = [name for name in FIGURES if name not in ("gaps", "cost-cpu", "memory")]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


class Structure(HTMLParser):
    """Ids, links and whether every element is closed in its turn."""

    VOID = {"meta", "img", "br", "hr", "input", "link"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id" and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def structure(page: Path) -> Structure:
    parser = Structure()
    parser.feed(page.read_text())
    parser.close()
    assert parser.open == []
    return parser


@pytest.mark.parametrize("name", ["quickstart", "many"])
def test_the_page_is_well_formed_and_refers_to_nothing_outside_its_folder(pages: dict[str, Path], name: str) -> None:
    found = structure(pages[name])
    assert len(set(found.ids)) == len(found.ids)
    policies = [about["content"] for tag, about in found.tags if about.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert policies[0] is not None
    assert policies[0].startswith("default-src 'none'; ")
    for tag, about in found.tags:
        assert tag not in {"img", "link", "iframe", "object", "image", "base", "form"}
        assert not any(key.startswith("on") for key in about), about
        for key in ("href", "src", "xlink:href"):
            target = about.get(key)
            if target is None:
                continue
            if target.startswith("#"):
                assert target[1:] in found.ids
            else:
                assert (pages[name].parent / target).is_file(), target
        for key in ("aria-labelledby",):
            assert about.get(key) is None or about[key] in found.ids
    assert sum(tag == "script" for tag, _ in found.tags) == 1


@pytest.mark.parametrize("name", ["quickstart", "many"])
def test_every_figure_has_words_and_every_head_cell_a_scope(pages: dict[str, Path], name: str) -> None:
    found = structure(pages[name])
    pictures = [about["aria-label"] for _, about in found.tags if about.get("role") == "img"]
    assert len(pictures) == sum(tag == "svg" for tag, _ in found.tags)
    assert len(pictures) == len(OF_QUICKSTART if name == "quickstart" else FIGURES)
    for words in pictures:
        assert words is not None
        assert re.search(r"\d", words), words
        assert words.endswith(".")
    assert all(about.get("scope") in ("row", "col") for tag, about in found.tags if tag == "th")
    regions = [about for _, about in found.tags if about.get("role") == "region"]
    assert all(about.get("tabindex") == "0" for about in regions)
    assert all(about.get("aria-label") or about.get("aria-labelledby") for about in regions)


def test_every_figure_and_table_is_a_file_for_a_paper(pages: dict[str, Path]) -> None:
    folder = pages["quickstart"].parent
    for name in OF_QUICKSTART:
        text = (folder / "figures" / f"{name}.svg").read_text()
        assert text.startswith("<svg")
        assert "currentColor" not in text
        assert "#010203" not in text
        assert "<image" not in text
        pdf = (folder / "figures" / f"{name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF")
        assert b"/FontFile2" in pdf  # TrueType, the font itself
        assert b"/Type3" not in pdf
        assert b"CreationDate" not in pdf
    tables = page_tables(quickstart(), curves_of(quickstart()))
    assert set(tables) == {
        "arms",
        "loss",
        "cost",
        "trials",
        "contrasts",
        "seeds",
        "curves",
        "knots",
        "spectra",
        "overlap",
    }
    for name, table in tables.items():
        with (folder / "tables" / f"{name}.csv").open(newline="") as file:
            assert list(csv.reader(file)) == [table.columns, *table.texts]
        assert (folder / "tables" / f"{name}.tex").read_text() == table.latex(name)


@pytest.mark.parametrize("words", ["finer − β", "кость"])
def test_a_pdf_holds_its_words_as_text_and_the_fonts_of_their_letters(tmp_path: Path, words: str) -> None:
    figure = Figure()
    figure.text(0, 0, words)
    figure.text(0, 0.5, "claim", weight="bold")
    save(figure, tmp_path / "words.pdf")
    pdf = (tmp_path / "words.pdf").read_bytes()
    streams = [zlib.decompress(part) for part in re.findall(rb"stream\n(.*?)\nendstream", pdf, re.DOTALL)]
    # Which letter a glyph is: what is searched for, and copied.
    ranges = [codes for text in streams for codes in re.findall(rb"^<\w+> <\w+> \[(.*)\]", text, re.MULTILINE)]
    assert {chr(int(code, 16)) for codes in ranges for code in re.findall(rb"\w+", codes)} == {*words, *"claim"}
    fonts = [TTFont(io.BytesIO(part)) for part in streams if part.startswith(b"\0\1\0\0")]
    assert len(fonts) == pdf.count(b"/FontFile2")
    assert {font["OS/2"].usWeightClass for font in fonts} == {400, 700}
    assert {font["name"].getDebugName(1) for font in fonts} == {"DejaVu Sans"}


def test_the_same_results_give_the_same_bytes_without_torch(pages: dict[str, Path], tmp_path: Path) -> None:
    again = write_run(tmp_path / "quickstart", quickstart()).path
    code = "import sys; from pathlib import Path; from cola.tree.run_folder import RunFolder;"
    code += f"from cola.report.page import write_report; write_report(RunFolder(Path({str(again)!r})));"
    code += "assert not {'torch', 'transformers', 'wandb'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in sorted(pages["quickstart"].parent.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (again / path.relative_to(pages["quickstart"].parent)).read_bytes(), path


@pytest.mark.slow
def test_a_figure_that_has_lost_its_data_goes_from_the_folder(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", quickstart())
    write_report(folder)
    folder.write("summary.json", quickstart().model_copy(update={"contrasts": [], "spectra": {}}))
    page = write_report(folder).read_text()
    left = {path.stem for path in (folder.path / "figures").iterdir()}
    assert left == set(OF_QUICKSTART) - {"contrasts", "spectra", "overlap"}
    assert "figures/contrasts.svg" not in page


def test_a_run_without_any_number_has_a_page_that_says_so(tmp_path: Path) -> None:
    summary = quickstart().content()
    gone = {"links": 1, "states": {"0": "missing"}, "errors": {}, "n_seeds": 0}
    summary |= {"arms": {"lora": gone, "base": {**gone, "links": 0}}, "interrupted": True, "contrasts": []}
    summary |= {"spectra": {}, "trials": {}, "meta": None, "rows": None}
    summary["matched"]["used"] = None
    folder = write_run(tmp_path / "run", Summary.model_validate(summary))
    text = write_report(folder).read_text()
    assert "lora: missing, no numbers" in text
    assert not list((folder.path / "figures").glob("*"))


def test_html_in_names_shows_as_text(pages: dict[str, Path]) -> None:
    text = pages["many"].read_text()
    assert EVIL not in text
    assert "<script>alert" not in text
    assert text.count("&lt;script&gt;alert(1)") >= 4  # the model, a note, an error, the recipe


def test_what_is_not_whole_stands_under_the_verdict() -> None:
    summary = many(12)
    states = page_states(summary)
    names = list(summary.arms)
    assert states[0] == "interrupted: not everything was run"
    assert f"{names[5]}: seeds 5 ok, 1 failed" in states
    assert "interrupted-arm: 1 interrupted, 5 missing, no numbers" in states
    assert states[-1] == f"same outputs: {names[3]} and {names[4]}"
    assert page_states(quickstart()) == ["one seed: nothing is said about another"]
    rows = {row[0]: row for row in page_tables(summary, {})["arms"].texts}
    assert rows["interrupted-arm"][1:] == ["1 interrupted, 5 missing", *[NONE] * (len(rows["lora"]) - 2)]
    assert rows["lora"][1] == "ok"


@pytest.mark.parametrize(
    ("cell", "text", "value"),
    [
        (count(2.44e6), "2.44 M", 2.44e6),
        (count(15957), "16.0 k", 16e3),
        (count(7.41e12), "7.41 T", 7.41e12),
        (duration(38), "38 s", 38),
        (duration(78), "1 min 18 s", 78),
        (duration(7501), "2 h 5 min", 7500),
        (interval(Interval(value=0.0251, low=-0.005, high=0.06)), "+0.025 [-0.005, +0.060]", 0.025),
        (spread(Spread(mean=-0.1, sd=0.02), signed=True), "-0.100 ± 0.020", -0.1),
        (small(5e-5), "5e-05", 5e-5),
        (value_range([0.0006, None, 0.0003]), "0.0003–0.0006", 3e-4),
        (number(0.125, ".1%"), "12.5%", 0.125),
        (size(2.31e9), "2.31 GB", 2.31e9),
        (number(90, "d"), "90", 90),
        (number(None, ".3f"), NONE, None),
        (number(math.nan, ".3f"), "nan", None),
        (interval("undefined"), "undefined", None),
        (given("0.001"), "0.001", 0.001),
        (given("exact"), "exact", None),
    ],
)
def test_a_cell_is_sorted_by_its_number_in_units_of_one(cell: Cell, text: str, value: float | None) -> None:
    assert (cell.text, cell.value) == (text, value if value is None else pytest.approx(value))


@pytest.mark.parametrize(
    ("value", "as_count", "as_size"),
    [
        (0, "0", "0 B"),
        (999.4, "999", "999 B"),
        (999.6, "1.00 k", "1.00 kB"),
        (16_000, "16.0 k", "16.0 kB"),
        (999_499, "999 k", "999 kB"),
        (999_700, "1.00 M", "1.00 MB"),
        (2_440_000, "2.44 M", "2.44 MB"),
        (999_700_000, "1.00 B", "1.00 GB"),
        (7.41e12, "7.41 T", "7.41 TB"),
        (9.997e17, "1.00 E", None),
        (3.2e21, "3.20 Z", None),
        (math.nan, NONE, None),
    ],
)
def test_a_count_has_three_digits_in_a_unit_that_it_has_one_of(
    value: float, as_count: str, as_size: str | None
) -> None:
    assert count(value).text == as_count
    assert count(value).value == (None if as_count == NONE else pytest.approx(value, rel=6e-3))
    if as_size is not None:
        assert size(value).text == as_size
    if as_size is not None and value >= 1000:
        assert size(value).value == pytest.approx(value, rel=6e-3)
    assert size(None).text == NONE


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 0 min"),
        (7199, "2 h 0 min"),
        (7500, "2 h 5 min"),
        (86370, "24 h 0 min"),
    ],
)
def test_a_time_is_rounded_to_the_unit_that_it_is_shown_in(seconds: float, text: str) -> None:
    assert duration(seconds).text == text


@pytest.mark.parametrize(
    ("p", "text"),
    [
        *((None, NONE), (0.00009, "< 0.0001"), (0.0001, "0.0001"), (0.00563, "0.0056"), (0.03125, "0.031"), (1.0, "1")),
        *((0.0496, "0.0496"), (0.04996, "0.04996"), (0.05, "0.05"), (0.0504, "0.05"), (0.62, "0.62")),
    ],
)
def test_a_p_is_not_rounded_across_the_level_of_a_claim(p: float | None, text: str) -> None:
    assert p_value(p).text == text


def test_a_change_of_a_whole_matrix_is_a_hundred_percent() -> None:
    assert [_percent(share) for share in (0.00012, 0.0996, 0.995, 1.0, 1.234)] == [
        "0.012%",
        "10%",
        "100%",
        "100%",
        "120%",
    ]


def test_latex_sets_every_sign_as_it_stands() -> None:
    table = Table(r"50 % of $x_1 & {y}~^\#", ["a|b", "<c>"], [["[x]", "-0.5 ± 0.1"], ["chain-3", "5e-05 – ‖ΔW‖"]])
    lines = table.latex("knots").splitlines()
    assert r"\caption{50 \% of \$x\_1 \& \{y\}\textasciitilde{}\textasciicircum{}\textbackslash{}\#}" in lines
    assert r"a\textbar{}b & \textless{}c\textgreater{} \\" in lines
    assert r"{[}x{]} & $-$0.5 $\pm$ 0.1 \\" in lines
    assert r"chain-3 & 5e-05 -- $\|$$\Delta$W$\|$ \\" in lines
    assert r"\begin{tabular}{lr}" in lines
    assert r"\label{tab:knots}" in lines


def test_csv_holds_what_the_table_holds() -> None:
    table = Table("t", ["arm", 'a "b", c'], [["x\ny", "1,5"], ["–", ""]])
    assert list(csv.reader(io.StringIO(table.csv(), newline=""))) == [table.columns, *table.texts]


def test_fifty_arms_look_different_each() -> None:
    found = looks(f"arm{k}" for k in range(50))
    assert len({(look.colour, look.marker) for look in found.values()}) == 50
    assert found["arm0"] == Look("#0072B2", "o", "-")


def test_long_names_are_cut_in_the_middle_and_stay_apart() -> None:
    names = [f"a-very-long-name-{k}-with-the-same-end-as-all" for k in range(12)]
    short = clipped(names, 16)
    assert len(set(short.values())) == 12
    assert all("…" in text for text in short.values())
    assert clipped(["lora", "full"]) == {"lora": "lora", "full": "full"}


def test_the_pareto_front_has_nothing_that_another_beats() -> None:
    points = {"a": (0, 0.1), "b": (2, 0.5), "c": (2, 0.4), "d": (3, 0.5), "e": (4, 0.9), "f": (5, 0.8)}
    assert pareto(points) == ["a", "b", "e"]


def test_a_score_is_set_against_every_cost_that_is_known_of_all_trained_arms() -> None:
    summary = quickstart()
    lora = summary.arms["lora"]
    costs = {kind: costs_of(summary, kind) for kind in PRICES}
    assert [kind for kind, points in costs.items() if not points] == ["cost-cpu"]
    assert set(costs["cost"]) == {"lora", "chain3", "full"}
    paid = {kind: points["lora"][0] for kind, points in costs.items() if points}
    assert list(paid.values()) == [lora.flops, lora.total_seconds, lora.peak_memory, lora.num_trainable_params]
    summary.arms["chain3"] = summary.arms["chain3"].model_copy(update={"flops": math.nan})
    assert not costs_of(summary, "cost")


def test_a_figure_says_its_points_and_whose_its_marks_are_to_a_page_alone(tmp_path: Path) -> None:
    figure = new_figure(2)
    axes = figure.subplots()
    with of(axes, "b"):
        axes.plot([0, 2], [0, 4], "o")
    axes.plot([0, 2], [4, 0])
    axes.set(xlim=(0, 2), ylim=(0, 4))
    say(axes, "b", [(1, 1, "b & <1>"), (5, 1, "beyond the axis")])
    save(settle(figure), tmp_path / "plain.svg")
    assert "circle" not in (tmp_path / "plain.svg").read_text()
    page = svg(figure, "x", {"a": "of-0", "b": "of-1"})
    [(left, top, says)] = re.findall(r'<circle class="of-1" cx="(.*?)" cy="(.*?)" r="5"><title>(.*?)</title>', page)
    assert says == "b &amp; &lt;1&gt;"
    [group] = re.findall(r'<g class="of-1">(.*?)</g></g>', page, re.DOTALL)
    (x0, y0), (x1, y1) = ([*map(float, place)] for place in re.findall(r'x="([\d.]+)" y="([\d.]+)"', group))
    assert (float(left), float(top)) == pytest.approx(((x0 + x1) / 2, y0 + (y1 - y0) / 4), abs=0.1)


def test_the_primary_contrast_has_its_own_p_and_the_others_holms() -> None:
    assert p_text(contrast("a", "b", 0.1, 0.1, role="primary", p=0.03125, p_holm=None)) == "p = 0.031"
    assert p_text(contrast("a", "b", 0.1, 0.1, p=0.01, p_holm=0.62)) == "p = 0.62 (Holm)"
    assert p_text(contrast("a", "b", 0.1, 0.1, p=None, p_holm=None)) == "no p"
    assert p_text(contrast("a", "b", 0.1, 0.1, p=1.0, p_holm=1.0)) == "p = 1 (Holm)"


def written(figure: Figure) -> list[tuple[str, Bbox]]:
    """Every text that a figure shows and its place; without those that are turned, whose boxes are larger than they."""
    outside = set()  # labels of ticks beyond the ends of an axis, which are not drawn
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
            if not low <= tick.get_loc() <= high or not axis.axes.get_visible():
                outside |= {id(tick.label1), id(tick.label2)}
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_visible()]
    texts = [text for text in texts if text.get_text().strip() and not text.get_rotation() and id(text) not in outside]
    return [(text.get_text(), box) for text in texts if (box := text.get_window_extent()).width]


@pytest.mark.parametrize("n_arms", [4, 8, pytest.param(30, marks=pytest.mark.slow)])
def test_no_label_of_a_figure_covers_another_or_is_cut_off(n_arms: int) -> None:
    summary = quickstart() if n_arms == 4 else many(n_arms)
    figures = figures_of(summary, curves_of(summary))
    assert list(figures) == (OF_QUICKSTART if n_arms == 4 else list(FIGURES))
    for name, figure in figures.items():
        figure.draw_without_rendering()
        found = written(figure)
        for place, (text, box) in enumerate(found):
            assert box.x0 > -1, (name, text)
            assert box.x1 < figure.bbox.x1 + 1, (name, text)
            assert box.y0 > -1, (name, text)
            assert box.y1 < figure.bbox.y1 + 1, (name, text)
            small = box.shrunk(0.98, 0.8)  # letters do not fill their lines
            covers = [other for other, second in found[place + 1 :] if small.overlaps(second.shrunk(0.98, 0.8))]
            assert not covers, (name, text, covers)


def test_a_name_with_dollar_signs_is_no_formula_and_an_svg_has_ids_of_its_own() -> None:
    content = json.dumps(quickstart().content())
    summary = Summary.model_validate_json(content.replace('"chain3"', '"$x_1$"'))
    figures = figures_of(summary, {})
    assert "$x_1$" in svg(figures["train-test"], "train-test")
    ids = [set(re.findall(r' id="([^"]+)"', svg(figure, name))) for name, figure in figures.items()]
    assert sum(map(len, ids)) == len(set().union(*ids))
    assert "curves" not in figures


def test_a_text_is_judged_by_its_loss_in_every_figure() -> None:
    content = quickstart().content() | {"metric": "perplexity"}
    for arm in content["arms"].values():
        for key in ("train_score", "validation_score", "test_score", "gap_acc"):
            arm[key] = None
            arm["seeds"][0][key] = None
    for one in content["contrasts"]:
        one["metric"] = "loss"
    summary = Summary.model_validate(content)
    figures = figures_of(summary, curves_of(summary))
    assert list(figures) == OF_QUICKSTART
    assert "test loss, nats per token" in svg(figures["hero"], "hero")
    assert "−loss, nats per token" in svg(figures["contrasts"], "contrasts")
    tables = page_tables(summary, {})
    assert "loss" not in tables  # it is the first one
    assert "gap_loss" in tables["arms"].columns
    assert "gap_acc" not in tables["seeds"].columns


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of three tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    return write_tasks(folder / "over", summarize_tasks(three_tasks(folder)))


@pytest.fixture(scope="module")
def kinds(pages: dict[str, Path], ablation: Path, tasks: Path) -> dict[str, Path]:
    """A page of each kind, and the one of many arms."""
    return {**pages, "ablation": ablation, "tasks": tasks}


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of an ablation of chain length, from numbers by hand."""
    folder = tmp_path_factory.mktemp("ablation")
    arms = quickstart().content()["arms"]
    seeds = [{**arms["lora"]["seeds"][0], "seed": s, "steps": 90, "total_seconds": 78.0 + s} for s in (0, 1)]
    rows: list[dict[str, Any]] = [{"values": None, "label": "", "arm": "lora", **arms["lora"], "seeds": seeds}]
    points = [{"label": f"links={n}", "values": {"arms.chain3.links": str(n)}, "folder": f"0{n}"} for n in (1, 2, 3)]
    rows += [{**point, "arm": "chain3", **arms["chain3"], "seeds": seeds} for point in points]
    rows[-1]["errors"] = {"1": EVIL}
    summary = {"name": "links", "interrupted": True, "keys": ["arms.chain3.links"], "points": points, "rows": rows}
    summary |= {"metric": "exact match", "matched": {"by": "steps", "per_link": False}, "protocol": "fixed"}
    summary |= {"trained_steps": 180, "recalled_steps": 90, "errors": {}, "damaged": []}
    summary |= {"format": FORMAT, "causes": "", "finished": False, "failed": True}
    for point in points:
        (folder / "points" / point["folder"]).mkdir(parents=True)
        (folder / "points" / point["folder"] / "report.html").touch()
    return write_ablation(folder, Ablation.model_validate(summary))


def test_an_ablation_has_the_same_page_and_files(ablation: Path) -> None:
    found = structure(ablation)
    for _, about in found.tags:
        target = about.get("href") or ""
        assert target.startswith("#") or not target or (ablation.parent / target).is_file(), target
    for name in ("figures/ablation.svg", "figures/ablation.pdf", "tables/ablation.csv", "tables/ablation.tex"):
        assert (ablation.parent / name).stat().st_size
    text = ablation.read_text()
    assert EVIL not in text
    assert "interrupted" in text


# --- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Opened:
    """A page opened from disk without a network, and what it said and asked for."""

    def __init__(self, chromium: Any, path: Path, width: int = 1200, **settings: Any) -> None:
        self.context = chromium.new_context(viewport={"width": width, "height": 800}, offline=True, **settings)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def column(self, table: str, number: int) -> list[str]:
        return self.page.locator(
            f"table[aria-labelledby=table-{table}] tbody tr > :nth-child({number})"
        ).all_inner_texts()


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
class TestInABrowser:
    @pytest.mark.parametrize("name", ["quickstart", "many", "ablation", "tasks"])
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_it_opens_without_a_network_an_error_or_a_request(
        self, chromium: Any, kinds: dict[str, Path], name: str, scheme: str
    ) -> None:
        path = kinds[name]
        with Opened(chromium, path, color_scheme=scheme) as opened:
            assert opened.asked == [path.as_uri()]
            ink, paper = opened.page.evaluate(
                "['color', 'backgroundColor'].map(key => getComputedStyle(document.body)[key])"
            )
            light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
            assert (light[0] < light[1]) == (scheme == "light")
            # What is drawn in the page's ink is readable in both.
            stroke = opened.page.evaluate("getComputedStyle(document.querySelector('figure svg')).color")
            assert stroke == ink
            assert opened.page.locator("figure svg").first.bounding_box()["width"] > 300
            assert opened.said == []

    def test_a_table_sorts_by_a_click_up_down_and_as_it_came(self, chromium: Any, pages: dict[str, Path]) -> None:
        with Opened(chromium, pages["many"]) as opened:
            head = opened.page.locator("table[aria-labelledby=table-arms] thead th").nth(4)
            came = opened.column("arms", 5)
            assert head.get_attribute("aria-sort") is None
            numbers = [float(text.split()[0]) for text in came if text != NONE]
            for order, expected in (("ascending", sorted(numbers)), ("descending", sorted(numbers, reverse=True))):
                head.get_by_role("button").click()
                assert head.get_attribute("aria-sort") == order
                shown = opened.column("arms", 5)
                assert shown[-1] == NONE  # nothing to say comes last either way
                assert [float(text.split()[0]) for text in shown[:-1]] == expected
                assert opened.page.locator("#sorted").inner_text() == f"sorted by test, {order}"
            head.get_by_role("button").click()
            assert head.get_attribute("aria-sort") is None
            assert opened.column("arms", 5) == came
            assert opened.said == []

    def test_a_table_sorts_by_the_keyboard_and_by_size_not_by_letters(
        self, chromium: Any, pages: dict[str, Path]
    ) -> None:
        with Opened(chromium, pages["quickstart"]) as opened:
            seconds = sorted(arm.total_seconds for arm in quickstart().arms.values())
            for column, expected in (
                ("wall clock", [duration(each).text for each in seconds]),
                ("trained", ["0", "2.44 M", "2.44 M", "135 M"]),
            ):
                heads = opened.page.locator("table[aria-labelledby=table-cost] thead th")
                number = heads.all_inner_texts().index(column)
                heads.nth(number).get_by_role("button").focus()
                opened.page.keyboard.press("Enter")
                assert heads.nth(number).get_attribute("aria-sort") == "ascending"
                assert opened.column("cost", number + 1) == expected
                opened.page.keyboard.press("Space")
                assert heads.nth(number).get_attribute("aria-sort") == "descending"
                assert opened.column("cost", number + 1) == expected[::-1]
            assert opened.page.locator("table[aria-labelledby=table-cost] [aria-sort]").count() == 1

    @pytest.mark.parametrize("with_script", [True, False])
    def test_an_arm_is_switched_off_in_all_figures_and_tables(
        self, chromium: Any, pages: dict[str, Path], with_script: bool
    ) -> None:
        with Opened(chromium, pages["quickstart"], java_script_enabled=with_script) as opened:
            number = list(quickstart().arms).index("chain3")
            marks = opened.page.locator(f"figure:visible g.of-{number}:visible")
            row = opened.page.locator("table[aria-labelledby=table-arms] tbody tr", has_text="chain3")
            at_first = marks.count()
            assert at_first > 20
            assert row.is_visible()
            opened.page.locator(f"#arm-{number}").uncheck()
            assert marks.count() == 0
            assert row.is_hidden()
            assert opened.page.locator("table[aria-labelledby=table-arms] tbody tr:visible").count() == 3
            opened.page.locator(f"#arm-{number}").check()
            assert marks.count() == at_first

    def test_a_point_says_its_numbers_under_the_pointer_and_by_the_keyboard(
        self, chromium: Any, pages: dict[str, Path]
    ) -> None:
        score = quickstart().arms["lora"].test_score.mean
        with Opened(chromium, pages["quickstart"]) as opened:
            tip, figure = opened.page.locator("#tip"), opened.page.locator("#figure-hero .wide")
            assert tip.is_hidden()
            opened.page.locator(f"#figure-hero circle[data-says^='lora, mean of 1: {score:.4f}']").hover()
            assert tip.inner_text() == f"lora, mean of 1: {score:.4f}"
            figure.focus()
            told = []
            for _ in range(3):
                opened.page.keyboard.press("ArrowRight")
                told.append(tip.inner_text())
            assert len(set(told)) == 3
            opened.page.keyboard.press("ArrowLeft")
            assert tip.inner_text() == told[1]
            opened.page.keyboard.press("Escape")
            assert tip.is_hidden()
            assert opened.page.locator("#figure-hero circle title").count() == 0  # else the browser shows it once more
            assert opened.said == []
        with Opened(chromium, pages["quickstart"], java_script_enabled=False) as opened:
            assert f"lora, mean of 1: {score:.4f}" in opened.page.locator("#figure-hero title").all_text_contents()

    def test_every_stop_of_the_keyboard_has_a_name(self, chromium: Any, pages: dict[str, Path]) -> None:
        with Opened(chromium, pages["quickstart"]) as opened:
            opened.page.keyboard.press("Tab")
            assert opened.page.evaluate("document.activeElement.textContent") == "To the content"
            named = "e => e.textContent.trim() || e.getAttribute('aria-label') || e.getAttribute('aria-labelledby')"
            stops = opened.page.locator("a, button, summary, [tabindex]")
            assert stops.count() > 40
            assert all(stops.evaluate_all(f"all => all.map({named})"))

    @pytest.mark.parametrize("name", ["quickstart", "many", "ablation", "tasks"])
    @pytest.mark.parametrize("width", [360, 390, 1400])
    def test_nothing_but_tables_and_figures_scrolls_sideways_and_every_text_can_be_read(
        self, chromium: Any, kinds: dict[str, Path], name: str, width: int
    ) -> None:
        with Opened(chromium, kinds[name], width=width) as opened:
            opened.page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
            # The size of a figure's letters on the screen; of several costs one is shown.
            for number in range(max(1, opened.page.locator("[name=cost]").count())):
                if name in ("quickstart", "many"):
                    opened.page.locator("[name=cost]").nth(number).check()
                    assert opened.page.locator(".choice figure:visible").count() == 1
                sizes = opened.page.locator("figure:visible svg text").evaluate_all(
                    "all => all.map(e => { const m = e.getScreenCTM(); "
                    "return parseFloat(getComputedStyle(e).fontSize) * Math.hypot(m.a, m.b); })"
                )
                assert min(sizes) >= 9
                assert opened.page.evaluate("document.documentElement.scrollWidth") == width
            # Heads that are wider than their columns would be printed over each other.
            wide = "all => all.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent)"
            assert opened.page.locator("thead th").evaluate_all(wide) == []
            # What does not fit scrolls and is not cut.
            cut = "all => all.filter(e => getComputedStyle(e).overflowX != 'auto').length"
            assert opened.page.locator(".wide").evaluate_all(cut) == 0
            if width == 1400 and name != "many":
                fits = "all => all.filter(e => e.scrollWidth > e.clientWidth).map(e => e.textContent.slice(0, 90))"
                assert opened.page.locator(".wide").evaluate_all(fits) == []

    def test_html_in_names_is_text_and_runs_nothing(self, chromium: Any, pages: dict[str, Path]) -> None:
        with Opened(chromium, pages["many"]) as opened:
            assert EVIL in opened.page.locator("#compared").inner_text()
            assert EVIL in opened.page.locator("#notes").inner_text()
            assert opened.page.locator("img").count() == 0
            assert opened.said == []

    def test_without_script_the_page_is_whole(self, chromium: Any, pages: dict[str, Path]) -> None:
        with Opened(chromium, pages["quickstart"], java_script_enabled=False) as opened:
            assert opened.page.locator("button").count() == 0
            assert opened.page.locator("table[aria-labelledby=table-arms] thead th").first.inner_text() == "arm"
            assert opened.page.locator("figure svg").count() == len(OF_QUICKSTART)

    def test_a_script_that_is_not_the_pages_own_does_not_run(
        self, chromium: Any, pages: dict[str, Path], tmp_path: Path
    ) -> None:
        forged = tmp_path / "forged.html"
        forged.write_text(pages["quickstart"].read_text().replace("<main", "<script>alert(3)</script><main"))
        with Opened(chromium, forged) as opened:
            assert "3" not in opened.said
            assert any("Content Security Policy" in line for line in opened.said)
            assert opened.page.locator("thead button").count() > 10  # its own did

    def test_it_prints_black_on_white_with_its_folds_open(
        self, chromium: Any, pages: dict[str, Path], tmp_path: Path
    ) -> None:
        with Opened(chromium, pages["quickstart"], color_scheme="dark") as opened:
            pdf = opened.page.pdf(format="A4")
            assert pdf.startswith(b"%PDF")
            assert pdf.count(b"/Type /Page\n") in range(5, 16)
            opened.page.emulate_media(media="print")
            opened.page.evaluate("dispatchEvent(new Event('beforeprint'))")
            assert opened.page.locator("details:not([open])").count() == 0
            assert opened.page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
            assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
            opened.page.evaluate("dispatchEvent(new Event('afterprint'))")
            assert opened.page.locator("details[open]").count() == 0
