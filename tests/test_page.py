"""The page in a real browser: whole, quick, without a network; and what it shows against brute force."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_intervene import study, talking  # noqa: F401 -- talking is a fixture
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from atom_lens import load_atoms, train
from atom_lens.dictionaries import kind
from atom_lens.evidence.codes import codes_of
from atom_lens.evidence.measure import observe
from atom_lens.recipe.contexts import corpus
from atom_lens.recipe.reading import check_recipe, load_recipe
from atom_lens.recipe.recipe import Recipe
from atom_lens.recipe.sections import Model
from atom_lens.studies.compare.run import compare
from atom_lens.studies.intervene.run import intervene
from atom_lens.studies.points import Measured, over_layers
from atom_lens.studies.report.atoms import browse, neighbours, window_margin
from atom_lens.studies.report.browsers import Browser as AtomsBrowser
from atom_lens.studies.report.browsers import open_browsers
from atom_lens.studies.report.run import read_folders, sections_of, write_page
from atom_lens.studies.report.words import columns, is_residual, open_lens
from atom_lens.studies.scale.run import scale
from atom_lens.studies.train.result import RunReport

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "</script><img src=x onerror=pwned=1>"
HOOK = "blocks.1.hook_resid_post"
pytestmark = pytest.mark.slow  # a run and studies of every kind, and a browser


class Browser:
    """A tab of a headless Chromium, driven over its DevTools protocol.

    Attributes:
        troubles: what it logged as errors or warnings, and uncaught exceptions.
        requests: every URL it asked for.
    """

    def __init__(self, profile: Path) -> None:
        self.websocket = pytest.importorskip("websocket", reason="pip install websocket-client")
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        arguments += ["--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            [str(CHROMIUM), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        port = profile / "DevToolsActivePort"
        self.until(lambda: port.is_file() and port.read_text().count("\n"), "chromium did not start")
        at, path = port.read_text().split()
        self.socket = self.websocket.create_connection(f"ws://127.0.0.1:{at}{path}", suppress_origin=True, timeout=60)
        self.numbers = itertools.count(1)
        self.session: dict[str, str] = {}
        self.troubles: list[str] = []
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(timeout=30)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol, and note the events that come in meanwhile."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters, **self.session}))
        while True:
            found = json.loads(self.socket.recv())
            if found.get("id") == number:
                assert "error" not in found, (method, found["error"])
                return found["result"]
            about = found.get("params", {})
            match found["method"]:
                case "Runtime.exceptionThrown":
                    self.troubles.append(str(about["exceptionDetails"]))
                case "Runtime.consoleAPICalled" if about["type"] in ("error", "warning", "assert"):
                    self.troubles.append(str(about["args"]))
                case "Log.entryAdded" if about["entry"]["level"] in ("error", "warning"):
                    self.troubles.append(str(about["entry"]))
                case "Network.requestWillBeSent":
                    self.requests.append(about["request"]["url"])

    def js(self, expression: str) -> Any:
        """The value of an expression in the page; promises are waited for."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(self, file: Path, width: int = 1280, height: int = 900) -> None:
        """Open a file in a window of this size, a phone's below 500, and wait until it is loaded."""
        phone = width < 500
        self.troubles.clear()
        self.requests.clear()
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.send("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.prefer("light")
        self.send("Page.navigate", url=file.resolve().as_uri())
        loaded = "document.readyState === 'complete' && location.protocol === 'file:'"
        self.until(lambda: self.js(loaded), "the page did not load")

    def prefer(self, scheme: str) -> None:
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def search(self, text: str) -> list[int]:
        """Type into the search field; the atoms that the list then shows."""
        self.js(f"search.value = {json.dumps(text)}; search.dispatchEvent(new Event('input'))")
        return self.listed()

    def listed(self) -> list[int]:
        return self.js("[...document.querySelectorAll('#list tbody tr')].map(row => Number(row.dataset.atom))")

    @staticmethod
    def until(ready: Callable[[], Any], otherwise: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end, otherwise
            time.sleep(0.05)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def work(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with 120 prompts, one of them hostile, that recipes are run in."""
    folder = tmp_path_factory.mktemp("page")
    draw = random.Random(0)
    subjects = sorted({"".join(draw.choices("abcdefghijkl", k=4)) for _ in range(400)})[:120]
    rows = [{"template": "{} is a city in", "subject": s, "answer": draw.choice(["Frânce", "Italy"])} for s in subjects]
    rows[7] = {"template": f"{EVIL} {{}} is", "subject": "<img src=y>", "answer": EVIL}
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOM_LENS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.chdir(folder)
        yield folder


def recipe(tiny: str, name: str, **changes: Any) -> Recipe:
    return check_recipe(
        {
            "name": name,
            "model": {"name": tiny, "device": "cpu"},
            "prompts": {"source": "jsonl", "path": "prompts.jsonl"},
            "hooks": ["blocks.*.hook_resid_post"],
            "atoms": {"capacity": 40, "target_l0": 3.0},
            "training": {"steps": 20, "batch_size": 16, "device": "cpu", "seeds": 2},
            **changes,
        }
    )


@pytest.fixture(scope="module")
def run(tiny: str, work: Path) -> Path:
    """A run of three hooks from two seeds, with all nulls."""
    return train(recipe(tiny, "run"))


@pytest.fixture(scope="module")
def page(tiny: str, run: Path, work: Path, request: pytest.FixtureRequest) -> Path:
    """One page about a run and a study of every kind."""
    units = {"units": ["neurons", "topk", "tsae_free"], "l0": [2.0, 4.0], "matched": [3.0]}
    two = ["blocks.0.hook_resid_post", HOOK]
    studies = [compare(recipe(tiny, "comparison", hooks=two, compare=units))]
    grid = {"n": [24, 48, 96], "capacities": [8, 16, 32], "levels": [0.3]}
    once = {"steps": 10, "batch_size": 16, "device": "cpu"}
    studies.append(scale(recipe(tiny, "grid", hooks=[HOOK], scale=grid, training=once)))
    studies.append(intervene(load_recipe(study(request.getfixturevalue("talking"), work))))
    return write_page([run, *studies], work / "all.html")


def test_it_is_whole_and_asks_for_nothing(browser: Browser, page: Path) -> None:
    """Every section, every figure under every choice, no trouble, and not one request but for the file."""
    browser.open(page)
    sections = browser.js("[...document.querySelectorAll('section')].map(section => section.id)")
    names = ["results-and-nulls", "geometry", "dictionaries-and-nulls", "layers", "capacity", "interventions", "atoms"]
    assert sections == names
    # What is drawn is data: every plot that is shown has marks or lines of some length, and lies within the page.
    drawn = (
        "[...document.querySelectorAll('.plot')].filter(plot => plot.checkVisibility()).map(plot =>"
        " [...plot.querySelectorAll('svg path')].filter(path => path.getTotalLength() > 0).length)"
    )
    wide = (
        "[...document.querySelectorAll('.plot svg')].filter(s => s.getBoundingClientRect().right > innerWidth).length"
    )
    shown = "document.querySelectorAll('.panel:not([hidden]) .plot:not([hidden])').length"
    marks = browser.js(drawn)
    assert len(marks) >= 11 and min(marks) > 3 and browser.js(wide) == 0 and browser.js(shown) == len(marks)
    for choice in range(1, 3):
        browser.js(
            f"document.querySelectorAll('select[data-section]').forEach(select => {{ select.selectedIndex = {choice};"
            " select.dispatchEvent(new Event('change')); })"
        )
        assert min(browser.js(drawn)) > 3 and browser.js(shown) == len(browser.js(drawn)) > 0
        astray = (
            "[...document.querySelectorAll('.plot:not([hidden])')].filter(plot => {"
            ' const select = document.querySelector(`select[data-section="${plot.dataset.section}"]`);'
            " return select && select.value && plot.dataset.choice !== select.value; }).length"
        )
        assert browser.js(astray) == 0
    assert browser.js("document.querySelectorAll('img').length") == 0 and browser.js("typeof pwned") == "undefined"
    assert browser.troubles == []
    assert set(browser.requests) == {page.resolve().as_uri()}


def test_hostile_text_stays_text(browser: Browser, run: Path, page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    assert "<img" not in html and "onerror" in html
    browser.open(page)
    found = browser.search("<img src=y>")
    assert found
    for atom in found:
        browser.js(f"document.querySelector('#list tr[data-atom=\"{atom}\"]').click()")
        texts = browser.js("[...card.querySelectorAll('.context')].map(context => context.textContent)")
        assert f"{EVIL} <img src=y> is" in texts
        answers = browser.js("[...card.querySelectorAll('.answer')].map(answer => answer.textContent)")
        assert f"answer: {EVIL}" in answers
    assert browser.js("document.querySelectorAll('img').length") == 0 and browser.troubles == []


def top(codes: np.ndarray, side: np.ndarray) -> np.ndarray:
    """The four rows of a split at which an atom is strongest."""
    rows = np.flatnonzero(side & (codes != 0))
    return rows[np.argsort(-codes[rows], kind="stable")][:4]


def test_search_sort_and_detail(browser: Browser, tiny: str, run: Path, page: Path) -> None:
    """The list against the atoms themselves: who fires where, in which order, and what a card says."""
    hook = "blocks.0.hook_resid_post"
    atoms, seen = load_atoms(run, hook=hook), corpus(load_recipe(run / "recipe.yaml"), hook)
    codes = codes_of(atoms, seen.x).toarray()
    held = seen.heldout.numpy()
    browser.open(page)
    assert browser.js("of.selectedOptions[0].textContent") == f"run · {hook}"
    fires = (codes[held] != 0).sum(0)
    assert browser.listed() == sorted(range(40), key=lambda i: (-fires[i], i))[:25]

    def click(column: str) -> list[int]:
        heads = "[...document.querySelectorAll('#list thead button')]"
        browser.js(f"{heads}.find(button => button.textContent.startsWith('{column}')).click()")
        return browser.listed()

    assert click("atom") == list(range(25))
    assert browser.js("document.querySelector('#list th[aria-sort]').getAttribute('aria-sort')") == "ascending"
    browser.js("next.click()")
    assert browser.listed() == list(range(25, 40)) and browser.js("next.disabled")
    assert click("atom") == list(range(39, 14, -1))
    fires = (codes[~held] != 0).sum(0)
    assert click("train") == sorted(range(40), key=lambda i: (-fires[i], i))[:25]
    scores = json.loads(browser.js("document.getElementById('atoms-0').textContent"))["identity"]
    assert click("identity") == sorted(range(40), key=lambda i: (-scores[i], i))[:25]
    margins = window_margin(atoms, observe(atoms, seen.x.select(seen.heldout), atoms.aip)).nan_to_num(-torch.inf)
    rounded = [float(f"{margin:.4g}") for margin in margins.tolist()]
    assert click("margin") == sorted(range(40), key=lambda i: (-rounded[i], i))[:25]

    click("atom")
    assert browser.search("17") == [17]
    strongest = [
        {str(seen.prompt(int(row)).subject) for side in (held, ~held) for row in top(codes[:, i], side)}
        for i in range(40)
    ]
    for subject in list(strongest[3])[:3]:
        assert browser.search(subject) == [i for i in range(40) if subject in strongest[i]]
    assert browser.search("frânce") == browser.search("FRANCE") != []
    assert browser.search("nothing is called this") == []
    assert browser.js("document.getElementById('page').textContent") == "no atom fits"

    browser.search("")
    browser.js("document.querySelector('#list tr[data-atom=\"3\"]').click()")
    assert browser.js("card.querySelector('h3').textContent") == "Atom 3"
    shown = browser.js(
        "[...card.querySelectorAll('ol li')].map(line => [line.querySelector('.context').textContent,"
        " line.querySelector('mark').textContent, line.querySelector('.badge').textContent])"
    )
    rows = np.sort(np.concatenate([top(codes[:, 3], side) for side in (held, ~held)]))
    expected = []
    for row in rows[np.argsort(-codes[rows, 3], kind="stable")].tolist():
        text, (start, end) = seen.prompt(row).text, seen.span(row)
        expected.append([text, text[start:end], "held-out" if held[row] else "train"])
    assert len(expected) > 2 and shown == expected
    near = browser.js("Number(card.querySelector('.near button').firstChild.textContent)")
    cosine = atoms.aip.cosine(atoms.W_dec.detach(), atoms.W_dec.detach()).abs().fill_diagonal_(0)
    assert near == int(cosine[3].argmax())
    browser.js("card.querySelector('.near button').click()")
    assert browser.js("card.querySelector('h3').textContent") == f"Atom {near}"
    browser.js("document.activeElement.blur(); document.dispatchEvent(new KeyboardEvent('keydown', { key: '/' }))")
    assert browser.js("document.activeElement.id") == "search"
    assert browser.troubles == []


def test_another_dictionary_with_a_search_that_fits_nothing(browser: Browser, page: Path) -> None:
    """No atom of the one before stays open, neither in the card nor in the list."""
    browser.open(page)
    browser.js("document.querySelector('#list tr[data-atom=\"3\"], #list tbody tr').click()")
    assert browser.js("card.childElementCount") > 0
    assert browser.search("nothing is called this") == []
    browser.js("of.selectedIndex = 1; of.dispatchEvent(new Event('change'))")
    assert browser.js("card.childElementCount") == 0
    browser.search("")
    assert browser.js("document.querySelectorAll('#list tr[aria-current=true]').length") == 0
    browser.js("document.dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape' }))")
    assert browser.troubles == []


def test_dark_and_light(browser: Browser, page: Path) -> None:
    """The system's choice, then the button's, on the page and in the figures."""
    browser.open(page)
    ink = "getComputedStyle(document.querySelector('.plot svg path[style*=currentColor]')).stroke"
    look = f"[getComputedStyle(document.body).backgroundColor, {ink}]"
    light = browser.js(look)
    browser.prefer("dark")
    browser.until(lambda: browser.js(look)[1] != light[1], "figures did not follow the system")
    dark = browser.js(look)
    assert light[0] == "rgb(255, 255, 255)" and dark[0] == "rgb(20, 23, 26)"
    browser.js("theme.click()")
    browser.until(lambda: browser.js(look) == light, "the button did not bring the light back")
    assert browser.js("theme.getAttribute('aria-pressed')") == "false" and browser.troubles == []


def test_on_a_phone(browser: Browser, page: Path) -> None:
    """Nothing is wider than the screen but what scrolls in a box of its own; a card opens over the list."""
    browser.open(page, 390, 844)
    browser.js("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    assert browser.js("document.documentElement.scrollWidth <= innerWidth && innerWidth === 390")
    right = "getBoundingClientRect().right"
    right = "getBoundingClientRect().right"
    cut = (
        "[...document.querySelectorAll('.plot:not([hidden]) svg')].flatMap(svg => [...svg.querySelectorAll('text')]"
        f".filter(text => text.{right} > svg.{right} + 1)).map(text => text.textContent)"
    )
    assert browser.js(cut) == [], "labels that are cut off"
    assert browser.js("getComputedStyle(card).display") == "none"
    browser.js("document.querySelector('#list tbody tr').click()")
    assert browser.js("card.getBoundingClientRect().bottom <= innerHeight && document.activeElement === card")
    small = "[...document.querySelectorAll('#list tbody button, .pager button, .near button, #theme, .bar nav a')]"
    assert browser.js(f"Math.min(...{small}.map(target => target.getBoundingClientRect().height))") >= 40
    browser.js("card.querySelector('.close').click()")
    assert browser.js("getComputedStyle(card).display") == "none" and browser.troubles == []


def test_ten_thousand_atoms(browser: Browser, tiny: str, work: Path) -> None:
    """Usable at once, and a page of rows in the document, however many atoms there are."""
    one = {"steps": 2, "batch_size": 16, "device": "cpu", "nulls": False}
    many = recipe(tiny, "many", hooks=[HOOK], atoms={"capacity": 10_000, "target_l0": 40.0}, training=one)
    file = write_page([train(many)], work / "many.html")
    browser.open(file)
    # Time is the machine's; what makes it short is a page of rows in the document, and half a kilobyte per atom.
    assert 0 < browser.js("Number(document.documentElement.dataset.ready)") < 60_000
    assert browser.js("count.textContent") == "10,000 atoms" and len(browser.listed()) == 25
    nodes = browser.js("document.getElementById('browser').querySelectorAll('*').length")
    browser.js("next.click()")
    assert len(browser.listed()) == 25 and nodes < 1000
    assert browser.search("9876") == [9876]
    assert browser.js("document.querySelectorAll('*').length") < 5000 and browser.troubles == []
    data = browser.js("new Blob([document.getElementById('atoms-0').textContent]).size")
    assert data / 10_000 < 1000 and file.stat().st_size < data + 200_000


def test_columns_against_brute_force(run: Path, work: Path) -> None:
    atoms, seen = load_atoms(run, hook=HOOK), corpus(load_recipe(run / "recipe.yaml"), HOOK)
    heldout = observe(atoms, seen.x.select(seen.heldout), atoms.aip)
    found = browse(atoms, seen, heldout, None)
    codes = atoms.encode(seen.x[:]).detach().numpy()
    held = seen.heldout.numpy()
    assert found["train"] == (codes[~held] != 0).sum(0).tolist()
    assert found["heldout"] == (codes[held] != 0).sum(0).tolist()
    bars = np.array(found["bars"]).reshape(-1, 16)
    assert bars.sum(1).tolist() == (codes != 0).sum(0).tolist()
    for i in range(codes.shape[1]):
        values = codes[codes[:, i] != 0, i]
        if not len(values):
            assert found["mean"][i] is None
            continue
        assert found["mean"][i] == pytest.approx(values.mean(), rel=1e-3)
        assert bars[i].tolist() == np.histogram(values, 16, (0, values.max()))[0].tolist()
    report = json.loads((run / HOOK / "report.json").read_text())
    margin = window_margin(atoms, heldout)
    assert int(margin.isnan().sum()) == report["heldout"]["dead_atoms"]
    assert float((margin[~margin.isnan()] > 0).double().mean()) == report["certificates"]["window"]["inside"]
    near, coherence = neighbours(atoms.W_dec.detach(), atoms.aip)
    cosine = atoms.aip.cosine(atoms.W_dec.detach(), atoms.W_dec.detach()).abs().fill_diagonal_(-1)
    assert torch.allclose(coherence, cosine.topk(5).values, atol=1e-6) and not (near == torch.arange(40)[:, None]).any()


def test_silent_atoms(run: Path, work: Path) -> None:
    """Atoms that never fire have no figures, and the page says so with dashes, not numbers."""
    atoms, seen = load_atoms(run, hook=HOOK), corpus(load_recipe(run / "recipe.yaml"), HOOK)
    atoms.threshold.data.fill_(1e9)
    heldout = observe(atoms, seen.x.select(seen.heldout), atoms.aip)
    found = browse(atoms, seen, heldout, None)
    assert set(found["mean"]) == set(found["margin"]) == {None} and found["at"] == [0] * 41 and found["rows"] == {}


def test_identity_of_what_is_dead_on_train(run: Path, work: Path) -> None:
    """Nobody was matched to it: no figure, not the least."""
    atoms, seen = load_atoms(run, hook=HOOK), corpus(load_recipe(run / "recipe.yaml"), HOOK)
    atoms.threshold.data[:5] = 1e9
    heldout = observe(atoms, seen.x.select(seen.heldout), atoms.aip)
    scores = torch.linspace(0.5, 0.9, 40)
    scores[:5] = 0
    found = browse(atoms, seen, heldout, scores)
    dead = [count == 0 for count in found["train"]]
    assert all(dead[:5]) and not all(dead)
    assert [value is None for value in found["identity"]] == dead
    assert [value for value in found["identity"] if value is not None] == pytest.approx(
        [float(score) for score, none in zip(scores, dead, strict=True) if not none], rel=1e-3
    )


def test_lens_is_the_models_own(tiny: str, tmp_path: Path) -> None:
    """Against transformers alone: the direction through the final norm, RMSNorm or LayerNorm, and the unembedding."""
    directions = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    shutil.copytree(tiny, tmp_path / "gpt2")
    (tmp_path / "gpt2" / "model.safetensors").unlink()
    vocabulary = AutoModelForCausalLM.from_pretrained(tiny).config.vocab_size
    config = GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    torch.manual_seed(1)
    other = GPT2LMHeadModel(config)
    other.transformer.ln_f.weight.data.uniform_(0.2, 2)
    other.transformer.ln_f.bias.data.normal_(std=5)  # stands in every logit, whatever the atom
    other.save_pretrained(tmp_path / "gpt2")
    for folder in (tiny, str(tmp_path / "gpt2")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        norm = model.model.norm if hasattr(model, "model") else model.transformer.ln_f
        with torch.no_grad():
            logits = (norm(directions) - norm(-directions)) @ model.get_output_embeddings().weight.T
        lens = open_lens(Model(name=folder, device="cpu"))
        up, down = lens.top(directions)
        assert torch.equal(up, logits.topk(8).indices) and torch.equal(down, (-logits).topk(8).indices)
        words = columns(lens, directions)
        assert words["table"][words["up"][8]] == lens.tokenizer.decode([int(up[1, 0])])
    assert is_residual("blocks.3.hook_mlp_out") and not is_residual("blocks.3.attn.hook_z")


def test_what_is_missing_is_said(run: Path, work: Path, tmp_path: Path) -> None:
    """Without its prompts a run still has figures and nulls, and one sentence on the rest."""
    copy = tmp_path / "moved"
    shutil.copytree(run, copy)
    text = (copy / "recipe.yaml").read_text().replace("prompts.jsonl", "gone.jsonl")
    (copy / "recipe.yaml").write_text(text)
    file = write_page([copy])
    assert file == tmp_path / "report.html"
    html = file.read_text(encoding="utf-8")
    assert "atoms are left out, file &#39;gone.jsonl&#39; does not exist." in html and 'id="browser"' not in html
    held = json.loads((run / HOOK / "report.json").read_text())["heldout"]
    low, high = held["interval"]["r2"]
    assert f'<td class="held">{held["r2"]:.4f}<small>{low:.3f} to {high:.3f}</small></td>' in html


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: lines[:100], r"its report has \d+ training and \d+ held-out activations, here are"),
        (
            lambda lines: [line.replace("{} is a", "the {} is a") for line in lines],
            r"its report has held-out R² [-.\d]+,",
        ),
    ],
)
def test_prompts_that_were_edited_are_noticed(
    run: Path, work: Path, tmp_path: Path, edit: Callable[[list[str]], list[str]], message: str
) -> None:
    """Another split would put wrong badges on contexts; the run's own figures stay."""
    copy = tmp_path / "moved"
    shutil.copytree(run, copy)
    prompts = tmp_path / "edited.jsonl"
    prompts.write_text("\n".join(edit((work / "prompts.jsonl").read_text().splitlines())))
    (copy / "recipe.yaml").write_text((copy / "recipe.yaml").read_text().replace("prompts.jsonl", str(prompts)))
    found = list(open_browsers(copy, "moved", RunReport.read(copy / "report.json")))
    assert all(isinstance(one, str) and one.startswith("moved · blocks.") for one in found)
    said = " ".join(map(str, found))
    assert re.search(f"left out, the prompts or the model are not those of the run: {message}", said), said
    assert all(said.count(f"blocks.{layer}.hook_resid_post") == 1 for layer in range(3))
    html = write_page([copy]).read_text(encoding="utf-8")
    assert "are not those of the run" in html and 'id="browser"' not in html and "Results and nulls" in html


def test_one_hook_that_fails_leaves_the_others(run: Path, work: Path, tmp_path: Path) -> None:
    copy = tmp_path / "part"
    shutil.copytree(run, copy)
    (copy / "blocks.0.hook_resid_post" / "sae_weights.safetensors").unlink()
    first, second, said = open_browsers(copy, "part", RunReport.read(copy / "report.json"))
    assert not isinstance(first, str) and first.label == f"part · {HOOK}"
    assert not isinstance(second, str) and second.label == "part · blocks.2.hook_resid_post"
    assert isinstance(said, str) and said.startswith("part · blocks.0.hook_resid_post: atoms are left out")


def test_words_that_fail_leave_the_rest(
    tiny: str, run: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong in the logit lens; and no model is loaded for hooks that have no words."""

    def broken(_: Model) -> None:
        raise RuntimeError("no unembedding\nhere")

    monkeypatch.setattr("atom_lens.studies.report.browsers.open_lens", broken)
    for opened in open_browsers(run, "run", RunReport.read(run / "report.json")):
        assert isinstance(opened, AtomsBrowser)
        assert opened.atoms["words"] == "Logit-lens words are left out: no unembedding here."
    once = {"steps": 2, "batch_size": 16, "device": "cpu", "nulls": False}
    heads = train(recipe(tiny, "heads", hooks=["blocks.1.attn.hook_z"], training=once), out=tmp_path)
    (opened,) = open_browsers(heads, "heads", RunReport.read(heads / "report.json"))
    assert not isinstance(opened, str) and "is not in the residual stream" in opened.atoms["words"]


def units(*cells: tuple[str, float | None]) -> list[Measured]:
    return [Measured(kind(unit), kind(unit).asked(level), [{}]) for unit, level in cells]


def test_curves_over_layers_stand_beside_each_other() -> None:
    """What no sparsity is asked of is in every plot; an L1 weight of 3 is not a K of 3."""
    each = [("null_data", 3), ("neurons", None), ("topk", 3), ("topk", 6), ("relu_whitened", 3)]
    hooks = {f"blocks.{layer}.hook_resid_post": units(*each) for layer in range(3)}
    hooks["blocks.1.hook_resid_post"] = units(*each, ("mine", None), ("principal", 6))
    found = over_layers(hooks)
    names = {title: [[one.kind.label for one in here[layer]] for layer in here] for title, here in found.items()}
    at = "hook_resid_post"
    assert set(names) == {f"{at}, asked 3", f"{at}, asked 6", f"{at}, L1 3"}
    assert names[f"{at}, asked 3"][0] == ["null: data points", "TopK", "neurons"]
    assert names[f"{at}, asked 3"][1] == ["null: data points", "TopK", "neurons", "mine"]
    assert names[f"{at}, asked 6"][1] == ["TopK", "principal directions", "neurons", "mine"]
    assert names[f"{at}, L1 3"][2] == ["ReLU, whitened", "neurons"]
    assert list(over_layers({hook: units(("neurons", None)) for hook in hooks})) == [at]
    assert over_layers({"blocks.1.hook_resid_post": units(*each)}) == {}


def test_two_comparisons_are_not_one_cloud(page: Path, work: Path, tmp_path: Path) -> None:
    """Of the same hooks, say at n / F of 40 and of 1: a plot each, by the folder's name."""
    shutil.copytree(work / "runs" / "comparison", tmp_path / "memorised")
    sections = sections_of(read_folders([work / "runs" / "comparison", tmp_path / "memorised"]))
    (plane,) = (section for section in sections if section.id == "dictionaries-and-nulls")
    both = [f"{name}, blocks.{i}.hook_resid_post of " for name in ("comparison", "memorised") for i in (0, 1)]
    assert [choice.partition(" of ")[0] + " of " for choice in plane.choices] == both


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("report.json", '{"schema_version": 2}', "key n, field required"),
        ("report.json", '{"hooks": []}', "key hooks is [], allowed is a report for each hook"),
        ("report.json", '{"hooks": {}}', "key hooks is {}, allowed is a report for each hook"),
        ("report.json", '{"hooks": {"a": 1}}', "it has 1 where a mapping is needed"),
        ("scale.json", '{"schema_version": 1, "model": "m", "versions": {}}', "key hooks, field required"),
        (
            "scale.json",
            '{"schema_version": 1, "model": "m", "versions": {}, "hooks": {}}',
            "key hooks, dictionary should",
        ),
        ("compare.json", '{"schema_version": 1, "hooks": {}, "versions": {}}', "key model, field required"),
        (
            "intervene.json",
            '{"schema_version": 2, "name": "n", "n": 1, "scan": {}, "model": "m", "versions": {}, "hook": "h",'
            ' "n_facts": 1, "n_answers": 1,'
            ' "class_means": {}, "cells": []}',
            "key class_means.flips, field required",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "recipe.yaml").write_text("name: bad")
    (tmp_path / "bad" / name).write_text(text)
    with pytest.raises(ValueError) as caught:
        write_page([tmp_path / "bad"])
    assert str(caught.value).startswith(f"'{tmp_path}/bad/{name}' is damaged: ") and message in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_bad_folders(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="other' is no folder that a page can be made of, allowed are"):
        write_page([tmp_path / "other"])
    with pytest.raises(ValueError, match="runs is empty, a page needs at least one folder"):
        write_page([])
    (tmp_path / "other" / "scale.json").write_text("{")
    with pytest.raises(ValueError, match="is not strict JSON"):
        write_page([tmp_path / "other"])
    (tmp_path / "other" / "scale.json").write_text('{"schema_version": 7}')
    with pytest.raises(ValueError, match="scale.json' has schema_version 7, this version of atom-lens reads 1"):
        write_page([tmp_path / "other"])
    assert not (tmp_path / "report.html").exists()
