"""The documentation: links resolve, and every public name has a place in the reference."""

import re
from pathlib import Path

import pytest

import vpt
import vpt.branches

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for glob in ("*.md", "docs/**/*.md", "*/README.md", "tests/goldens/README.md")
    for path in ROOT.glob(glob)
)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")


def prose(page):
    """Text of a page without code."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)


def anchors(page):
    """Anchors that GitHub makes of the headings of a page."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def broken_links(page, text):
    for target, anchor in LINK.findall(text):
        file = (ROOT / page).parent / target if target else ROOT / page
        if not file.exists():
            yield target
        elif anchor and anchor not in anchors(file.relative_to(ROOT)):
            yield f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_and_anchors_resolve(page):
    assert list(broken_links(page, prose(page))) == []


@pytest.mark.parametrize("link", ["gone.md", "docs/demo.md#gone", "#gone"])
def test_broken_links_are_found(link):
    assert list(
        broken_links("README.md", f"[a]({link}) [b](docs/demo.md#limits) [c](#limits)")
    ) == [link]


def test_every_public_name_is_in_the_reference():
    pages = [(ROOT / "docs" / name).read_text("utf-8") for name in ("api.md", "api-parts.md")]
    listed = re.findall(r"^::: ([\w.]+)$", "\n".join(pages), flags=re.M)
    assert len(listed) == len(set(listed))
    for module in (vpt, vpt.branches):
        for name in module.__all__:
            home = getattr(module, name).__module__
            assert {home, f"{home}.{name}"} & set(listed), f"{home}.{name} is not in docs/api*.md"
