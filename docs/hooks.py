"""What the site takes from beside its pages: the repository's figures, and the list of the package's public names."""

import inspect
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import lora_analysis as la

FIGURES = ("similarity_ranks.png",)
PAGES = {
    "adapter": ("Adapters and updates", "adapter.md"),
    "update": ("Adapters and updates", "adapter.md"),
    "base": ("Bases", "base.md"),
    "formats": ("Reading and writing", "formats.md"),
    "tables": ("Tables", "tables.md"),
    "measures": ("Measures", "measures/index.md"),
    "convert": ("Acting on adapters", "actions.md"),
    "diff": ("Acting on adapters", "actions.md"),
    "lint": ("Acting on adapters", "actions.md"),
    "merge": ("Acting on adapters", "actions.md"),
    "resize": ("Acting on adapters", "actions.md"),
    "errors": ("Errors", "errors.md"),
}
"""Title and page of every part of the package that has names at its top; a name of another part is a KeyError."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Figures of the repository as if they lay among the pages."""
    figures = Path(config.config_file_path).parents[1] / "figures"
    for name in FIGURES:
        files.append(File.generated(config, f"figures/{name}", abs_src_path=str(figures / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The list of public names in the place of its mark."""
    return markdown.replace("<!-- public names -->", public_names())


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """No dash where a parameter shares the description of the next one."""
    return re.sub(r'\s*–\s*<div class="doc-md-description">\s*</div>', "", html)


def public_names() -> str:
    """Every name of ``la.__all__`` under the page that documents it, with the first line of its docstring."""
    groups: dict[tuple[str, str], list[str]] = {group: [] for group in PAGES.values()}
    for name in la.__all__:
        value = getattr(la, name)
        first = (inspect.getdoc(value) or "").splitlines()[0]
        link = f"[`{name}`][{value.__module__}.{value.__qualname__}]"
        groups[PAGES[value.__module__.split(".")[1]]].append(f'<a id="lora_analysis.{name}"></a>{link}\n:   {first}\n')
    return "\n".join(f"## [{title}]({page})\n\n" + "\n".join(rows) for (title, page), rows in groups.items())
