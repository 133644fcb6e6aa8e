"""Every Python fence of the README and of the docs runs, top to bottom, as a reader would type it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def fences(page):
    return [(page.read_text()[: m.start()].count("\n") + 1, m[1]) for m in FENCE.finditer(page.read_text())]


@pytest.mark.parametrize("page", [p for p in PAGES if fences(p)], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for line, code in fences(page):
        exec(compile("\n" * line + code, str(page), "exec"), names)  # so that a traceback shows the line of the page


def test_every_link_between_pages_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_nothing_is_left_to_be_filled_in():
    pages = [*PAGES, *(ROOT / "examples").glob("*.py"), ROOT / "CHANGELOG.md"]
    assert not [page.name for page in pages if "PLACEHOLDER" in page.read_text()]


def test_a_newcomers_callback_in_the_readme_is_under_ten_lines():
    first = next(code for _, code in fences(ROOT / "README.md") if "(Callback)" in code)
    body = [
        line for line in first[first.index("class ") :].splitlines() if line.startswith((" ", "class")) and line.strip()
    ]
    assert len(body) < 10
