"""What is written holds together: cited sections of docs/spec.md exist, links lead to files and headings, commands to
scripts and settings; and nothing but `models/backbones.py` names a family of language models, so that a further one is
one record there."""

import re
import shlex
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name

import pytest

from common.settings import settings_of

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


# ---- commands in pages ----

COMMAND = re.compile(r"^(?:python3|accelerate launch [^\n]*?|bash) ?((?:\w+/)*\w+\.(?:py|sh)) *([^\n]*)$", re.MULTILINE)
SCHEMAS = {  # of the scripts that read a YAML file; tools declare one each
    "app.py": "common.schema:AppConfig",
    "inference_t2i.py": "common.schema:InferenceConfig",
    "inference_mmu.py": "common.schema:InferenceConfig",
    "inference_mixed.py": "common.schema:MixedInferenceConfig",
    "evaluate.py": "evaluation.schema:EvaluationConfig",
    "training/train.py": "common.schema:TrainingConfig",
    "training/train_w_clip_vit.py": "common.schema:TrainingConfig",
    "training/train_magvitv2.py": "training.tokenizer_settings:TokenizerTrainingConfig",
}


def schema_of(script: str) -> type | None:
    """The settings of a script; None if it has none of our kind, as the benchmarks."""
    if script in SCHEMAS:
        return resolve_name(SCHEMAS[script])
    module = import_module(script.removesuffix(".py").replace("/", "."))
    found = [value for name, value in vars(module).items() if name.endswith("Config") and is_dataclass(value)]
    return next((schema for schema in found if schema.__module__ == module.__name__), None)


def commands() -> list[tuple[str, str, list[str]]]:
    """(page, script, arguments) of every command in a fenced block that is whole."""
    found = []
    for page in PAGES:
        for block in FENCE.findall(page.read_text()):
            for script, rest in COMMAND.findall(block.replace("\\\n", " ")):
                if "…" not in rest.partition("config=")[0]:
                    found.append((str(page.relative_to(ROOT)), script, shlex.split(rest, comments=True)))
    return found


@pytest.mark.parametrize(("page", "script", "arguments"), commands(), ids=lambda value: str(value)[:40])
def test_every_command_has_a_script_its_files_and_known_keys(page, script, arguments):
    assert (ROOT / script).is_file()
    has_settings = script.endswith(".py") and not script.startswith(("benchmarks/", "evaluation/"))
    schema = schema_of(script) if has_settings else None
    known = settings_of(schema) if schema else {}
    for key, _, value in (argument.partition("=") for argument in arguments if "=" in argument):
        if key == "config" and value.startswith("configs/"):
            assert (ROOT / value).is_file(), f"{page}: {value}"
        elif known and key != "config":
            assert key in known or key.rpartition(".")[0] in known, f"{page}: {script} has no key {key}"


def test_what_published_names_have_become_is_there():
    """In the tables of docs/migrating.md: the files of the last column, and the names after a file."""
    rows = [line for line in (ROOT / "docs/migrating.md").read_text().splitlines() if line.startswith("| ")]
    cells = [row.replace("\\|", "/").split(" | ")[-1] for row in rows]
    files = [file for cell in cells for file in re.findall(r"`((?:\w+/)+\w+\.py)`", cell)]
    assert len(files) > 20 and [file for file in files if not (ROOT / file).is_file()] == []
    named = [found for cell in cells for found in re.findall(r"`((?:\w+/)+\w+)\.py`: ((?:`\w+`[^;`]*)+)", cell)]
    for file, names in named:
        module = import_module(file.replace("/", "."))
        assert [name for name in re.findall(r"`(\w+)`", names.partition("(")[0]) if not hasattr(module, name)] == [], (
            file
        )


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/inference.md"])
def test_the_python_of_a_page_runs_as_it_is_written(page, tmp_path, monkeypatch):
    """On the shipped checkpoint, from another folder."""
    monkeypatch.chdir(tmp_path)
    exec("\n".join(re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)), {})
    assert (tmp_path / "sunflower.png").is_file()
