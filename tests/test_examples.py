"""Each file of examples/ runs, in less than a minute, as a reader would run it."""

import os
import sys
from pathlib import Path

import pytest
from shown_programs import run_program

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
pytestmark = pytest.mark.published


@pytest.mark.timeout(150)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    if "transformers" in path.read_text():
        pytest.importorskip("transformers")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # Twice the minute that it may take: the machine does something else besides.
    done = run_program(
        [sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, timeout=120
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    assert done.stdout.strip(), "an example says what it found"
    assert list(tmp_path.iterdir()) == [], "an example leaves nothing behind"
