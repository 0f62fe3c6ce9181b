"""The documentation: builds without a warning, reads without a network, and leaves nothing out."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import atom_lens
from atom_lens.cli import commands
from atom_lens.evidence.results import Report

TOP = Path(__file__).resolve().parent.parent
PAGES = {
    page.relative_to(TOP / "docs").as_posix(): page.read_text(encoding="utf-8") for page in TOP.glob("docs/**/*.md")
}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Found(HTMLParser):
    """What a page has under a name, where it leads, and what it fetches."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if "src" in found:
            self.fetched.append(found["src"])
        if tag == "link" and found.get("rel", "") in ("stylesheet", "icon", "preconnect", "preload"):
            self.fetched.append(found["href"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    if find_spec("mkdocs") is None or find_spec("mkdocstrings") is None:
        pytest.skip("mkdocs is not installed: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site").resolve()
    # Not with -q: what is not logged is not counted, and --strict would pass whatever is wrong.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    built = subprocess.run(command, cwd=TOP, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def site(folder: Path) -> dict[Path, Found]:
    """Every page of it."""
    pages = {page: Found(page.read_text(encoding="utf-8")) for page in folder.glob("**/*.html")}
    assert len(pages) > len(PAGES)  # and the one for what is not found
    return pages


def test_nothing_is_fetched_from_elsewhere(folder: Path, site: dict[Path, Found]) -> None:
    for page, found in site.items():
        for address in found.fetched:
            assert not urlsplit(address).scheme and not address.startswith("//"), (page.name, address)
    styles = list(folder.glob("**/*.css"))
    assert len(styles) >= 3
    for style in styles:
        assert not re.search(r"url\(['\"]?https?:|@import", style.read_text(encoding="utf-8")), style.name


def test_links_lead_somewhere(site: dict[Path, Found]) -> None:
    """Every link and picture within the site, anchors included."""
    checked = 0
    for page, found in site.items():
        if page.name == "404.html":  # is made for a server's root
            continue
        for address in [*found.links, *found.fetched]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), (page.name, address)
            if parts.fragment and target in site:
                assert unquote(parts.fragment) in site[target].anchors, (page.name, address)
            checked += 1
    assert checked > 500


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_search_works_in_a_folder(folder: Path, tmp_path: Path) -> None:
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    address = f"{(folder / 'api' / 'geometry.html').as_uri()}?q=oas_ridge"
    shown = subprocess.run(
        [*command, "--virtual-time-budget=10000", "--dump-dom", address], capture_output=True, text=True, timeout=60
    ).stdout
    results = re.findall(r'<a href="([^"]*)" class="md-search-result__link', shown)
    assert any("geometry.html" in urlsplit(result).path for result in results), results


def test_every_public_name_is_in_the_reference(site: dict[Path, Found]) -> None:
    page = next(page for page in site if page.parts[-2:] == ("api", "atom_lens.html"))
    for name in atom_lens.__all__:
        if not name.startswith("__"):
            one = getattr(atom_lens, name)
            assert f"{one.__module__}.{name}" in site[page].anchors, name


@pytest.mark.parametrize("recipe", [path.name for path in sorted(TOP.glob("recipes/*.yaml"))])
def test_every_recipe_is_in_the_gallery(recipe: str) -> None:
    assert f"`{recipe}`" in PAGES["recipes.md"]


def test_every_command_is_explained() -> None:
    names = [name for name, _, _ in commands()]
    assert len(names) >= 11
    for command in names:
        assert any(f"atom-lens {command}" in text for text in PAGES.values()), command


def test_pages_keep_to_their_length() -> None:
    """A page that grows pushes another thing out."""
    readme = (TOP / "README.md").read_text(encoding="utf-8")
    assert len(readme.split()) <= 700
    written = {name: text for name, text in PAGES.items() if not name.startswith("api/")}
    assert len(written) <= 9
    assert sum(len(re.findall(r"\S*\w\S*", text)) for text in written.values()) <= 12_000


@pytest.mark.slow
@pytest.mark.demo
def test_the_lines_of_the_readme_run(demo: str, tmp_path: Path) -> None:
    """As they stand, in an empty folder, and what the README says of the atoms is what their report says."""
    readme = (TOP / "README.md").read_text(encoding="utf-8")
    [lines] = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    ended = subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    # What follows is drawn, and may have more lines.
    assert re.search(r"^Paris is", ended.stdout, flags=re.MULTILINE), ended.stdout
    report = Report.read(tmp_path / "runs" / "quickstart" / "blocks.9.hook_resid_post" / "report.json")
    kinds = (("pursuit in the AIP", report.heldout), ("TSAE, free", report.also["tsae_free"].heldout))
    for start, found in kinds:
        [said] = re.findall(rf"^{start} \(ours\) +([\d.]+) +([\d.]+) +([\d.]+) ", readme, flags=re.MULTILINE)
        assert found is not None
        assert [float(number) for number in said] == pytest.approx([found.r2, found.r2_aip, found.q_star], abs=0.02)


def test_pictures_are_small() -> None:
    """Git keeps every version of them."""
    for picture in TOP.glob("docs/img/*.png"):
        assert picture.stat().st_size < 250_000, picture.name
