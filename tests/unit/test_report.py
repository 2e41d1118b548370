"""Figures and the HTML report: what they say, that they load nothing, and that they repeat."""

import functools
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from moe_locality.errors import BackendUnavailable, ConfigError
from moe_locality.figures import (
    Basis,
    LayersData,
    LoadData,
    LossData,
    SimilarityData,
    Table,
    TradeoffData,
    TradeoffPoint,
    TrafficData,
    draw,
    numbers,
    png_bytes,
    short,
    svg_text,
)
from moe_locality.report import (
    MAX_BYTES,
    Headline,
    ReportData,
    format_value,
    inline_svg,
    render_html,
    write_report,
)

pytest.importorskip("matplotlib")

SIMULATED = Basis(how="simulated", count=20_000, num_requests=300, seed=7)
DOMAINS = ("code", "law & order", "chat <b>")
VOID = {"meta", "br", "hr", "img", "link", "input"}


def figures():
    rng = np.random.default_rng(0)
    before = rng.uniform(100, 200, (4, 4))
    similarity = np.array([[0.99, 0.5, 0.4], [0.5, 0.98, 0.6], [0.4, 0.6, 0.97]])
    return {
        "traffic": TrafficData(
            before=before,
            after=before / 2,
            node_of=(0, 0, 1, 1),
            axis="rank",
            unit="MB",
            basis=SIMULATED,
        ),
        "load": LoadData(
            ratio=np.exp(rng.normal(0, 1, (3, 3, 16))),
            domains=DOMAINS,
            panels=("early: layer 1", "middle: layer 5", "late: layer 9"),
            basis=SIMULATED,
        ),
        "similarity": SimilarityData(
            matrix=similarity, domains=DOMAINS, measure="cosine similarity", basis=SIMULATED
        ),
        "tradeoff": TradeoffData(
            points=(
                TradeoffPoint(name="linear", imbalance=1.2, copies=2.2, is_baseline=True),
                TradeoffPoint(name="ours", imbalance=1.04, copies=1.5),
            ),
            cap=1.05,
            basis=SIMULATED,
        ),
        "layers": LayersData(
            layer_ids=(1, 3),
            values={"linear": np.array([2.0, 2.5]), "ours": np.array([1.0, 1.5])},
            unit="copies",
            basis=SIMULATED,
        ),
        "loss": LossData(
            runs={"baseline": (np.arange(3), np.array([4.0, 3.0, 2.0]))},
            basis=Basis(how="measured", count=99, synthetic=True),
        ),
    }


def report(**changes) -> ReportData:
    content = {
        "title": "Placement of a <model>",
        "summary": ("With this placement 31 % fewer copies cross nodes.",),
        "facts": (("model", "m/x"), ("plan", "abc123")),
        "versions": {"numpy": "2.0"},
        "command": "moe-locality report t --plan p.json",
        "headlines": (Headline(label="copies", value="-31 %", context="2.2 to 1.5"),),
        "figures": tuple(figures().values()),
        "tables": (Table(title="Plans", columns=("plan", "copies"), rows=(("linear", 2.2),)),),
        "next_steps": ("moe-locality bake c --plan p.json --out d",),
    }
    return ReportData(**{**content, **changes})


@functools.cache
def page_text() -> str:
    """The whole report, drawn once for the tests that read it."""
    return render_html(report())


class Page(HTMLParser):
    """Collects tags, ids, references and text, and checks that tags nest."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.ids, self.references, self.words, self.open = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        for name, value in attrs:
            if name in ("src", "href", "xlink:href"):
                self.references.append(value)
            self.references += re.findall(r"url\(([^)]*)\)", value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def test_the_page_is_well_formed_and_loads_nothing():
    text = page_text()
    page = Page(text)
    assert page.open == []
    assert text.startswith("<!DOCTYPE html>")
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    assert page.references, "the figures refer to their own clip paths"
    assert all(ref.startswith(("#", "data:image/png")) for ref in page.references)
    assert page.tags.count("svg") == len(figures())
    assert len(text.encode()) < MAX_BYTES


def test_ids_are_unique_and_every_reference_inside_the_page_exists():
    page = Page(page_text())
    assert len(page.ids) == len(set(page.ids))
    inside = {ref[1:] for ref in page.references if ref.startswith("#")}
    assert inside
    assert inside <= set(page.ids)


def test_the_page_says_what_it_is_about():
    text = Page(page_text()).text
    for expected in (
        "Placement of a <model>",
        "31 % fewer copies cross nodes",
        "m/x",
        "abc123",
        "moe-locality report t --plan p.json",
        "numpy 2.0",
        "What to run next",
        "moe-locality bake c --plan p.json --out d",
        "law & order",
    ):
        assert expected in text
    assert "chat <b>" in text, "names are escaped, not interpreted"


def test_every_figure_says_how_its_numbers_came_about():
    page = page_text()
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page, flags=re.DOTALL)
    assert len(captions) == len(figures())
    for caption in captions[:-1]:
        assert "Simulated (predicted by replaying the trace)" in caption
        assert "n = 20,000 tokens of 300 requests; seed 7" in caption
    assert "Measured on a synthetic trace; n = 99 tokens; no random part" in captions[-1]


def test_a_synthetic_trace_is_named_in_every_figure_and_on_top():
    synthetic = Basis(how="simulated", count=1, synthetic=True)
    loss = LossData(runs={"a": (np.arange(2), np.ones(2))}, basis=synthetic)
    page = render_html(report(figures=(loss,), synthetic=True))
    assert "(synthetic trace)" in page
    assert "Synthetic trace: the numbers show" in page
    assert "Synthetic trace: the numbers show" not in page_text()


def test_the_same_data_gives_the_same_bytes():
    assert render_html(report()) == page_text()


@pytest.mark.parametrize("name", list(figures()))
def test_figure_text_is_text_and_does_not_move_between_exports(name):
    figure = draw(figures()[name])
    first = svg_text(figure)
    assert "<text" in first
    assert png_bytes(figure).startswith(b"\x89PNG")
    assert svg_text(figure) == first


def test_traffic_totals_count_only_what_crosses_nodes():
    matrix = np.arange(16.0).reshape(4, 4)
    data = TrafficData(
        before=matrix,
        after=np.eye(4),
        node_of=(0, 0, 1, 1),
        axis="rank",
        unit="rows",
        basis=SIMULATED,
        per=2.0,
        per_name=" per token",
    )
    far = 2 + 3 + 6 + 7 + 8 + 9 + 12 + 13
    assert data.crossing() == (far / 2, 0)
    assert f"{short(far / 2)} rows per token cross nodes" in svg_text(draw(data))


def test_both_traffic_matrices_share_one_scale():
    data = figures()["traffic"]
    figure = draw(data)
    limits = {axes.collections[0].get_clim() for axes in figure.axes[:2]}
    far = np.array(data.node_of)[:, None] != np.array(data.node_of)
    assert limits == {(0.0, data.before[far].max())}


def test_the_numbers_behind_a_figure_are_in_the_page():
    data = figures()
    assert numbers(data["tradeoff"]).rows[1] == ("ours", 1.04, 1.5)
    assert numbers(data["layers"]).rows == ((1, 2.0, 1.0), (3, 2.5, 1.5))
    assert numbers(data["loss"]).rows == (
        ("baseline", 0, 4.0),
        ("baseline", 1, 3.0),
        ("baseline", 2, 2.0),
    )
    assert numbers(data["traffic"]).rows[5][:2] == ("plan", 1)
    assert numbers(data["load"]).rows[4][:2] == ("middle: layer 5", "law & order")
    assert numbers(data["similarity"]).rows[2] == ("chat <b>", 0.4, 0.6, 0.97)
    page = Page(page_text())
    assert page.tags.count("details") == len(data)
    assert "copies per token and layer" in page.text


def test_long_tables_are_cut_and_say_so():
    rows = tuple((i, "x") for i in range(2_500))
    table = Table(title="long", columns=("i", "word"), rows=rows)
    assert "500 more rows are left out" in render_html(report(figures=(), tables=(table,)))


def test_arrays_that_do_not_fit_are_refused():
    data = TrafficData(
        before=np.ones((2, 2)), after=np.ones((3, 3)), node_of=(0, 1), unit="MB", basis=SIMULATED
    )
    with pytest.raises(ConfigError, match=r"after has shape \[3, 3\], expected \[2, 2\]"):
        draw(data)


def test_the_report_is_written_whole_into_a_new_directory(tmp_path):
    data = report(figures=())
    path = write_report(data, tmp_path / "new" / "report.html")
    assert path.read_text(encoding="utf-8") == render_html(data)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert path.stat().st_mode & 0o444


def test_a_report_that_is_too_large_is_not_written(tmp_path):
    rows = tuple(("x" * 3_000, i) for i in range(2_000))
    data = report(figures=(), tables=(Table(title="t", columns=("a", "b"), rows=rows),))
    with pytest.raises(ConfigError, match="expected at most 5,000,000"):
        write_report(data, tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []


def test_a_large_load_figure_stays_small():
    ratio = np.exp(np.random.default_rng(0).normal(0, 1, (3, 20, 256)))
    data = LoadData(
        ratio=ratio,
        domains=tuple(f"domain {i}" for i in range(20)),
        panels=("early", "middle", "late"),
        basis=SIMULATED,
    )
    text = svg_text(draw(data))
    assert "data:image/png" in text
    assert len(text) < 1_000_000


def test_nothing_is_left_behind_where_the_report_cannot_be_written(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(ConfigError, match=r"cannot write the report .*report\.html"):
        write_report(report(figures=()), tmp_path / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_inline_svg_drops_the_prologue_and_prefixes_ids():
    text = (
        '<?xml version="1.0"?>\n<svg width="72pt" height="36pt" viewBox="0 0 72 36" '
        'xmlns="http://www.w3.org/2000/svg"><metadata><a/></metadata>'
        '<g id="axes_1" clip-path="url(#p1)"/><use xlink:href="#p1"/></svg>\n'
    )
    assert inline_svg(text, prefix="f1-", label='a "b"') == (
        '<svg viewBox="0 0 72 36" role="img" aria-label="a &quot;b&quot;" style="max-width:96px">'
        '<g id="f1-axes_1" clip-path="url(#f1-p1)"/><use xlink:href="#f1-p1"/></svg>'
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (float("nan"), "-"),
        (1234567, "1,234,567"),
        (1234.5, "1,234"),
        (0.123456, "0.1235"),
        ("word", "word"),
        (True, "True"),
        (2.0, "2"),
    ],
)
def test_numbers_as_people_read_them(value, text):
    assert format_value(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.5, "1.50"), (152_336, "152k"), (2.5e6, "2.50M"), (3e9, "3.00G"), (999.0, "999")],
)
def test_short_numbers(value, text):
    assert short(value) == text


def test_without_matplotlib_the_message_says_how_to_install_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'moe-locality\[report\]'"):
        draw(figures()["loss"])
