"""Private names of PyTorch stand in one file, and each may go without harm."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spattn_tvm import torch_private

ROOT = Path(__file__).resolve().parents[1]
# The modules that PyTorch documents, although their names start with an underscore.
DOCUMENTED = {"torch.utils._python_dispatch", "torch.utils._pytree"}


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of an attribute chain; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def private_names(source: str) -> set[str]:
    """Names of PyTorch's with a leading underscore in them, however they were imported."""
    tree = ast.parse(source)
    from_torch = {"torch": "torch"}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch":
            for name in node.names:
                from_torch[name.asname or name.name] = f"{node.module}.{name.name}"
                found.add(f"{node.module}.{name.name}")
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "torch":
                    from_torch[name.asname or "torch"] = name.name if name.asname else "torch"
                    found.add(name.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = dotted(node).partition(".")
            if first in from_torch:
                found.add(f"{from_torch[first]}.{rest}")
            elif node.attr in ("to_save", "materialize_grads", "_is_zerotensor"):
                found.add(node.attr)
    documented = tuple(DOCUMENTED)
    return {
        name
        for name in found
        if (not name.startswith("torch") or any(part.startswith("_") for part in name.split(".")))
        and not name.startswith(documented)
        and "__" not in name
    }


def test_private_names_are_recognised() -> None:
    assert private_names("import torch\ntorch._C.x()") == {"torch._C", "torch._C.x"}
    assert private_names("from torch.autograd import forward_ad as f\nf._level") == {
        "torch.autograd.forward_ad._level"
    }
    assert private_names("import torch._functorch.config as c") == {"torch._functorch.config"}
    assert private_names("ctx.to_save = 1") == {"to_save"}
    assert not private_names("import torch\ntorch.__version__, self._x, torch.nn.Parameter")


@pytest.mark.parametrize(
    "path",
    sorted({*ROOT.glob("spattn_tvm/**/*.py"), *ROOT.glob("scripts/*.py")}),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_private_names_stand_in_one_file(path: Path) -> None:
    if path.name != "torch_private.py":
        assert not private_names(path.read_text())


# A name is hidden while torch_private looks names up: taken away for good, PyTorch itself would miss it.
WITHOUT_A_NAME = """
import os
import sys
import torch

class Hiding:
    def __init__(self, thing, path):
        self.__dict__.update(thing=thing, path=path)

    def __getattr__(self, name):
        first, _, rest = self.path.partition(".")
        value = getattr(self.thing, name)
        if name != first:
            return value
        if rest:
            return Hiding(value, rest)
        raise AttributeError(name)

def check(path):
    sys.modules["torch"] = Hiding(torch, path)
    import spattn_tvm.torch_private
    sys.modules["torch"] = torch
    from spattn_tvm import BandLayout, banded_attention, reference_attention
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        seen = ""
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += str(func)
            return func(*args, **(kwargs or {}))

    layout = BandLayout.spattention(4)
    leaves = [torch.randn(2, heads, 37, 32, requires_grad=True) for heads in (4, 2, 2)]
    expected_o, expected_lse = reference_attention(*leaves, layout)
    do = torch.randn_like(expected_o)
    expected = torch.autograd.grad(expected_o, leaves, do)

    def compare(o, gradients):
        torch.testing.assert_close(o, expected_o, rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)

    for _ in range(3):
        o = banded_attention(*leaves, layout)
        compare(o, torch.autograd.grad(o, leaves, do, retain_graph=True))
        o, lse = banded_attention(*leaves, layout, return_lse=True)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            compare(banded_attention(*leaves, layout), torch.autograd.grad(o, leaves, do))
        with Recorder() as recorder:
            o = banded_attention(*leaves, layout)
            compare(o, torch.autograd.grad(o, leaves, do))
        assert "attention_forward" in recorder.seen and "attention_backward" in recorder.seen
        with torch.autocast("cpu", torch.bfloat16):
            assert banded_attention(*leaves, layout).dtype is torch.bfloat16
        with torch.profiler.profile() as profile:
            banded_attention(*leaves, layout)
        assert any("banded_attention_forward" in event.name for event in profile.events())
        negated = [torch._neg_view(-leaf.detach()) for leaf in leaves]
        torch.testing.assert_close(banded_attention(*negated, layout), expected_o, rtol=1e-4, atol=1e-4)

failed = []
for path in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            check(path)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        failed.append(path)
sys.exit(f"without these: {failed}" if failed else 0)
"""


def test_each_private_name_may_be_missing() -> None:
    names = torch_private.PRIVATE_NAMES
    assert len(names) == len(set(names)) >= 15
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_NAME, *names],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=280,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
