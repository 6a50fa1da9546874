"""The page of molora routes --html in a browser, against numbers worked out apart."""

import errno
import json
import math
import os
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from selenium import webdriver
from selenium.common.exceptions import NoAlertPresentException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.select import Select
from transformers import PreTrainedModel

import molora
from molora.errors import ConfigError, DataError
from molora.model import sites
from molora.page import LOG_STEPS, Prompts, page_data, render, save_page
from molora.records import RoutingTrace
from molora.training.routing_log import read_log

ROOT = Path(__file__).resolve().parents[1]
FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run
--disable-background-networking --disable-component-update --disable-sync
--disable-dev-shm-usage"""
EVIL = "</script><script>alert(1)</script>"
IMAGE = "<img src=x onerror=alert(1)>"
TOKENS = ["two", " red", "\n", IMAGE, EVIL]
SITE = "model.layers.{}.mlp.{}_proj"
SETTINGS = {
    "target_modules": ["up_proj", "down_proj"],
    "experts": {"kind": "lora", "num_experts": 4, "r": 2},
    "router": {"kind": "topk", "top_k": 2, "init_range": 3.0},
}
Factory = Callable[..., PreTrainedModel]


def command(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.fail(
            f"{name} is not installed; install Debian's packages chromium and "
            "chromium-driver (make browser)"
        )
    return found


@pytest.fixture(scope="module")
def browser(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = command("chromium")
    profile = tmp_path_factory.mktemp("profile")
    for flag in [*FLAGS.split(), f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    logs = {"browser": "ALL", "performance": "ALL"}
    options.set_capability("goog:loggingPrefs", logs)
    service = Service(command("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def model(tiny_llama: Factory) -> PreTrainedModel:
    """Two layers of two sites of four experts; the last site's expert 2 is zero."""
    model = molora.wrap(tiny_llama(), molora.AdapterConfig.from_dict(SETTINGS), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for site in sites(model).values():
            site.experts.Bt.normal_(generator=generator)
        site.experts.Bt[2] = 0
    return model


@pytest.fixture(scope="module")
def trace(model: PreTrainedModel) -> RoutingTrace:
    """One forward of two rows for each of two tasks, the second row padded."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    with molora.record_routing(model) as trace, torch.no_grad():
        for task in ("plain", EVIL):
            ids = torch.randint(3, 128, (2, 6), generator=generator)
            with molora.tasks(model, [task] * 2):
                model(input_ids=ids, attention_mask=mask)
    return trace


@pytest.fixture(scope="module")
def prompts(model: PreTrainedModel) -> Prompts:
    with molora.record_routing(model) as trace, torch.no_grad():
        for first in (5, 50):
            model(input_ids=torch.arange(first, first + len(TOKENS)).unsqueeze(0))
    return Prompts(trace, [TOKENS, [f"w{i}" for i in range(len(TOKENS))]])


def write_log(path: Path, model: PreTrainedModel, steps: int) -> list[dict[str, Any]]:
    """A log of every site but the last."""
    rng = numpy.random.default_rng(3)
    rows = []
    for step in range(10, 10 * steps + 1, 10):
        for site in list(sites(model))[:-1]:
            weight, share = rng.dirichlet([1] * 4, 2).tolist()
            row = {"step": step, "site": site, "mean_weight": weight, "share": share}
            rows.append({**row, "entropy": rng.uniform()})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


Page = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def page(
    tmp_path_factory: pytest.TempPathFactory,
    model: PreTrainedModel,
    trace: RoutingTrace,
    prompts: Prompts,
) -> Page:
    folder = tmp_path_factory.mktemp("page")
    rows = write_log(folder / "routing_log.jsonl", model, 7)
    path = folder / "page.html"
    log = folder / "routing_log.jsonl"
    save_page(path, model, trace, title=f"Run {IMAGE}", log=log, prompts=prompts)
    return path, rows


@pytest.fixture
def opened(browser: webdriver.Chrome, page: Page) -> Iterator[webdriver.Chrome]:
    """The page, 1000 pixels wide; checks that it fetched nothing and met no error."""
    show(browser, 1000)
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(page[0].as_uri())
    yield browser
    assert browser.get_log("browser") == []
    fetched = requests(browser)
    assert page[0].as_uri() in fetched
    assert {url for url in fetched if not url.startswith("data:")} == {fetched[0]}


def requests(browser: webdriver.Chrome) -> list[str]:
    events = [json.loads(line["message"]) for line in browser.get_log("performance")]
    return [
        event["message"]["params"]["request"]["url"]
        for event in events
        if event["message"]["method"] == "Network.requestWillBeSent"
    ]


def show(browser: webdriver.Chrome, width: int, scheme: str = "light") -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def by_id(browser: webdriver.Chrome, name: str) -> WebElement:
    return browser.find_element(By.ID, name)


def choose(browser: webdriver.Chrome, name: str, text: str) -> None:
    Select(by_id(browser, name)).select_by_visible_text(text)


def cells(browser: webdriver.Chrome, table: str) -> list[list[WebElement]]:
    rows = browser.find_elements(By.CSS_SELECTOR, f"#{table} tbody tr")
    return [row.find_elements(By.TAG_NAME, "button") for row in rows]


def readouts(browser: webdriver.Chrome, table: str) -> list[list[tuple[str, str]]]:
    """Click every cell of a table: its text, and the line that it shows."""
    line = by_id(browser, f"{table}-readout")
    cells(browser, table)[0][1].click()
    first = line.text
    found: list[list[tuple[str, str]]] = browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(row =>"
        "[...row.querySelectorAll('button')].map(cell =>"
        "(cell.click(), [cell.textContent, arguments[1].textContent])))",
        f"#{table} tbody tr",
        line,
    )
    assert found[0][1][1] == first
    return found


def named(text: str, name: str) -> float:
    """The number that follows a name in a readout."""
    (found,) = re.findall(rf"(?:^|· ){name} (-?[\d.]+)", text)
    return float(found)


def listed(browser: webdriver.Chrome, name: str) -> list[float]:
    numbers = browser.find_elements(By.CSS_SELECTOR, f"#{name} .number")
    return [float(number.text) for number in numbers]


def real_gates(trace: RoutingTrace, path: str, forward: int) -> numpy.ndarray:
    """Gates [T, E] of the real tokens of one forward, float64."""
    record = trace.sites[path]
    gates, mask = record.gates[forward], record.masks[forward]
    flat = gates.flatten(0, 1) if mask is None else gates[mask]
    return flat.double().numpy()


def test_heat_map_has_share_and_gate_of_every_site(
    opened: webdriver.Chrome, trace: RoutingTrace
) -> None:
    for forward, task in enumerate(("plain", EVIL)):
        choose(opened, "task", task)
        for module in ("up", "down"):
            choose(opened, "module", f"mlp.{module}_proj")
            rows = readouts(opened, "heat")
            assert [len(row) for row in rows] == [4, 4]
            for layer, row in enumerate(rows):
                gates = real_gates(trace, SITE.format(layer, module), forward)
                assert len(gates) == 10
                for expert, (cell, text) in enumerate(row):
                    assert text.startswith(f"{SITE.format(layer, module)} ·")
                    assert named(text, "expert") == expert
                    share = (gates[:, expert] > 0).sum() / (gates > 0).sum()
                    assert named(text, "share") == pytest.approx(share, abs=5.1e-5)
                    mean = gates[:, expert].mean()
                    assert named(text, "mean gate") == pytest.approx(mean, abs=5.1e-5)
                    assert float(cell) == pytest.approx(share, abs=5.1e-3)
            site = Select(by_id(opened, "site")).first_selected_option
            assert site.text == SITE.format(1, module)


def test_heat_map_of_layers_means_sites_and_tasks(
    opened: webdriver.Chrome, trace: RoutingTrace
) -> None:
    choose(opened, "measure", "mean gate")
    assert by_id(opened, "heat-readout").text == "all tokens: 20 tokens"
    for layer, row in enumerate(readouts(opened, "heat")):
        paths = [SITE.format(layer, module) for module in ("up", "down")]
        # as many tokens in each: the mean over sites is the mean over their tokens
        every = [real_gates(trace, path, i) for path in paths for i in (0, 1)]
        for expert, mean in enumerate(numpy.concatenate(every).mean(0)):
            _, text = row[expert]
            assert named(text, "mean gate") == pytest.approx(mean, abs=5.1e-5)
            assert text.startswith(f"layer {layer} (mean of its sites, 2 in all)")


def test_colour_grows_with_the_value(opened: webdriver.Chrome) -> None:
    found = opened.execute_script(
        "return [...document.querySelectorAll('#heat button')].map("
        "cell => [cell.style.getPropertyValue('--v'), cell.getAttribute('aria-label')])"
    )
    parts = [float(part) for part, _ in found]
    values = [float(re.findall(r"share ([\d.]+)", label)[0]) for _, label in found]
    assert len(set(values)) > 4
    top = float(by_id(opened, "heat-top").text)
    assert numpy.allclose(numpy.multiply(parts, top), values, atol=0.006)


def test_training_is_drawn_from_the_log(opened: webdriver.Chrome, page: Page) -> None:
    site = SITE.format(0, "down")
    rows = [row for row in page[1] if row["site"] == site]
    choose(opened, "site", site)
    assert "7 logged steps, from page" in by_id(opened, "log-note").text
    assert listed(opened, "load-readout") == pytest.approx(rows[6]["share"], abs=5.1e-5)
    by_id(opened, "step").send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert by_id(opened, "step-name").text == "step 50"
    assert listed(opened, "load-readout") == pytest.approx(rows[4]["share"], abs=5.1e-5)
    text = by_id(opened, "entropy-readout").text
    assert named(text, "entropy") == pytest.approx(rows[4]["entropy"], abs=5.1e-5)
    mean = numpy.mean([row["entropy"] for row in page[1] if row["step"] == 50])
    assert named(text, "mean of all sites") == pytest.approx(mean, abs=5.1e-5)
    choose(opened, "load", "share of the gates")
    weight = rows[4]["mean_weight"]
    assert listed(opened, "load-readout") == pytest.approx(weight, abs=5.1e-5)


def test_lines_of_the_charts_have_the_values(
    opened: webdriver.Chrome, page: Page
) -> None:
    rows = [row for row in page[1] if row["site"] == SITE.format(0, "up")]
    choose(opened, "site", SITE.format(0, "up"))
    axis = (
        "return [...document.querySelectorAll('#{} .axis')].map("
        "line => line.y1.baseVal.value)"
    )
    label = "return document.querySelectorAll('#{} text')[2].textContent"
    path = "return document.querySelector('#{} path.{}').getAttribute('d')"
    for chart, line, want in (
        ("entropy-chart", "one", [row["entropy"] for row in rows]),
        ("load-chart", "c2", [row["share"][2] for row in rows]),
    ):
        zero, _, one = opened.execute_script(axis.format(chart))
        top = float(opened.execute_script(label.format(chart)))
        drawn = opened.execute_script(path.format(chart, line))
        heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", drawn)]
        assert [top * (zero - y) / (zero - one) for y in heights] == pytest.approx(
            want, abs=1e-5
        )


def test_a_site_or_a_run_without_a_log_says_so(
    opened: webdriver.Chrome,
    tmp_path: Path,
    model: PreTrainedModel,
    trace: RoutingTrace,
) -> None:
    choose(opened, "site", SITE.format(1, "down"))
    assert "no line of this site" in by_id(opened, "log-note").text
    assert not by_id(opened, "log").is_displayed()
    log = tmp_path / "routing_log.jsonl"
    bare = page_data(model, trace, title="bare", log=log)
    assert bare["log"] == {"missing": f"{tmp_path.name}/routing_log.jsonl is not there"}
    log.write_text("")
    empty = page_data(model, trace, title="bare", log=log)["log"]["missing"]
    assert empty.endswith("is empty")
    opened.execute_script("data.log = arguments[0]; drawLog()", bare["log"])
    assert "No training log" in by_id(opened, "log-note").text


def test_tokens_show_their_top_expert_and_gates(
    opened: webdriver.Chrome, prompts: Prompts
) -> None:
    colours: dict[int, set[str]] = {}
    for text, words in enumerate(prompts.tokens):
        Select(by_id(opened, "text")).select_by_index(text)
        for path in prompts.trace.sites:
            choose(opened, "site", path)
            gates = real_gates(prompts.trace, path, text)
            shown = opened.execute_script(TOKENS_SHOWN)
            for word, row, token in zip(words, gates, shown, strict=True):
                top = int(row.argmax())
                assert token["text"] == f"{word}{top}".replace("\n", "↵")
                colours.setdefault(top, set()).add(token["colour"])
                assert json.dumps(word) in token["readout"]
                numbers = [float(number) for number in token["numbers"]]
                assert numbers == pytest.approx(row, abs=5.1e-5)
    assert set(colours) == {0, 1, 2, 3}
    assert all(len(seen) == 1 for seen in colours.values())
    assert len({seen.pop() for seen in colours.values()}) == 4
    opened.find_elements(By.CSS_SELECTOR, "#tokens button")[2].click()
    assert by_id(opened, "token-readout").text == 'token 3 of 5: "w2"'
    assert listed(opened, "token-gates") == pytest.approx(gates[2], abs=5.1e-5)


TOKENS_SHOWN = """
return [...document.querySelectorAll("#tokens button")].map((button) => {
  button.click();
  return {
    text: button.textContent,
    colour: getComputedStyle(button).backgroundColor,
    readout: document.getElementById("token-readout").textContent,
    numbers: [...document.querySelectorAll("#token-gates .number")].map(
      (number) => number.textContent),
  };
});
"""


def test_similarity_equals_dense_updates(
    opened: webdriver.Chrome, model: PreTrainedModel
) -> None:
    for path, site in sites(model).items():
        choose(opened, "site", path)
        A = site.experts.A.detach().double().numpy()
        Bt = site.experts.Bt.detach().double().numpy()
        flat = numpy.stack([(b.T @ a).ravel() for a, b in zip(A, Bt, strict=True)])
        for i, row in enumerate(readouts(opened, "similarity")):
            for j, (_, text) in enumerate(row):
                norms = numpy.linalg.norm(flat[i]) * numpy.linalg.norm(flat[j])
                if norms == 0:
                    assert 2 in (i, j) and text.endswith("cosine –")
                    continue
                assert text.startswith(f"experts {i} and {j} ·")
                want = flat[i] @ flat[j] / norms
                assert named(text, "cosine") == pytest.approx(want, abs=5.1e-5)
    assert by_id(opened, "similarity-note").text.endswith("the update is zero: e2.")


def test_names_and_tokens_cannot_break_out(
    opened: webdriver.Chrome, page: Page
) -> None:
    text = page[0].read_text("utf-8")
    assert EVIL not in text and IMAGE not in text
    # the heading, in the head and in the data, and a token
    assert text.count("onerror=alert") == 3
    with pytest.raises(NoAlertPresentException):
        _ = opened.switch_to.alert.text
    assert len(opened.find_elements(By.TAG_NAME, "script")) == 2
    assert opened.find_elements(By.TAG_NAME, "img") == []
    assert opened.title == by_id(opened, "title").text == f"Run {IMAGE}"
    names = [option.text for option in Select(by_id(opened, "task")).options]
    assert names == ["all tokens", "plain", EVIL]
    choose(opened, "task", EVIL)
    assert by_id(opened, "heat-readout").text == f"{EVIL}: 10 tokens"


def test_policy_lets_no_other_script_run(browser: webdriver.Chrome, page: Page) -> None:
    browser.get(page[0].as_uri())
    browser.execute_script(
        "const s = document.createElement('script'); s.textContent = 'broken = 1';"
        "document.body.append(s);"
        "document.body.insertAdjacentHTML('beforeend', arguments[0])",
        IMAGE.replace("alert(1)", "broken=1"),
    )
    assert browser.execute_script("return typeof broken") == "undefined"
    refused = [line["message"] for line in browser.get_log("browser")]
    assert any("Content Security Policy" in message for message in refused)


def test_keyboard_reaches_everything(opened: webdriver.Chrome) -> None:
    for control in opened.find_elements(By.CSS_SELECTOR, "select, input, button"):
        if control.is_displayed():
            assert control.accessible_name
    grid = cells(opened, "heat")
    reached = []
    by_id(opened, "task").send_keys(Keys.TAB)
    for _ in range(8):
        active = opened.switch_to.active_element
        reached.append(active.get_attribute("id") or active.accessible_name)
        active.send_keys(Keys.TAB)
    # one stop for the whole table, then what follows it
    assert reached[:2] == ["module", "measure"]
    assert reached[2].startswith("layer 0, expert 0")
    assert reached[3:6] == ["site", "load", "step"]
    grid[0][0].send_keys(Keys.ARROW_RIGHT)
    opened.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    assert opened.switch_to.active_element == grid[1][1]
    assert "expert 1" in by_id(opened, "heat-readout").text
    first = opened.find_element(By.CSS_SELECTOR, "#tokens button")
    first.send_keys(Keys.ARROW_RIGHT)
    opened.switch_to.active_element.send_keys(Keys.SPACE)
    assert "token 2 of 5" in by_id(opened, "token-readout").text


CONTRAST = """
const c = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const light = (colour) => {
  c.fillStyle = colour; c.fillRect(0, 0, 1, 1);
  const f = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const [r, g, b] = c.getImageData(0, 0, 1, 1).data;
  return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b);
};
const ratio = (element) => {
  const style = getComputedStyle(element);
  const pair = [light(style.color), light(style.backgroundColor)].sort((a, b) => b - a);
  return (pair[0] + 0.05) / (pair[1] + 0.05);
};
const cell = document.querySelector("#heat button");
const names = [...document.querySelectorAll(".name, #tokens button, select")];
const found = names.map(ratio);
for (const opposite of [false, true])
  for (let part = 0; part <= 1; part += 0.05) {
    tint(cell, part, opposite);
    found.push(ratio(cell));
  }
return found;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_and_nothing_overflows(
    opened: webdriver.Chrome, scheme: str
) -> None:
    for width in (1000, 400):
        show(opened, width, scheme)
        choose(opened, "task", EVIL)
        wide = "return document.documentElement.scrollWidth"
        assert 300 < opened.execute_script(wide) <= width
    colour = "return getComputedStyle(document.body).backgroundColor"
    background = opened.execute_script(colour)
    assert (sum(map(int, re.findall(r"\d+", background))) < 150) == (scheme == "dark")
    ratios = opened.execute_script(CONTRAST)
    # 4.5 is what WCAG 2.2 asks for small text
    assert len(ratios) > 50 and min(ratios) >= 4.5


def test_a_long_log_is_thinned_and_keeps_its_ends(
    tmp_path: Path, model: PreTrainedModel, trace: RoutingTrace
) -> None:
    log = tmp_path / "routing_log.jsonl"
    rows = write_log(log, model, 999)
    found = page_data(model, trace, title="long", log=log)["log"]
    # every fifth from the last one
    assert found["steps"] == list(range(9990, 0, -50))[::-1]
    assert len(found["steps"]) == 200 <= LOG_STEPS and found["logged"] == 999
    last = [row for row in rows if row["step"] == 9990][0]
    assert found["sites"][0]["share"][-1] == last["share"]


LINE: dict[str, Any] = {
    "step": 1,
    "site": "a",
    "mean_weight": [1, 0.0],
    "share": [0.5, 0.5],
}
LINE["entropy"] = 0.5


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    log = tmp_path / "routing_log.jsonl"
    log.write_text(json.dumps(LINE) + '\n{"step": 2, "si')
    assert read_log(log) == [LINE]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (b'{"step"', "is no JSON"),
        (b'{"site": "caf\xe9"}', "is no JSON in UTF-8"),
        (b"[1]", "dictionary"),
        ({"step": []}, "step: "),
        ({"step": "x"}, "step: "),
        ({"step": True}, "step: "),
        ({"site": None}, "site: "),
        ({"share": None}, "share: "),
        ({"share": [0.5]}, "differ in length"),
        ({"mean_weight": ["1", 0.0]}, "mean_weight.0: "),
        ({"entropy": None}, "entropy: "),
        ({"entropy": 10**400}, "entropy: "),
    ],
)
def test_a_damaged_log_is_refused(
    tmp_path: Path, line: bytes | dict[str, Any], wrong: str
) -> None:
    log, good = tmp_path / "routing_log.jsonl", json.dumps(LINE).encode()
    bad = line if isinstance(line, bytes) else json.dumps(LINE | line).encode()
    log.write_bytes(good + b"\n" + bad + b"\n" + good + b"\n")
    with pytest.raises(DataError, match=f"jsonl, line 2: .*{wrong}"):
        read_log(log)


@pytest.mark.parametrize("field", LINE)
def test_a_log_without_a_field_is_refused(tmp_path: Path, field: str) -> None:
    log = tmp_path / "routing_log.jsonl"
    log.write_text(json.dumps({k: v for k, v in LINE.items() if k != field}) + "\n")
    with pytest.raises(DataError, match=f"line 1: .*{field}: Field required"):
        read_log(log)


def test_a_page_appears_whole_or_not_at_all(
    tmp_path: Path,
    model: PreTrainedModel,
    trace: RoutingTrace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    page, log = tmp_path / "page.html", tmp_path / "routing_log.jsonl"
    save_page(page, model, trace, title="first", log=log)
    whole = page.read_bytes()
    assert b"first" in whole
    with monkeypatch.context() as patch:
        patch.setattr("molora.atomic._fsync", full)
        with pytest.raises(ConfigError, match="No space left"):
            save_page(page, model, trace, title="second", log=log)
    assert page.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(ConfigError, match="cannot be written"):
        save_page(tmp_path / "no" / "page.html", model, trace, title="", log=log)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for place in (pipe, tmp_path, Path("/")):
        with pytest.raises(ConfigError, match="is no regular file"):
            save_page(place, model, trace, title="", log=log)
    assert pipe.is_fifo()


def test_a_title_that_is_no_utf8_is_written(
    tmp_path: Path, model: PreTrainedModel, trace: RoutingTrace
) -> None:
    page = tmp_path / "page.html"
    title = os.fsdecode(b"caf\xe9")
    save_page(page, model, trace, title=title, log=tmp_path / "none")
    assert "<title>caf?</title>" in page.read_text("utf-8")


def test_a_log_of_a_run_that_diverged_is_shown(
    tmp_path: Path, model: PreTrainedModel, trace: RoutingTrace
) -> None:
    log, weights = tmp_path / "routing_log.jsonl", [[0.5] * 4, [math.nan] * 4]
    entropies = [1.0, 0.5, math.inf, -math.inf]
    rows = [
        {"step": i // 2, "site": site, "entropy": entropy}
        | dict(zip(("mean_weight", "share"), weights, strict=True))
        for i, entropy in enumerate(entropies)
        for site in list(sites(model))[i % 2 : i % 2 + 1]
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = tmp_path / "page.html"
    save_page(page, model, trace, title="", log=log)
    text = page.read_text("utf-8").partition('id="data">')[2].partition("</script>")[0]
    found = json.loads(text)["log"]
    assert found["entropy"] == [0.75, None]
    assert found["sites"][0]["mean_weight"] == [[0.5] * 4] * 2
    assert found["sites"][0]["share"] == [[None] * 4] * 2


def test_numbers_that_are_not_finite_are_shown_as_missing() -> None:
    shown = render({"title": "", "x": [float("nan"), float("inf"), 1 / 3]})
    assert '"x":[null,null,0.333333]' in shown


def test_the_page_s_files_are_in_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    shipped = project["tool"]["setuptools"]["package-data"]["molora.page"]
    there = [p.name for p in (ROOT / "molora/page").iterdir() if p.is_file()]
    assert sorted(shipped) == sorted(n for n in there if not n.endswith(".py"))
