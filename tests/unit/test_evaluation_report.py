"""The report: its structure, what it may hold, and what a browser makes of it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from evaluation_fakes import ROW, GaussianMap, Model, PictureModel, pictures
from fastflow import cli
from fastflow.charts import Series, axis, chart, marked
from fastflow.config import to_plain
from fastflow.evaluation.compare import comparison, lines_of
from fastflow.evaluation.gallery import draw, drawn, same_noise
from fastflow.evaluation.report import page
from fastflow.evaluation.results import record
from fastflow.evaluation.runs import Run, find_runs
from fastflow.evaluation.spec import Expected
from fastflow.markup import Markup, element, escaped
from fastflow.tables import compact
from tiny import toy

HOSTILE = "<img src=https://evil.example/x onerror=alert(1)>\"'&\x1b\ud800"
VOID = {"meta", "link", "img"}


class Page(HTMLParser):
    """The elements of a page; fails where one is not closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]

    @property
    def text(self):
        return " ".join(self.words)


def a_run(folder: Path, **changes) -> Run:
    """A run with results, pictures and logs on disk."""
    rows = [
        dataclasses.replace(ROW, experiment="mine", steps=n, nfe=n, value=value, **changes)
        for n, value in ((1, 3.5), (2, 2.5), (4, 2.0))
    ]
    record(folder, rows)
    model = PictureModel(GaussianMap(), shape=(3, 4, 4), pictures=pictures(64))
    model = dataclasses.replace(model, weights_name=ROW.weights, step=ROW.step)
    draw(model, folder, (1, 2, 4))
    log = [{"step": n, "loss": 1.0 / n} for n in range(1, 400)]
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in log))
    edges = [0.1, 1.0, 10.0]
    by_time = [{"step": n, "edges": edges, "loss": [1.0, None, 2.0, 3.0 / n]} for n in (5, 10, 15)]
    (folder / "loss_by_time.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in by_time))
    [run] = find_runs([folder])
    return dataclasses.replace(run, name="a", described=to_plain(toy(batch_size=8)))


def report_of(run: Run) -> str:
    expected = (
        Expected(steps=2, value=2.06, source="a paper", note="400k steps"),
        Expected(steps=8, value=1.9, source="a paper"),
    )
    shipped = toy(name="mine", expected=expected)
    return page(lines_of(run, shipped), [run])


def test_every_part_of_the_report(tmp_path):
    text = report_of(a_run(tmp_path))
    found = Page(text)
    assert text.startswith("<!doctype html>")
    assert re.findall("<h2>(.*?)</h2>", text) == ["FID-50k on cifar10", "Runs", "Not measured yet"]
    images = found.all("img")
    assert [image["alt"] for image in images] == [
        f"Samples of mine in {what}" for what in ("1 step", "2 steps", "4 steps")
    ]
    assert all(image["src"].startswith("data:image/png;base64,") for image in images)
    charts = [svg for svg in found.all("svg") if svg["class"] == "chart"]
    assert len(charts) == 3
    for words in (
        "FID-50k against network evaluations; mine (a): 3.5, 2.5, 2",
        "Training loss of mine; loss:",
        "Training loss of mine by time; step 5: 1, 2, 0.6; step 15: 1, 2, 0.2",
        "batch size 8 instead of 16",
        "the published figure: 400k steps",
        "+0.44",
        "60 min on 8 x GPU",
        "8 device-hours",
        "2 steps, FID-50k 2.50",
    ):
        assert words in found.text, words
    assert text.count('class="mark series-0 hollow"') == 2  # what is expected


def test_it_is_made_of_tables_that_can_be_read_aloud(tmp_path):
    found = Page(report_of(a_run(tmp_path)))
    tables = found.all("table")
    assert len(found.all("caption")) == len(tables) == 3
    assert all(th.get("scope") in {"col", "row", "rowgroup"} for th in found.all("th"))
    assert found.all("html") == [{"lang": "en"}]
    assert all(svg.get("role") == "img" or svg.get("aria-hidden") for svg in found.all("svg"))


def test_links_lead_somewhere_within_the_page(tmp_path):
    found = Page(report_of(a_run(tmp_path)))
    places = [a["id"] for _, a in found.found if "id" in a]
    assert len(places) == len(set(places))
    links = {a["href"] for a in found.all("a")}
    assert len(links) > 5
    assert links <= {f"#{place}" for place in places}


def test_nothing_is_fetched_and_nothing_runs(tmp_path):
    text = report_of(a_run(tmp_path))
    found = Page(text)
    assert {name for name, _ in found.found} & {
        "script",
        "iframe",
        "object",
        "form",
        "base",
    } == set()
    for name, attributes in found.found:
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in {"src", "href", "srcset", "data", "action", "xlink:href"}:
                assert value.startswith(("#", "data:")), (name, key)
    assert "url(" not in text
    assert "@import" not in text
    [policy] = [
        m["content"] for m in found.all("meta") if "content-security-policy" in str(m).lower()
    ]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_names_cannot_become_markup(tmp_path):
    run = a_run(tmp_path, method=HOSTILE, dataset=HOSTILE, torch=HOSTILE, baseline=1.0)
    rows = [dataclasses.replace(r, experiment=HOSTILE, baseline_name=HOSTILE) for r in run.rows]
    settings = {**run.described, "init_from": HOSTILE}
    run = dataclasses.replace(run, name=HOSTILE, rows=tuple(rows), described=settings)
    text = page(lines_of(run, None), [run])
    text.encode()
    found = Page(text)
    assert len(found.all("img")) == 3
    assert all(image["src"].startswith("data:") for image in found.all("img"))
    assert "<img src=https://evil.example" in found.text


def test_the_same_files_give_the_same_page(tmp_path):
    assert report_of(a_run(tmp_path)) == report_of(a_run(tmp_path))


def test_figures_of_other_sample_counts_are_not_in_the_chart(tmp_path):
    run = a_run(tmp_path)
    rows = tuple(dataclasses.replace(row, samples=5000) for row in run.rows)
    text = report_of(dataclasses.replace(run, rows=rows))
    assert "hollow" not in re.sub("<style>.*?</style>", "", text, flags=re.DOTALL)
    assert "not compared: FID-5k measured, FID-50k expected" in text


def test_what_is_not_there_is_left_out(tmp_path):
    record(tmp_path, [ROW, dataclasses.replace(ROW, metric="kid", value=float("nan"))])
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": "x"}\n5\n{"step": 2, "loss": NaN}\n')
    by_time = [{"edges": 5}, {"edges": [1.0], "loss": [1.0]}, {"edges": [float("nan")], "loss": []}]
    (tmp_path / "loss_by_time.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in by_time))
    (tmp_path / "samples").mkdir()
    name = f"same_noise_{ROW.weights}_step{ROW.step:08d}_2step.png"
    (tmp_path / "samples" / name).write_text("no picture")
    found = Page(page(*_found(tmp_path)))
    assert found.all("img") == []
    assert len([svg for svg in found.all("svg") if svg["class"] == "chart"]) == 1
    assert Page(page([], [])).all("h2") == []


def _found(folder: Path):
    found = comparison([folder], folder)
    return found.lines, found.runs


def test_compare_writes_it(tmp_path, capsys):
    a_run(tmp_path / "runs" / "a")
    out = tmp_path / "new" / "report.html"
    assert cli.main(["compare", str(tmp_path / "runs"), "--measured", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"written to {out}\n"
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]
    text = out.read_text()
    assert text.count("<article") == 1
    words = ["compare", str(tmp_path / "runs"), "--measured", "--format", "html"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_complaints(tmp_path, width):
    """No message on the console, nothing wider than the window, and the picture is not blank."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium and no google-chrome is installed")
    path, shot = tmp_path / "report.html", tmp_path / "shot.png"
    path.write_text(report_of(a_run(tmp_path / "run")))
    probe = tmp_path / "probe.html"
    probe.write_text(
        f'<iframe src="report.html" width="{width}" height="4000"></iframe><script>'
        "onload = () => { const page = document.querySelector('iframe').contentDocument;"
        "console.log('WIDTH ' + page.documentElement.scrollWidth) }</script>"
    )
    command = [
        browser,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
    ]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files"]

    def console(*words: str) -> list[str]:
        done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=120)
        return re.findall(r"CONSOLE.*?\] (.*)", done.stderr)

    size = f"--window-size={max(width, 500)},2000"
    assert console(size, f"--screenshot={shot}", path.as_uri()) == []
    with Image.open(shot) as picture:
        assert len(picture.convert("RGB").getcolors(2**24)) > 100
    [message] = console(f"--window-size={width + 100},2000", "--dump-dom", probe.as_uri())
    assert f"WIDTH {width}" in message


# Pictures from the same noise


def test_all_numbers_of_steps_start_from_the_same_noise(tmp_path):
    model = Model(GaussianMap(), cond_dim=0)
    one, again = same_noise(model, 1, 8), same_noise(model, 1, 8)
    assert torch.equal(one, again)
    assert one.shape == (8, 2)
    # The map is exact, so two steps from the same noise differ by the noise of the second alone.
    assert set(model.asked) == set(range(8))


def test_pictures_are_found_by_weights_and_step(tmp_path):
    model = PictureModel(GaussianMap(), shape=(3, 4, 4), pictures=pictures(64))
    paths = draw(model, tmp_path, (4, 1))
    assert drawn(tmp_path, "ema_0.99", 100) == {1: paths[1], 4: paths[0]}
    assert drawn(tmp_path, "ema_0.99", 101) == {}
    assert drawn(tmp_path, "student", 100) == {}
    assert drawn(tmp_path / "nowhere", "ema_0.99", 100) == {}
    assert drawn(tmp_path, "../samples/same_noise_ema_0.99", 100) == {}
    latent = dataclasses.replace(model, shape=(4, 8, 8))
    assert draw(latent, tmp_path / "latents", (1,)) == []


# Elements and charts


def test_elements_escape_what_is_text():
    shown = element("td", "a<b", Markup("<i>c</i>"), None, class_='x"y', hidden=True, title=None)
    assert shown == '<td class="x&quot;y" hidden>a&lt;b<i>c</i></td>'
    assert element("img", alt="", width=3) == '<img alt="" width="3">'
    assert escaped("a\x00b") == "a\ufffdb"


def test_axes_hold_their_values_between_round_marks():
    even = axis("loss", [0.2, 0.9])
    assert (even.low, even.log) == (0.0, False)
    assert [text for _, text in even.ticks] == ["0", "0.2", "0.4", "0.6", "0.8"]
    log = axis("FID", [1.2, 130.0], wide=4.0)
    assert log.log
    assert [text for _, text in log.ticks] == ["2", "5", "10", "20", "50", "100"]
    for each, values in ((even, (0.2, 0.9)), (log, (1.2, 130.0))):
        assert all(0 <= each.place(v) <= 1 for v in values)
        assert all(0 <= each.place(v) <= 1 for v, _ in each.ticks)
    assert marked("NFE", [4, 1, 1, 35]).ticks == ((1, "1"), (4, "4"), (35, "35"))
    for values in ([1.0], [0.0], [-3.0, 5.0], [1e-9, 1e9], [2.5, 2.6]):
        made = axis("x", values, wide=4.0)
        assert all(0 <= made.place(v) <= 1 for v in values), values
        assert 2 <= len(made.ticks) <= 12, values


def test_a_chart_draws_all_points_within_its_frame():
    points = tuple((float(n), float(n**2 + 1)) for n in range(1, 1000))
    x, y = axis("step", [p[0] for p in points]), axis("loss", [p[1] for p in points], wide=4.0)
    text = chart("title", [Series("a", 12, points, markers=False)], x, y)
    [line] = re.findall('<polyline points="(.*?)"', text)
    drawn_points = [tuple(map(float, p.split(","))) for p in line.split()]
    assert 100 < len(drawn_points) < 300
    assert all(46 <= a <= 428 and 12 <= b <= 250 for a, b in drawn_points)
    assert drawn_points[0][1] > drawn_points[-1][1]
    assert 'class="series-2"' in text


def test_large_numbers_for_people():
    assert [compact(n) for n in (12, 5000, 179_200, 179_200_000, 2e9)] == [
        *("12", "5k", "179.2k", "179.2M", "2G"),
    ]
