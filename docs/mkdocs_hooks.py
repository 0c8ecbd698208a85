"""What the site adds to mkdocs: pages from the repository's root, and links that leave docs/."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
ROOT_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"(\]\()([^)\s#:]+)")


def on_files(files, config):
    """Add the pages of ROOT_PAGES."""
    for name in ROOT_PAGES:
        files.append(_file(name, config))
    return files


def on_page_markdown(markdown, page, config, files):
    """Make links that are right in the repository right on the site.

    Pictures beside docs/ are copied; all else there is linked to in the repository. A link to
    nothing stays as it is: mkdocs warns of it.
    """
    folder = Path(page.file.abs_src_path).parent

    def moved(match):
        path = Path(os.path.normpath(folder / match[2]))
        if not path.exists() or not path.is_relative_to(ROOT):
            return match[0]
        name = path.relative_to(ROOT).as_posix()
        if name.startswith("docs/") or name in ROOT_PAGES:
            name = name.removeprefix("docs/")
        elif path.suffix in (".png", ".svg"):
            if files.get_file_from_path(name) is None:
                files.append(_file(name, config))
        else:
            kind = "tree" if path.is_dir() else "blob"
            return f"{match[1]}{config.repo_url}/{kind}/main/{name}"
        return match[1] + os.path.relpath(name, Path(page.file.src_uri).parent)

    return LINK.sub(moved, markdown)


def _file(name, config):
    return File(name, str(ROOT), config.site_dir, config.use_directory_urls)
