"""The page where it is read: in Chromium, from a file, without a network.

The runs are real: three gated feed-forwards under hostile names, trained with two seeds, in high
precision and with a delayed scale that loud batches outgrow. The browser is the distribution's own,
one for the file, and whatever it asks the network for is refused and counted. What a chooser does
is read off what Plotly was given and off the pixels; accessibility is axe-core's word. Screenshots
go to `build/screenshots`: how the page looks has to be looked at.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import axe_playwright_python
import numpy as np
import pytest
import torch
from matplotlib.image import imread
from playwright.sync_api import Browser, Page, Route, sync_playwright
from rows_by_hand import write
from torch import nn

import fp8lab
from fp8lab.report import write_report
from fp8lab.report.thinning import thin

pytestmark = pytest.mark.long

SHOTS = Path(__file__).parents[1] / "build" / "screenshots"
AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")
HOSTILE = ("<script>alert(1)</script>", '<a href="javascript:alert(1)">x</a>', "<b>&lt;%{y}</b>")
CHARTS = ["losses", "timeline", "heat", "channels", "weights", "layers", "ranges", "twin"]
LARGEST_PAGE = 4e6


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in HOSTILE:
            self.add_module(name, fp8lab.GatedFeedForward(16, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in HOSTILE:
            x = x + getattr(self, name)(x)
        return x


def train(path: Path, recipe: Any, seed: int) -> None:
    torch.manual_seed(seed)
    model = Model()
    fp8lab.convert(model, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    config = {"part": "train", "arm": path.parent.name, "seed": seed}
    config["mitigations"] = [{"name": "HighPrecisionProduct"}]
    with fp8lab.watch(model, path, optimizer=optimizer, every=4, config=config) as watching:
        for step in range(48):
            x = torch.randn(32, 16) * (3.0 if step % 16 == 12 else 1.0)
            loss = (model(x) - 3.0 * x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watching.step(step, loss=float(loss.detach()))
        watching.set_result(diverged_at=None, final_loss=float(loss.detach()), final_rare_error=0.1)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    delayed = fp8lab.DelayedScaling(amax_history_len=4)
    for seed in (0, 1):
        train(folder / "runs" / "high" / f"seed-{seed}", fp8lab.HighPrecision(), seed)
        train(folder / "runs" / "delayed" / f"seed-{seed}", delayed, seed)
    return write_report([folder / "runs"], folder / "page.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = shutil.which("chromium")
    assert executable is not None, "no chromium on PATH: apt-get install chromium"
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=executable, args=arguments)
        yield browser
        browser.close()


class Visit:
    """The report in a page of its own; what it says, and what it asks for, which is refused."""

    def __init__(self, browser: Browser, report: Path, **options: Any) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.report = report
        options = {"viewport": {"width": 1280, "height": 900}} | options
        self.context = browser.new_context(**options)
        self.context.route("**/*", self._answer)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.goto(report.as_uri())
        if options.get("java_script_enabled", True):
            self.page.wait_for_selector("html[data-charts=drawn]")

    def _answer(self, route: Route) -> None:
        self.asked.append(route.request.url)
        route.continue_() if route.request.url == self.report.as_uri() else route.abort()

    def __enter__(self) -> Page:
        return self.page

    def __exit__(self, failed: object, *_: object) -> None:
        """It said nothing, and asked for nothing but itself."""
        self.context.close()
        if failed is None:
            assert self.said == []
            assert self.asked == [self.report.as_uri()]


@pytest.fixture(scope="module")
def page(browser: Browser, report: Path) -> Iterator[Page]:
    """The report on a wide screen in the light, open for all tests that put it back."""
    with Visit(browser, report) as page:
        yield page


def shown(page: Page) -> list[str]:
    """The names of the charts that took their pictures' places."""
    names = "figures => figures.map(figure => figure.dataset.chart)"
    return list(page.eval_on_selector_all("figure.drawn", names))


def state(page: Page, name: str) -> tuple[Any, bytes]:
    """What Plotly was given for a chart, and its pixels."""
    plot = page.locator(f"figure[data-chart={name}] .plot")
    given = plot.evaluate(
        "plot => JSON.stringify([plot.data, plot.layout.title, plot.layout.shapes])"
    )
    return given, plot.screenshot()


def test_every_chart_is_drawn(page: Page) -> None:
    assert sorted(shown(page)) == sorted(CHARTS)
    assert page.locator("figure.drawn .static:visible").count() == 0
    assert page.locator("figure.drawn .plot:visible").count() == len(CHARTS)


def test_points_look_as_the_caption_says(page: Page) -> None:
    """A ring on the largest gate × up; by channel a × on the one that is looked at."""
    chart = page.locator("figure[data-chart=weights]")
    signs = "plot => plot.data[plot.data.length - 1].marker.symbol"
    assert chart.locator(".plot").evaluate(signs).count("circle-open") == 1
    chooser = chart.locator("select").first
    names = chooser.locator("option").all_inner_texts()
    chooser.select_option(index=next(i for i, name in enumerate(names) if "by channel" in name))
    assert chart.locator(".plot").evaluate(signs)[0] == "x"
    chooser.select_option(index=0)


def test_the_page_itself_forbids_all_network(browser: Browser, report: Path) -> None:
    """What a script in it would ask for is refused before it is asked."""
    visit = Visit(browser, report)
    refused = visit.page.evaluate(
        """async () => {
          const refused = [];
          document.addEventListener("securitypolicyviolation", (e) => refused.push(e.blockedURI));
          await fetch("https://example.org/data").catch(() => {});
          await new Promise((next) => {
            const image = new Image();
            image.onerror = next;
            image.src = "https://example.org/image.png";
          });
          return refused;
        }"""
    )
    visit.context.close()
    assert refused == ["https://example.org/data", "https://example.org/image.png"]
    assert visit.asked == [report.as_uri()]


def test_a_thinned_line_keeps_its_spikes_and_nothing_that_is_no_number() -> None:
    values = np.random.default_rng(0).standard_normal(12_345)
    values[[17, 5_000, 12_000]] = 50.0, -50.0, np.nan
    kept = thin([values], 600)
    assert len(kept) <= 600 and np.all(np.diff(kept) > 0)
    assert {0, 17, 5_000, len(values) - 1} <= set(kept.tolist())
    assert np.isfinite(values[kept]).all()
    assert thin([values[:600]], 600).tolist() == list(range(600))


def test_the_page_is_small_enough_to_send(report: Path) -> None:
    size = report.stat().st_size
    print(f"the page has {size / 1e6:.1f} MB")
    assert size <= LARGEST_PAGE


@pytest.mark.parametrize("name", CHARTS)
def test_every_chooser_changes_the_picture(page: Page, name: str) -> None:
    choosers = page.locator(f"figure[data-chart={name}] .choosers label:visible")
    assert choosers.count() > 0
    for chooser in choosers.all():
        control = chooser.locator("select, input")
        before = state(page, name)
        if control.evaluate("control => control.tagName") == "SELECT":
            last = control.locator("option").count() - 1
            chosen = control.evaluate("control => control.selectedIndex")
            control.select_option(index=last if chosen != last else 0)
        else:
            said = chooser.locator("output").text_content()
            control.focus()
            page.keyboard.press("ArrowLeft")
            assert chooser.locator("output").text_content() != said
        given, pixels = state(page, name)
        label = chooser.locator("span").text_content()
        assert given != before[0], f"{name}: {label!r} changed nothing that is drawn"
        assert pixels != before[1], f"{name}: {label!r} changed no pixel"


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows(browser: Browser, report: Path, width: int, scheme: Any) -> None:
    size = {"width": width, "height": 900}
    with Visit(browser, report, viewport=size, color_scheme=scheme) as page:
        sizes = "() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        needed, there = page.evaluate(sizes)
        page.screenshot(path=SHOTS / f"{width}-{scheme}.png")
        page.screenshot(path=SHOTS / f"{width}-{scheme}-whole.png", full_page=True)
        assert needed <= there
        if (width, scheme) in ((1280, "light"), (400, "dark")):
            assert faults(page) == []


def test_what_can_be_scrolled_shows_it_and_a_key_scrolls_it(
    browser: Browser, report: Path, tmp_path: Path
) -> None:
    """A shadow at the edge beyond which there is more, on whichever side that is."""
    with Visit(browser, report, viewport={"width": 400, "height": 900}) as page:
        table = page.locator("#outcomes .scroll").last
        assert table.evaluate("table => table.scrollWidth > table.clientWidth + 60")

        def edges() -> tuple[float, float]:
            """How light it is under the table, at the left and at the right."""
            shot = imread(io.BytesIO(table.screenshot()))[-5, :, :3]
            return float(shot[1:4].mean()), float(shot[-4:-1].mean())

        left, right = edges()
        assert right < left - 0.1
        table.focus()
        for _ in range(30):
            page.keyboard.press("ArrowRight")
        page.wait_for_timeout(500)  # scrolling is smooth
        assert table.evaluate("table => table.scrollLeft") > 60
        left, right = edges()
        assert left < right - 0.1


def test_no_table_is_cut_on_a_wide_screen(page: Page) -> None:
    """Not the widest either, that of the arms with what each costs and what was found."""
    heads = page.locator("#outcomes table").last.locator("th[scope=col]").all_text_contents()
    assert len(heads) == 9 and heads[-1] == "findings"
    cut = "all => all.filter((one) => one.scrollWidth > one.clientWidth).length"
    assert page.locator(".scroll:visible").evaluate_all(cut) == 0


def test_of_several_arms_one_seed_is_shown_first(browser: Browser, report: Path) -> None:
    lines = "plot.data.filter((one) => one.mode === 'lines' && one.yaxis === 'y')"
    said = f"plot => {lines}.map((one) => one.text[0])"
    with Visit(browser, report) as page:
        chart = page.locator("figure[data-chart=losses]")
        seeds = chart.locator("label:has-text('Seeds') select")
        first = seeds.evaluate("select => select.selectedOptions[0].textContent")
        told = chart.locator(".plot").evaluate(said)
        assert first in ("0", "1")
        assert len(told) == 2 and all(name.endswith(f"seed {first}") for name in told)
        seeds.select_option(label="all")
        assert len(chart.locator(".plot").evaluate(said)) == 4


def faults(page: Page) -> list[tuple[str, str, list[str]]]:
    """What axe-core calls serious or critical."""
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("() => axe.run({ resultTypes: ['violations'] })")["violations"]
    grave = [one for one in found if one["impact"] in ("serious", "critical")]
    return [(one["id"], one["help"], [node["html"] for node in one["nodes"]]) for one in grave]


def test_colours_follow_when_the_reader_goes_dark(page: Page) -> None:
    colour = "plot => plot.layout.font.color"
    plot = page.locator("figure[data-chart=losses] .plot")
    light = plot.evaluate(colour)
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(100)
    dark = plot.evaluate(colour)
    page.emulate_media(color_scheme="light")
    assert dark != light


def test_without_scripts_the_pictures_stand(browser: Browser, report: Path) -> None:
    with Visit(browser, report, java_script_enabled=False) as page:
        assert page.locator("figure img:visible").count() == page.locator("figure").count()
        assert page.locator("figure").count() >= len(CHARTS)
        assert page.locator(".live").count() == 0
        page.screenshot(path=SHOTS / "without-scripts.png", full_page=True)


def test_in_print_the_pictures_stand_and_nothing_is_folded(browser: Browser, report: Path) -> None:
    with Visit(browser, report, color_scheme="dark") as page:
        page.emulate_media(media="print")
        assert page.locator(".live:visible").count() == 0
        assert page.locator("figure .static:visible").count() == page.locator("figure").count()
        for folded in page.locator("details").all():
            inside = folded.locator(":scope > :not(summary)").first.bounding_box()
            assert inside is not None and inside["height"] > 0
        background = "() => getComputedStyle(document.body).backgroundColor"
        assert page.evaluate(background) == "rgb(255, 255, 255)"
        page.screenshot(path=SHOTS / "print.png", full_page=True)
        page.pdf(path=SHOTS / "print.pdf", format="A4")


def test_hostile_names_stay_text(page: Page) -> None:
    """In the page's own elements and in Plotly's, which would take tags, links and templates."""
    layers = page.locator("figure[data-chart=heat] .yaxislayer-above text").all_text_contents()
    assert set(layers) == set(HOSTILE)
    options = page.locator("figure[data-chart=timeline] select option").all_text_contents()
    assert options == [f"{name}:product" for name in HOSTILE]
    heat = page.locator("figure[data-chart=heat] .nsewdrag").first
    heat.scroll_into_view_if_needed()
    box = heat.bounding_box()
    assert box is not None
    for row, name in enumerate(HOSTILE):
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * (row + 0.5) / 3)
        page.wait_for_selector("figure[data-chart=heat] .hoverlayer .hovertext")
        page.wait_for_timeout(150)  # Plotly waits a moment before it follows the pointer
        hover = page.locator("figure[data-chart=heat] .hoverlayer .hovertext").text_content()
        assert hover.startswith(name)
    assert page.locator(".plot a, .plot script, .plot b, main a[href^=javascript]").count() == 0


def test_an_axis_has_a_place_for_a_negative_loss(browser: Browser, tmp_path: Path) -> None:
    told = {}
    for name, end in {"falling": -1.0, "above": 1.0}.items():
        losses = [{"loss": 2.0}, {"loss": end}]
        write(tmp_path / name, steps=losses)
        report = write_report([tmp_path / name], tmp_path / f"{name}.html")
        with Visit(browser, report) as page:
            plot = page.locator("figure[data-chart=losses] .plot")
            told[name] = plot.evaluate("plot => plot._fullLayout.yaxis.type")
    assert told == {"falling": "linear", "above": "log"}
