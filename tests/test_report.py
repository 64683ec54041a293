"""What a run leaves behind: complete, self-contained, escaped, and written wholly or not at all."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from dlkernels.experiments import Options
from dlkernels.experiments.report import COLOURS, Report, figure, interval, write_index

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)> & $\\frac{"


class Page(HTMLParser):
    """Collects tags, attributes and visible text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.extend((tag, *pair) for pair in attributes)

    def handle_data(self, text):
        self.words.append(text)


def drawn():
    with figure(3, 2) as picture:
        picture.subplots().plot([1, 2])
        return picture


def filled(folder, text="plain"):
    report = Report(Options(f"topic {text}", folder, data=text), f"title {text}", f"question {text}")
    report.data_name = text
    report.headline(f"1 {text}", text)
    report.section(f"heading {text}", f"paragraph {text}")
    report.table(f"caption {text}", ("", text), [(text, 1), ("b", text)])
    report.figure("curve", drawn(), f"caption {text}", text)
    report.metrics["loss"] = [1.5, float("nan"), float("inf")]
    return report


def test_everything_is_there(tmp_path):
    page = filled(tmp_path / "out").write()
    assert page == tmp_path / "out" / "report.html"
    assert sorted(path.name for path in page.parent.iterdir()) == ["curve.png", "metrics.json", "report.html"]
    html = page.read_text()
    for words in ("title plain", "question plain", "heading plain", "paragraph plain", "caption plain"):
        assert words in html
    assert "dlkernels run" in html


def test_metrics_are_strict_json(tmp_path):
    filled(tmp_path).write()
    record = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert record["results"]["loss"] == [1.5, None, None]
    assert record["options"]["seed"] == 0
    assert record["figures"] == ["curve.png"]
    assert record["interrupted"] is False


def test_the_page_needs_nothing_but_itself(tmp_path):
    html = filled(tmp_path).write().read_text()
    page = Page(html)
    sources = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "data")]
    assert sources
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert not {"link", "script", "iframe", "object", "embed"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://", html)
    inlined = next(source for source in sources if source.startswith("data:"))
    assert base64.b64decode(inlined.partition(",")[2]) == (tmp_path / "curve.png").read_bytes()


@pytest.mark.parametrize("interrupted", [False, True])
def test_everything_printed_into_it_is_escaped(tmp_path, interrupted):
    report = filled(tmp_path, HOSTILE)
    report.interrupted = interrupted
    html = report.write().read_text()
    page = Page(html)
    expected = Page(filled(tmp_path / "plain").write().read_text())
    assert sorted(set(page.tags)) == sorted(set(expected.tags))
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert "<script" not in html
    assert HOSTILE in "".join(page.words)  # the reader sees what was meant
    index = write_index(tmp_path).read_text()
    assert "<script" not in index


def test_an_index_has_a_card_for_every_run_and_only_for_runs(tmp_path):
    for name in ("autograd", "rnn <b>"):
        filled(tmp_path / name, name).write()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.json").write_text('{"half": ')
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "metrics.json").write_text("[]")
    page = Page(write_index(tmp_path).read_text())
    links = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert links == ["autograd/report.html", "rnn%20%3Cb%3E/report.html"]
    assert page.tags.count("img") == 2


def test_an_empty_index(tmp_path):
    assert "No run" in write_index(tmp_path).read_text()


def test_an_interrupted_run_says_so(tmp_path):
    report = filled(tmp_path)
    assert "interrupted" not in report.write().read_text()
    report.interrupted = True
    assert "interrupted" in report.write().read_text()
    assert json.loads((tmp_path / "metrics.json").read_text())["interrupted"] is True


def test_a_report_with_nothing_in_it(tmp_path):
    report = Report(Options("topic", tmp_path), "title", "question")
    report.interrupted = True
    assert "title" in report.write().read_text()


def test_the_same_figure_gives_the_same_file(tmp_path):
    for name in ("a", "b"):
        filled(tmp_path / name).write()
    assert (tmp_path / "a" / "curve.png").read_bytes() == (tmp_path / "b" / "curve.png").read_bytes()


def test_colours_are_told_apart_without_hue():
    """Pairs of the first four differ in lightness or in the blue-yellow axis, which nearly everybody sees."""
    values = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in COLOURS[:4]]
    seen = [(0.3 * red + 0.59 * green + 0.11 * blue, blue - (red + green) / 2) for red, green, blue in values]
    for i, (light, yellow) in enumerate(seen):
        for other_light, other_yellow in seen[:i]:
            assert abs(light - other_light) > 12 or abs(yellow - other_yellow) > 40


def test_the_interval_is_wilsons():
    assert interval(90, 100) == pytest.approx((0.8256, 0.9448), abs=1e-3)
    low, high = interval(10, 10)
    assert 0.7 < low < 0.75
    assert high == pytest.approx(1)
    assert interval(0, 10)[0] == pytest.approx(0)


def test_the_template_travels_with_the_package():
    from dlkernels.experiments import report

    folder = Path(report.__file__).parent
    assert (folder / "report_template.html").is_file()
    assert (folder / "index_template.html").is_file()
