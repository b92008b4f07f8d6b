"""Runs the Python blocks of the README and of the documentation.

The blocks of one file run in order in one namespace, as a reader would type them.
A block under the comment ``<!-- not run -->`` is left out.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [path for path in (README, *sorted(ROOT.glob("docs/**/*.md"))) if path.exists()]

FENCE = re.compile(
    r"""
    (?P<skip> ^<!--\ not\ run\ -->\n+ )?
    ^(?P<ticks> `{3,}|~{3,} ) (?P<language> [^\n]* ) \n
    (?P<code> .*? )
    ^(?P=ticks) [ ]* $
    """,
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)


def blocks(text: str) -> list[tuple[int, str]]:
    """The line on which each block to run starts, and its code."""
    return [
        (text.count("\n", 0, match.start("code")), match["code"])
        for match in FENCE.finditer(text)
        if match["language"].strip() == "python" and not match["skip"]
    ]


def test_blocks_are_found_and_left_out():
    text = (
        "Text\n```python\na = 1\n```\n\n<!-- not run -->\n\n```python\nb\n```\n"
        "```sh\nmake\n```\n````\n```python\nshown\n```\n````\n```python\nc = a\nd = c\n```\n"
    )
    assert blocks(text) == [(2, "a = 1\n"), (19, "c = a\nd = c\n")]


@pytest.mark.jax_defaults
@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = page.read_text()
    assert not re.search(r"^ +`{3,} *python", text, re.MULTILINE), "an indented block does not run"
    found = blocks(text)
    assert found or page != README, "the README has no Python block"
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, code in found:
        exec(compile("\n" * line + code, page, "exec"), namespace)


def test_only_the_spelling_that_runs_is_used():
    spellings = re.compile(r"^\W*(py|python3?|ipython3?|pycon)\b", re.IGNORECASE)
    for page in PAGES:
        for match in FENCE.finditer(page.read_text()):
            language = match["language"].strip()
            assert language == "python" or not spellings.match(language), (
                f"{page.name}: write ```python for {language!r}, or the block is not tested"
            )
