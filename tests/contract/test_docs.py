"""What is written holds together: cited sections of docs/spec.md exist, links lead to files and headings, and nothing
but `models/backbones.py` names a family of language models, so that a further one is one record there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = ROOT / "docs" / "spec.md"
CITATION = re.compile(r"\bspec (§\d+(?:(?:, | and )§\d+)*)", re.IGNORECASE)  # "spec §7", "spec §2, §5 and §9"
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def written_files() -> list[Path]:
    """Code, settings and documents of the repository; not what its commands download and produce."""
    produced = ("outputs", "data", "wandb")
    tops = [top for top in ROOT.iterdir() if not top.name.startswith(".") and top.name not in produced]
    folders = [path for top in tops if top.is_dir() for path in top.rglob("*")]
    return [path for path in tops + folders if path.suffix in (".py", ".md", ".yaml") and path.is_file()]


FAMILY = re.compile(r"Phi|PHI|\bphi|[Ll]lama|LLAMA|[Mm]istral|[Qq]wen|[Ss]mol[Ll][Mm]")
ROOMS = ("models", "training", "llava", "common", "evaluation", "benchmarks")
MODULES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))] + sorted(ROOT.glob("*.py"))
MODULES.remove(ROOT / "models/backbones.py")
PAGES = sorted(path for path in written_files() if path.suffix == ".md")


def sections() -> list[int]:
    return [int(number) for number in re.findall(r"^## (\d+) ", SPEC.read_text(), re.MULTILINE)]


def anchors(page: Path) -> set[str]:
    """The anchors GitHub gives to a page's headings: lower case, punctuation dropped, spaces as hyphens."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_cited_section_exists():
    assert sections() == list(range(1, 17))
    cited = []
    for file in written_files():
        for match in CITATION.finditer(file.read_text()):
            cited += [(str(file.relative_to(ROOT)), int(number)) for number in re.findall(r"\d+", match[1])]
    assert len(cited) > 50  # the pattern still finds them
    assert [citation for citation in cited if citation[1] not in sections()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"\w+:", link):  # https:, mailto:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_family_is_named_elsewhere(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line.strip() for line in lines if FAMILY.search(line)] == []
