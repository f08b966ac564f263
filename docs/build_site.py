"""Hooks of `mkdocs.yml`: the site has the files of the repository, at the same places."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "docs/**/*.md", "*/README.md", "tests/goldens/README.md")
LINK = re.compile(r"\]\(([^)#:\s]+)[^)]*\)")
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([\w.]+)`")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files under `docs` by all pages of the repository and what they link to."""
    names = {path.relative_to(ROOT).as_posix() for glob in PAGES for path in ROOT.glob(glob)}
    for name in list(names):
        page = ROOT / name
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            target = (page.parent / link).resolve()
            if target.is_file() and target.is_relative_to(ROOT):
                names.add(target.relative_to(ROOT).as_posix())
    ours = [
        File(name, str(ROOT), config.site_dir, config.use_directory_urls) for name in sorted(names)
    ]
    of_theme = [file for file in files if file.src_dir != config.docs_dir]
    return Files([*of_theme, *ours])


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let a list begin right after a paragraph, as on GitHub."""
    return re.sub(r"^(?![-|>#]|\s)(.+)\n(?=- )", r"\1\n\n", markdown, flags=re.MULTILINE)


class SourceReading(griffe.Extension):
    """What griffe does not read of our source by itself."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Turn Sphinx roles, such as ``:func:`load```, into cross-references."""
        if obj.docstring:
            text = re.sub(r"(?m)^::\n|(?<=:):$", "", obj.docstring.value)  # before literal blocks
            obj.docstring.value = ROLE.sub(_reference, text)

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Show the parameters that methods take from another by ``_with_arguments_of``."""
        for method in cls.functions.values():
            for one in method.decorators:
                if like := re.match(r"_with_arguments_of\((\w+)\)", str(one.value)):
                    method.parameters = cls.functions[like[1]].parameters

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Show the default of an option instead of its whole declaration."""
        if isinstance(attr.value, griffe.ExprCall) and str(attr.value.function) == "_option":
            attr.value = attr.value.arguments[1]


def _reference(match: re.Match[str]) -> str:
    path = match[1]
    return f"[`{path.rpartition('.')[2]}`][{path}]"
