"""The site has a page for all that is public; `make docs` checks that its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import rootfree_fused

API = Path(__file__).parents[2] / "docs" / "api"


def test_every_public_name_has_its_page():
    pages = "\n".join(path.read_text() for path in API.glob("*.md"))
    documented = re.findall(r"^::: rootfree_fused\.(\w+)$", pages, flags=re.MULTILINE)
    assert set(rootfree_fused.__all__) <= set(documented)
