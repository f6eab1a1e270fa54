"""What README.md and docs/ show runs, where it says so; what they link to exists.

A page's blocks of ``python`` and ``sh`` run in their order, in one folder and one interpreter. A block whose
title begins with "needs" (a GPU, a network, a corpus) is not run, one that needs an extra where that is
installed, and other languages never (``text`` is output). Searches and checks are cut short by `SHORTER`: two
trials of a small problem where a page says ten minutes.
"""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from shown_programs import run_program

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
    if path.exists()
]
BLOCK = re.compile(r"^( *)```(\w*)([^\n]*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
SHORTER = [
    (r"--budget \S+", "--budget 2"),
    (r" --each\b", ""),
    (r"tune --shape \S+", "tune --shape 1,4,512,64"),
    (r"--problems \d+", "--problems 4"),
    (r"SPATTN_SWEEP=\d+", "SPATTN_SWEEP=2"),
]
# Folders that commands write to, so that they don't lead out of the test's own folder.
WRITTEN = ("autotune_logs", "results", "schedules")
# What a page's blocks run in. A traceback names the page and the line.
RUN = r"""
import json, subprocess, sys
page, blocks = sys.argv[1], json.loads(sys.stdin.read())
sys.argv = [page]
names = {"__name__": "__main__"}
for kind, line, code in blocks:
    print(f"--- {page}:{line}", flush=True)
    if kind == "python":
        exec(compile("\n" * line + code, page, "exec"), names)
    else:
        subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True)
"""


def blocks_of(path: Path) -> list[tuple[str, int, str, str]]:
    """(language, line, title, text) of each."""
    text = path.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        indent, kind, info, code = match.groups()
        title = re.search(r'title="([^"]*)"', info)
        code = re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
        line = text.count("\n", 0, match.start()) + 1
        found.append((kind, line, title[1] if title else "", code))
    return found


def is_installed(extra: str) -> bool:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    try:
        for text in project["optional-dependencies"][extra]:
            importlib.metadata.version(Requirement(text).name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def runs(kind: str, title: str) -> bool:
    extra = re.fullmatch(r"needs the extra (\w+)", title)
    lacks = title.startswith("needs ") if extra is None else not is_installed(extra[1])
    return kind in ("python", "sh") and not lacks


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder like a fresh checkout, whose environment is this one.

    scripts/quickstart runs, briefly; scripts/test and scripts/docs, which run this, do nothing.
    """
    folder = tmp_path / "checkout"
    scripts, binaries = folder / "scripts", tmp_path / "bin"
    scripts.mkdir(parents=True)
    binaries.mkdir()
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(binaries)
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("scripts", *WRITTEN):
            (folder / path.name).symlink_to(path)
    shutil.copytree(ROOT / "schedules", folder / "schedules")
    for path in (ROOT / "scripts").iterdir():
        if path.name not in ("environment.sh", "test", "docs", "__pycache__"):
            (scripts / path.name).symlink_to(path)
    environment = f'ROOT="{folder}"\nPYTHON="{binaries}/python"\nensure_environment() {{ :; }}\n'
    (scripts / "environment.sh").write_text(environment)
    for path, text in (
        (scripts / "test", "true"),
        (scripts / "docs", "true"),
        (binaries / "python", f'exec "{sys.executable}" "$@"'),
        (binaries / "spattn", f'exec "{sys.executable}" -m spattn_tvm "$@"'),
    ):
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    return folder


@pytest.mark.published
@pytest.mark.timeout(400)
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_blocks_run(page: Path, checkout: Path) -> None:
    blocks = []
    for kind, line, title, code in blocks_of(page):
        if runs(kind, title):
            for pattern, shorter in SHORTER:
                code = re.sub(pattern, shorter, code)
            blocks.append((kind, line, code))
    if not blocks:
        pytest.skip("the page shows nothing that runs")
    if any("transformers" in code for _, _, code in blocks):
        pytest.importorskip("transformers")
    environment = os.environ | {
        "PATH": f"{checkout / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
        "SPATTN_SCHEDULES": str(checkout.parent / "schedules"),
        "SPATTN_TUNE_BUDGET": "6s",
        "SPATTN_TRAIN_MINUTES": "0.1",
    }
    environment.pop("SPATTN_BUNDLE", None)
    done = run_program(
        [sys.executable, "-c", RUN, page.name],
        input=json.dumps(blocks),
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=380,
    )
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_blocks_say_what_they_are(page: Path) -> None:
    """No command hides in a block without a language; only what a machine lacks keeps one from running."""
    fences = len(re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.MULTILINE))
    found = blocks_of(page)
    assert fences == 2 * len(found)
    for kind, line, title, _ in found:
        assert kind in ("python", "sh", "text", "toml"), f"{page.name}:{line}: ```{kind}"
        if title.startswith("needs "):
            known = r"needs (a GPU|GPUs|a network|other machines|a corpus|the extra \w+$)"
            assert re.match(known, title), f"{page.name}:{line}: {title}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            path = target.partition("#")[0]
            assert not path or (page.parent / path).exists(), f"{page.name}: {target}"


def test_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150


def _messages() -> str:
    """Every text of the package, one a line, with … where a value stands."""
    found = []
    for path in sorted((ROOT / "spattn_tvm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_troubleshooting_quotes_real_messages() -> None:
    """Each heading that is a message is one: ``…`` stands for values, or for what it leaves out."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### `(.*)`$", text, re.MULTILINE)
    assert len(headings) >= 10
    messages = _messages()
    for heading in headings:
        pattern = "[^\n]*".join(re.escape(part.strip(" ")) for part in heading.split("…"))
        assert re.search(pattern, messages), f"no message of the package reads {heading!r}"


def test_pages_name_what_exists() -> None:
    """Each ``spattn_tvm.…`` in a page can be imported."""
    import importlib

    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in set(re.findall(r"(?:`|::: )(spattn_tvm(?:\.\w+)+)", text)):
            parts = name.split(".")
            for size in range(len(parts), 0, -1):
                try:
                    value = importlib.import_module(".".join(parts[:size]))
                    break
                except ModuleNotFoundError:
                    continue
            for part in parts[size:]:
                assert hasattr(value, part), f"{page.name}: {name}"
                value = getattr(value, part)
