"""The page in a real browser: whole, quick, without a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.browser import Browser
from support.paging import EVIL, page_recipe, top
from support.talking import study

from atom_lens import load_atoms, train
from atom_lens.evidence.codes import codes_of
from atom_lens.evidence.measure import observe
from atom_lens.recipe.contexts import corpus
from atom_lens.recipe.reading import load_recipe
from atom_lens.studies.compare.run import compare
from atom_lens.studies.intervene.run import intervene
from atom_lens.studies.report.atoms import window_margin
from atom_lens.studies.report.run import read_folders, sections_of, write_page
from atom_lens.studies.scale.run import scale

HOOK = "blocks.1.hook_resid_post"
pytestmark = pytest.mark.slow  # a run and studies of every kind, and a browser


@pytest.fixture(scope="module")
def page(tiny: str, paged_run: Path, paged: Path, request: pytest.FixtureRequest) -> Path:
    """One page about a run and a study of every kind."""
    units = {"kinds": ["neurons", "topk", "tsae_free"], "l0": [2.0, 4.0], "matched": [3.0]}
    two = ["blocks.0.hook_resid_post", HOOK]
    studies = [compare(page_recipe(tiny, "comparison", hooks=two, compare=units))]
    grid = {"n": [24, 48, 96], "capacities": [8, 16, 32], "levels": [0.3]}
    once = {"steps": 10, "batch_size": 16, "device": "cpu"}
    studies.append(scale(page_recipe(tiny, "grid", hooks=[HOOK], scale=grid, training=once)))
    studies.append(intervene(load_recipe(study(request.getfixturevalue("talking"), paged))))
    return write_page([paged_run, *studies], paged / "all.html")


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


def test_hostile_text_stays_text(browser: Browser, paged_run: Path, page: Path) -> None:
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


def test_search_sort_and_detail(browser: Browser, tiny: str, paged_run: Path, page: Path) -> None:
    """The list against the atoms themselves: who fires where, in which order, and what a card says."""
    hook = "blocks.0.hook_resid_post"
    atoms, seen = load_atoms(paged_run, hook=hook), corpus(load_recipe(paged_run / "recipe.yaml"), hook)
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
    margins = window_margin(atoms, atoms.aip, observe(atoms, seen.x.select(seen.heldout), atoms.aip)).nan_to_num(
        -torch.inf
    )
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


def test_ten_thousand_atoms(browser: Browser, tiny: str, paged: Path) -> None:
    """Usable at once, and a page of rows in the document, however many atoms there are."""
    one = {"steps": 2, "batch_size": 16, "device": "cpu", "nulls": False}
    many = page_recipe(tiny, "many", hooks=[HOOK], atoms={"capacity": 10_000, "target_l0": 40.0}, training=one)
    file = write_page([train(many)], paged / "many.html")
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


def test_two_comparisons_are_not_one_cloud(page: Path, paged: Path, tmp_path: Path) -> None:
    """Of the same hooks, say at n / F of 40 and of 1: a plot each, by the folder's name."""
    shutil.copytree(paged / "runs" / "comparison", tmp_path / "memorised")
    sections = sections_of(read_folders([paged / "runs" / "comparison", tmp_path / "memorised"]))
    (plane,) = (section for section in sections if section.id == "dictionaries-and-nulls")
    both = [f"{name}, blocks.{i}.hook_resid_post of " for name in ("comparison", "memorised") for i in (0, 1)]
    assert [choice.partition(" of ")[0] + " of " for choice in plane.choices] == both
