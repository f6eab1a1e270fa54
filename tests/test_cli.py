"""The spattn command, in this process and as a process of its own."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from spattn_tvm import cli, doctor
from spattn_tvm.bands import BandLayout
from spattn_tvm.problem import AttentionProblem
from spattn_tvm.target import detect_cpu

COMMANDS = ["tune", "distill", "verify", "explain", "export", "bench", "layout", "doctor"]
PLOTS = ["layout", "tuning", "bench"]


def invoke(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result.output


def spattn(*arguments: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "spattn_tvm", *arguments],
        env=os.environ | environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


@pytest.mark.parametrize(
    "command", [[], *([name] for name in COMMANDS), ["plot"], *(["plot", p] for p in PLOTS)]
)
def test_help_has_an_example(command: list[str]) -> None:
    text = invoke(*command, "--help")
    assert "Usage" in text
    assert not command or f"Example: spattn {' '.join(command)}" in text


def test_help_loads_neither_torch_nor_tvm() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from spattn_tvm import cli\n"
        "assert CliRunner().invoke(cli.app, ['tune', '--help']).exit_code == 0\n"
        "print([name for name in ('torch', 'tvm', 'numpy', 'xgboost') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "--shape", "1,16,4096"], "--shape is B,H,N,D such as 1,16,4096,64"),
        (["explain", "--shape", "1,6/4,64,32"], "query_heads must be a multiple of kv_heads, got 6 and 4"),
        (["explain", "--layout", "sparse"], "layout 'sparse:heads=16'"),
        (["explain", "--target", "toaster"], "unknown target 'toaster'"),
        (["bench", "--peers", "nobody"], "unknown peer 'nobody'; known: ours"),
        (["bench", "--steps", "sideways"], "unknown step 'sideways'"),
        (["bench", "--idle-ms", "1e20"], "--idle-ms"),
        (["distill", "--log-root", "/proc/nonexistent"], "run `spattn tune` first"),
        (["tune", "--target", "nvidia/h200", "--budget", "1"], "must run on its target"),
        (["tune", "--budget", "8h"], "--budget is a number of trials (64) or a time (8m, 90s), got '8h'"),
        (["tune", "--rpc", "tracker", "--key", "k"], "an RPC tracker's address is HOST:PORT"),
        (["plot", "tuning", "/proc/nonexistent"], "no measurements under /proc/nonexistent"),
        (["plot", "layout", "--context", "8", "--length", "9"], "a sequence of 9 is longer than"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = mistake(arguments, monkeypatch, capsys)
    assert code == 2
    assert message in line


def mistake(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[object, str]:
    """The exit code and the one line that a mistake ends in."""
    monkeypatch.setattr(sys, "argv", ["spattn", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert len(lines[0]) > len("error: ") + 5
    return stop.value.code, lines[0]


# Values that nobody can mean, by option. {file}, {folder} and {json} are there, {json} is not JSON.
BAD_VALUES = {
    "--shape": (
        "", "1,16,4096", "a,b,c,d", "1,16,64,64,3", "0,16,64,64", "1,0,64,64", "1,16,0,64", "1,16,64,0",
        "-1,16,64,64", "1,16/0,64,64", "1,/4,64,64", "1,16/,64,64", "1,6/4,64,32", "1.5,2,64,64",
        "1,2,99999999999999999999,64", "1,99999999999999999999,64,64", "1,2,64,640,2,64,64", "1;2;64;64",
    ),
    "--layout": (
        "", "nonsense", ":", "=", "sliding_window", "sliding_window:window=0", "sliding_window:window=-1",
        "sliding_window:window=x", "custom", "custom:bands=", "custom:bands=5-1/0-1", "custom:bands=0-1",
        "spattention:foo=1", "spattention:heads=3", "spattention:heads=2,context=10", "causal:window=3",
        "spattention:heads=2,of=4,take=0-9", "spattention:longer=1", "spattention:heads=2,heads=2",
    ),
    "--context": ("", "0", "-1", "x", "1.5", "63", "99999999999999"),
    "--dtype": ("", "float64", "FLOAT32", "x"),
    "--direction": ("", "sideways"),
    "--target": ("", "nonsense", "../x", "sm_10", "sm_", "nvidia/", "nvidia/nonsense", "x86-64-v9", "cpu x"),
    "--device": ("", "tpu", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cuda:99", "cpu:1", "meta", "cuda:0,1"),
    "--peers": ("", ",", "nobody", "ours,nobody"),
    "--steps": ("", ",", "sideways", "forward,sideways"),
    "--rounds": ("", "0", "-1", "x", "1.5"),
    "--top": ("", "0", "-1", "x"),
    "--idle-ms": ("", "-1", "x", "nan", "inf"),
    "--threads": ("", "0", "-1", "x", "99999999999999"),
    "--seed": ("", "-1", "x", "1.5", "99999999999999999999999"),
    "--budget": ("", "x", "-1", "nan", "\u0663", f"{'9' * 400}s"),
    "--family": ("", "nonsense", "hopper", "mma"),
    "--head-dims": ("", ",", "x", "0", "-64", "7", "300", "64,x"),
    "--strategy": ("", "nonsense"),
    "--verify": ("", "-1", "x", "9" * 30),
    "--rpc": ("", "x", "host", "host:", "host:x", "host:99999999", ":1"),
    "--key": ("k", "\n"),
    "--problems": ("", "0", "-1", "x", "9" * 30),
    "--max-length": ("", "0", "-1", "x", "9" * 30),
    "--heads": ("", "0", "-1", "x", "99999999999", "9" * 5000),
    "--kv-heads": ("", "0", "-1", "x", "3", "9" * 30),
    "--documents": ("", "0", "-1", "x", "64", "9" * 30),
    "--ranks": ("", "0", "-1", "x", "1.5", "9" * 30),
    "--sharding": ("", "sideways"),
    "--parts": ("", "0", "-1", "x"),
    "--layers": ("", "0", "-1", "x", "9" * 30),
    "--vocabulary": ("", "0", "-1", "x", "9" * 30),
    "--new-tokens": ("", "0", "-1", "x", "9" * 30),
    "--shapes-file": ("{folder}", "/proc/nonexistent", "{file}", "{binary}", "{empty}"),
    "--length": ("", "0", "-1", "x", "4097"),
    "--out": ("", "{folder}", "{folder}/picture", "{folder}/picture.xyz", "{file}/picture.png",
              "/proc/nonexistent/picture.png"),
    "--log-root": ("{file}", "/proc/nonexistent", "{json}"),
    "--nonsense": ("1",),
}  # fmt: skip
# Each command with arguments that are good and quick, and its options.
SMALL = ["--shape", "1,2,64,32"]
PROBLEM = ["--shape", "--layout", "--context", "--dtype"]
COMMAND_OPTIONS = [
    (["explain", *SMALL], [*PROBLEM, "--direction", "--target", "--ranks", "--sharding"]),
    (["export", "{folder}/bundle", *SMALL], [*PROBLEM, "--direction", "--target"]),
    (
        ["bench", "--no-save", *SMALL],
        [*PROBLEM, "--device", "--peers", "--steps", "--rounds", "--budget", "--idle-ms", "--threads",
         "--seed", "--kv-heads", "--documents", "--ranks", "--sharding", "--parts", "--layers",
         "--vocabulary", "--new-tokens"],
    ),
    (
        ["tune", "--budget", "1", "--no-distill", "--log-root", "{folder}/logs", *SMALL],
        [*PROBLEM, "--direction", "--target", "--budget", "--strategy", "--family", "--rpc", "--key",
         "--head-dims", "--seed", "--verify", "--log-root"],
    ),
    (["tune", "--budget", "1", "--no-distill", "--log-root", "{folder}/logs"], ["--shapes-file"]),
    (["distill", "--log-root", "{folder}"], ["--target", "--top", "--rounds", "--log-root"]),
    (
        ["verify", "--problems", "2", "--max-length", "20"],
        ["--problems", "--max-length", "--seed", "--target"],
    ),
    (
        ["plot", "layout", "--out", "{folder}/a.png"],
        ["--layout", "--heads", "--context", "--length", "--out"],
    ),
    (["layout"], ["--layout", "--heads", "--context", "--length"]),
    (["plot", "bench", "{file}"], ["--out"]),
    (["plot", "lengths", "{file}"], ["--out"]),
    (["plot", "tuning", "{folder}"], ["--out"]),
    (["doctor"], []),
]  # fmt: skip
# Folders that may hold nothing yet, or anything.
ANY_VALUE = {"--schedules", "bench --log-root"}
# The layout of `layout` and `plot layout` has 16 heads, a length of 4096 and no other demands.
GOOD_AFTER_ALL = {
    ("layout", "--layout"): ("spattention:heads=3", "spattention:longer=1", "custom:bands=0-1"),
    ("layout", "--context"): ("63",),
    ("plot", "--layout"): ("spattention:heads=3", "spattention:longer=1", "custom:bands=0-1"),
    ("plot", "--context"): ("63",),
    ("plot", "--length"): (),
}


@pytest.mark.parametrize(
    ("command", "option"),
    [(command, option) for command, options in COMMAND_OPTIONS for option in [*options, "--nonsense"]],
    ids=lambda value: value if isinstance(value, str) else "-".join(value[:2]),
)
def test_every_bad_value_of_every_option_ends_in_one_line(
    command: list[str],
    option: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("no report")
    (tmp_path / "file.json").write_text("{")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").touch()
    monkeypatch.chdir(tmp_path)
    places = {name: str(tmp_path / name) for name in ("file", "binary", "empty")}
    places |= {"folder": str(tmp_path), "json": str(tmp_path / "file.json")}
    for value in BAD_VALUES[option]:
        if value in GOOD_AFTER_ALL.get((command[0], option), ()):
            continue
        others = command[: -len(SMALL)] if option == "--shape" else command
        arguments = [argument.format(**places) for argument in (*others, option, value)]
        code, line = mistake(arguments, monkeypatch, capsys)
        assert code in (1, 2), (arguments, line)
        assert len(line) < 2100
        if line.startswith("error: Invalid value"):
            assert repr(value)[:100] in line
    assert not list(tmp_path.glob("**/*.png"))


def test_no_option_is_without_bad_values() -> None:
    """Of those that take a value."""
    tried: dict[str, set[str]] = {}
    for command, options in COMMAND_OPTIONS:
        words = itertools.takewhile(lambda word: word.isalpha(), command)
        tried.setdefault(" ".join(words), set()).update(options)

    def check(command: Any, name: str) -> None:
        for each, inner in getattr(command, "commands", {}).items():
            check(inner, f"{name} {each}".strip())
        for option in command.params if not hasattr(command, "commands") else ():
            if option.param_type_name == "option" and not option.is_flag:
                names = {*option.opts, *(f"{name} {each}" for each in option.opts)}
                assert names & (tried[name] | ANY_VALUE), f"{name} {option.opts}"

    check(typer.main.get_command(cli.app), "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ("[1, 2]", "no report of a benchmark"),
        ("null", "no report of a benchmark"),
        ("{}", "'results' is missing"),
        ('{"results": 7}', "no report of a benchmark"),
        ('{"results": [{"shape": "x", "entries": [{"direction": "forward"}]}]}', "'median_ms' is missing"),
        ('{"results": [{"shape": "x", "entries": [{"direction": 1, "median_ms": 1}]}]}', "direction is 1"),
        (
            '{"results": [{"shape": "x", "entries": [{"direction": "f", "median_ms": "1"}]}]}',
            "median_ms is '1'",
        ),
        ('[{"shape": "x", "direction": "f", "median_ms": 1, "p25_ms": 1}]', "p75_ms is missing"),
        ('{"results": []}', "has no entries"),
        (b"\xff\xfe\x00", "it is no JSON"),
        (None, "No such file"),
    ],
)
def test_what_is_no_report_is_not_drawn(
    text: str | bytes | None,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "report.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    code, line = mistake(["plot", "bench", str(path), "--out", str(tmp_path / "a.png")], monkeypatch, capsys)
    assert code == 2
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["plot", "nonsense"], "No such command 'nonsense'"),
        (["explain", "extra"], "unexpected extra argument"),
        (["explain", "--shape"], "requires an argument"),
        (["export"], "Missing argument"),
        (["plot", "tuning"], "Missing argument"),
        (["bench", "--device", "cuda"], "no CUDA device 0"),
        (["bench", "--layout", "sliding_window"], "needs a window"),
    ],
)
def test_a_call_that_can_not_be_meant(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is one")
    code, line = mistake(arguments, monkeypatch, capsys)
    assert code == 2
    assert message in line


CHECKING = ["verify", "--problems", "1", "--max-length", "9"]


@pytest.mark.parametrize(
    ("variable", "value", "commands"),
    [
        ("SPATTN_BUNDLE", "/proc/nonexistent", [["doctor"], ["explain"]]),
        ("SPATTN_BUNDLE", "/dev/null", [["doctor"], ["explain"]]),
        ("SPATTN_BUNDLE", "{folder}", [["doctor"], ["explain"]]),
        ("SPATTN_CACHE_DIR", "/dev/null/cache", [["doctor"], CHECKING]),
        ("SPATTN_CACHE_DIR", "{file}", [["doctor"], CHECKING]),
        ("SPATTN_SCHEDULES", "/proc/nonexistent", [["doctor"], ["explain"]]),
        ("SPATTN_SCHEDULES", "{file}", [["doctor"], ["explain"]]),
        ("SPATTN_TVM_RUNTIME", "/proc/nonexistent", [["doctor"], CHECKING]),
        ("CXX", "/proc/nonexistent", [["doctor"]]),
        ("CUDA_HOME", "/proc/nonexistent", [["doctor"]]),
    ],
)
def test_nonsense_in_the_environment_ends_in_no_traceback(
    variable: str, value: str, commands: list[list[str]], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("text")
    value = value.format(folder=tmp_path, file=tmp_path / "file")
    for command in commands:
        done = spattn(*command, **{variable: value, "COLUMNS": "250"})
        assert "Traceback" not in done.stderr + done.stdout, done.stderr
        assert done.returncode in (0, 1, 2)
        if variable == "SPATTN_BUNDLE":
            # Every call would fail with it.
            assert done.returncode != 0
            assert value in done.stdout + done.stderr


def test_version_and_module() -> None:
    import spattn_tvm

    for arguments in (["-m", "spattn_tvm"], ["-m", "spattn_tvm.cli"]):
        done = subprocess.run([sys.executable, *arguments, "--version"], capture_output=True, text=True)
        assert done.stdout == f"spattn-tvm {spattn_tvm.__version__}\n"
        assert done.returncode == 0
    assert spattn().returncode == 2
    assert "Usage: spattn " in spattn("explain", "--help").stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    script = spattn("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert script.returncode == 0, script.stderr
    assert "_SPATTN_COMPLETE" in script.stdout
    words = {"COMP_WORDS": "spattn ex", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "spattn ex",
             "_TYPER_COMPLETE_FISH_ACTION": "get-args"}  # fmt: skip
    found = spattn(_SPATTN_COMPLETE=f"complete_{shell}", **words)
    assert "explain" in found.stdout and "export" in found.stdout
    assert "bench" not in found.stdout


@pytest.mark.parametrize(
    ("text", "heads", "context", "spec"),
    [
        ("spattention", 4, None, "spattention:heads=4"),
        ("spattention", 4, 64, "spattention:heads=4,context=64"),
        ("sliding_window:window=5", 3, None, "sliding_window:heads=3,window=5"),
        ("spattention:heads=8,context=32", 4, 64, "spattention:heads=8,context=32"),
        ("custom:bands=0-3/none", 2, 16, "custom:heads=2,context=16,bands=0-3/none"),
    ],
)
def test_layout_text(text: str, heads: int, context: int | None, spec: str) -> None:
    assert cli.parse_layout(text, heads, context) == BandLayout.from_spec(spec)


@pytest.mark.parametrize(
    ("text", "budget"),
    [("64", (64, None)), ("8m", (None, 8.0)), ("1.5 min", (None, 1.5)), ("90s", (None, 1.5))],
)
def test_budget_is_trials_or_time(text: str, budget: tuple[int | None, float | None]) -> None:
    assert cli.parse_budget(text) == budget


@pytest.mark.parametrize("text", ["", "m", "0", "0s", "-5", "2.5", "8h", "eight", "1e3"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--budget is a number of trials"):
        cli.parse_budget(text)


def test_head_dims_replace_those_of_the_shapes() -> None:
    shapes = ["4,16,4096,64", "4,16,4096,128", "1,8/2,99,32"]
    assert cli._replace_head_dims(shapes, None) == shapes
    assert cli._replace_head_dims(shapes, "64, 256") == [
        "4,16,4096,64", "4,16,4096,256", "1,8/2,99,64", "1,8/2,99,256",
    ]  # fmt: skip


def test_problems_of_shapes() -> None:
    problems = cli.parse_problems(["1,4,64,32", "2,6/3,33,40"], "float16", "causal", None, "both")
    assert [(p.direction, p.batch, p.query_heads, p.kv_heads, p.length, p.head_dim) for p in problems] == [
        ("forward", 1, 4, 4, 64, 32),
        ("backward", 1, 4, 4, 64, 32),
        ("forward", 2, 6, 3, 33, 40),
        ("backward", 2, 6, 3, 33, 40),
    ]
    assert {p.dtype for p in problems} == {"float16"}


def test_problems_of_shapes_that_decode() -> None:
    shapes = ["1,16,4096,64", "2,6/3,4/33,40"]
    problems = cli.parse_problems(shapes, "float32", "spattention", None, "decode")
    assert [(p.direction, p.length, p.keys, p.kv_heads, p.layout.context_length) for p in problems] == [
        ("decode", 1, 4096, 16, 4096),
        ("decode", 4, 33, 3, 33),
    ]
    (forward,) = cli.parse_problems(shapes[1:], "float32", "spattention", 64, "forward")
    assert (forward.length, forward.keys, forward.layout.context_length) == (4, 33, 64)
    with pytest.raises(ValueError, match="1 to 16 queries"):
        cli.parse_problems(["1,2,17/99,32"], "float32", "causal", None, "decode")


def test_a_file_of_shapes_names_layouts_too(tmp_path: Path) -> None:
    text = "# why\n4,16,4096,64\n\n1,16,8192,64  causal # dense\n1,16/4,99,32\n"
    text += "1,2,9,32 sliding_window:window=3\n"
    found = cli.parse_shapes(text, "spattention")
    assert found == {
        "spattention": ["4,16,4096,64", "1,16/4,99,32"],
        "causal": ["1,16,8192,64"],
        "sliding_window:window=3": ["1,2,9,32"],
    }
    for bad, message in (
        ("1,2,9,32 causal x", "line 1 is not B,H,N,D and a layout"),
        ("# no", "names no shape"),
    ):
        with pytest.raises(ValueError, match=message):
            cli.parse_shapes(bad, "causal")
    shipped = Path(__file__).resolve().parent.parent / "scripts" / "lengths.txt"
    for layout, shapes in cli.parse_shapes(shipped.read_text(encoding="utf-8"), "spattention").items():
        assert cli.parse_problems(shapes, "bfloat16", layout, None, "both")
    (tmp_path / "shapes").write_text(text)
    tune = ("tune", "--shapes-file", str(tmp_path / "shapes"))
    for more, message in (
        (("--shape", "1,2,9,32"), "either --shape or --shapes-file"),
        (("--each", "--budget", "7"), "--each is for a time"),
    ):
        with pytest.raises(ValueError, match=message):
            CliRunner().invoke(cli.app, [*tune, *more], catch_exceptions=False)


def test_doctor_names_what_is_there() -> None:
    text = invoke("doctor")
    for expected in (
        "torch",
        "apache-tvm-ffi",
        "C++ compiler",
        detect_cpu().arch,
        "kernel cache",
        "schedules",
    ):
        assert expected in text


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    text = invoke("doctor", code=1)
    assert "missing" in text
    assert "apt-get install g++" in text


@pytest.mark.filterwarnings("ignore::spattn_tvm.store.ScheduleWarning")
@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("SPATTN_SCHEDULES", "/proc/nonexistent", "note"),
        ("SPATTN_SCHEDULES", __file__, "note"),
        ("SPATTN_TVM_RUNTIME", "/proc/nonexistent", "missing"),
        ("SPATTN_CACHE_MAX_MIB", "2GiB", "note"),
        ("SPATTN_THREAD_POOL", "TVM", "note"),
    ],
)
def test_doctor_names_settings_that_name_nothing(
    name: str, value: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("SPATTN_SCHEDULES", "SPATTN_TVM_RUNTIME", "SPATTN_CACHE_MAX_MIB", "SPATTN_THREAD_POOL"):
        monkeypatch.delenv(other, raising=False)
    assert not list(doctor._settings())
    monkeypatch.setenv(name, value)
    (finding,) = doctor._settings()
    assert finding in doctor.examine()
    assert (finding.status, name in finding.text, value in finding.text) == (status, True, True)


def test_explain_says_status_and_reason() -> None:
    text = invoke("explain", "--shape", "1,3,50,32", "--dtype", "bfloat16", "--direction", "both")
    assert text.count("status") == 2
    assert "untuned" in text or "nearest" in text or "tuned" in text
    assert "reason" in text


def test_explain_plans_ranks() -> None:
    text = invoke("explain", "--shape", "1,16,131072,128", "--ranks", "4", "--dtype", "bfloat16")
    assert "strategy  heads: 0.84 of the time of 'bands'" in text
    assert "rank 3" in text
    shape = ["--shape", "1,16/2,131072,128", "--layout", "spattention:context=8192,longer=1"]
    text = invoke("explain", *shape, "--ranks", "8", "--sharding", "head_tail")
    assert "strategy  bands" in text
    assert "6 copies of key/value heads" in text


def test_layout_prints_a_table_or_the_same_as_json() -> None:
    arguments = ("layout", "--layout", "gapped", "--heads", "3", "--context", "48", "--length", "41")
    layout = BandLayout.gapped(3, 48)
    facts = json.loads(invoke(*arguments, "--json"))
    heads = facts.pop("heads")
    assert [head["bands"] for head in heads] == [[list(band) for band in head] for head in layout.bands(41)]
    assert [head["pairs"] for head in heads] == list(layout.pairs_per_head(41))
    assert [head["load"] for head in heads] == pytest.approx(list(layout.load(41)))
    assert facts["pairs"] == layout.pairs(41)
    assert facts["of_dense_causal"] == pytest.approx(layout.pairs(41) / (3 * 41 * 42 / 2))
    assert facts["coverage"]["seen"] == layout.coverage(41).seen < 41
    assert (facts["layout"], facts["length"]) == (layout.spec, 41)
    text = invoke(*arguments)
    assert f"{layout.pairs(41):,} pairs" in text
    assert all(f"{pairs:,}" in text for pairs in layout.pairs_per_head(41))
    with pytest.raises(ValueError, match="longer"):
        CliRunner().invoke(cli.app, ["layout", "--context", "8", "--length", "9"], catch_exceptions=False)


def test_plot_layout_prints_work_and_writes_a_picture(tmp_path: Path) -> None:
    out = tmp_path / "layout.png"
    text = invoke("plot", "layout", "--heads", "4", "--context", "64", "--out", str(out))
    pairs = BandLayout.spattention(4, 64).pairs(64)
    assert f"{pairs:,} pairs" in text
    assert "of 64 distances 64 are seen" in text
    assert out.read_bytes()[:4] == b"\x89PNG"


def test_bench_writes_a_report_that_plots(tmp_path: Path) -> None:
    text = invoke(
        "bench", "--shape", "1,2,65,32", "--peers", "ours,sdpa", "--rounds", "3", "--idle-ms", "1",
        "--log-root", str(tmp_path),
    )  # fmt: skip
    assert "spattn-tvm" in text
    (path,) = tmp_path.glob(f"{detect_cpu().folder}/benchmarks/*.json")
    report = json.loads(path.read_text())
    entries = report["results"][0]["entries"]
    assert [(e["peer"], e["direction"], e["status"]) for e in entries] == [
        ("ours", "forward", "ok"),
        ("sdpa", "forward", "ok"),
        ("ours", "forward_backward", "ok"),
        ("sdpa", "forward_backward", "ok"),
    ]
    assert all(e["median_ms"] > 0 and e["useful_tflops"] > 0 for e in entries)
    out = tmp_path / "bench.png"
    invoke("plot", "bench", str(path), "--out", str(out))
    assert out.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "arguments",
    [
        ["layout", "--heads", "2", "--context", "8"],
        ["bench", "--shape", "1,2,65,32", "--peers", "sdpa", "--rounds", "1", "--idle-ms", "1"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_nobody_need_read_what_is_printed(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Python has no standard output in a process that was started with it closed."""
    monkeypatch.setattr(sys, "stdout", None)
    if arguments[0] == "bench":
        arguments = [*arguments, "--log-root", str(tmp_path)]
    cli.app(arguments, standalone_mode=False)
    assert arguments[0] != "bench" or list(tmp_path.glob("*/benchmarks/*.json"))


def test_verify_counts() -> None:
    text = invoke("verify", "--problems", "8", "--max-length", "130")
    assert " passed, 0 failed" in text
    assert int(text.split(" passed")[0].split()[-1]) >= 8


def test_tune_distill_explain_plot(tmp_path: Path) -> None:
    """A search in a process of its own, then what it left is found, explained and drawn."""
    logs, schedules = tmp_path / "logs", tmp_path / "schedules"
    shape = ["--shape", "1,2,128,32"]
    done = spattn(
        "tune", *shape, "--direction", "forward", "--budget", "2", "--log-root", str(logs),
        "--schedules", str(schedules),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "best of 2 trials" in done.stdout

    explained = spattn("explain", *shape, "--direction", "forward", SPATTN_SCHEDULES=str(schedules))
    assert "tuned" in explained.stdout
    problem = AttentionProblem("forward", "float32", 1, 2, 2, 128, 32, BandLayout.spattention(2))
    assert problem.key in explained.stdout

    out = tmp_path / "curve.png"
    invoke("plot", "tuning", str(logs), "--out", str(out))
    assert out.read_bytes()[:4] == b"\x89PNG"
    control = [*shape, "--direction", "forward", "--budget", "2", "--log-root", str(logs)]
    assert "timed in turns: untuned" in spattn("tune", *control, "--control", "--no-distill").stdout
    next(logs.rglob("comparison.json")).unlink()
    script = Path(__file__).resolve().parent.parent / "scripts" / "compare_strategies.py"
    command = [sys.executable, str(script), "--log-root", str(logs), "--rounds", "1"]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    (comparison,) = logs.rglob("comparison.json")
    measured = json.loads(comparison.read_text())
    assert set(measured["latency_us"]) == {"untuned", "evolutionary", "random"}
    assert all(latency > 0 for latency in measured["latency_us"].values())
    assert measured["trials"] == {"evolutionary": 2, "random": 2}

    again = invoke("distill", "--log-root", str(logs), "--schedules", str(schedules), "--rounds", "1")
    assert problem.key in again


def test_export_runs_without_a_compiler(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    text = invoke("export", str(bundle), "--shape", "1,2,100,32")
    assert text.count("untuned") + text.count("nearest") + text.count("tuned,") >= 2
    code = """
import sys, torch
from spattn_tvm import BandLayout, banded_attention, reference_attention
from spattn_tvm.dispatch import find_kernel
torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 100, 32, requires_grad=True) for _ in range(3))
layout = BandLayout.spattention(2)
o = banded_attention(q, k, v, layout, impl="cpu")
grads = torch.autograd.grad(o.sum(), (q, k, v))
exact = reference_attention(q, k, v, layout)[0]
expected = torch.autograd.grad(exact.sum(), (q, k, v))
print(max(float((a - b).abs().max()) for a, b in zip((o, *grads), (exact, *expected))) < 1e-4)
print("bundle" in find_kernel("forward", q, layout.spec).reason, "tvm" in sys.modules)
"""
    environment = {"SPATTN_BUNDLE": str(bundle), "PATH": "", "SPATTN_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["True", "True False"]
    assert not (tmp_path / "cache").exists()
