"""Whatever comes in from outside ends in a value or in one line and exit code 2.

FUZZ=20000 pytest tests/test_fuzz.py: so many inputs each, see `make torture`."""
import json
import os

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
import grader
from configurator import configure
from eval import compare_files
from judge import parse_score

fuzz = settings(
    max_examples=int(os.environ.get("FUZZ", "150")), deadline=None, database=None,
    suppress_health_check=[*HealthCheck], derandomize=True)
TEXT = st.text(max_size=60) | st.text("[]{}\"':,0123456789.eE+-_ \\\ud800\x00", max_size=60)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))
PIECES = st.sampled_from(
    r"\frac \sqrt \boxed { } \{ \} ^ _ ( ) [ ] , . : | x i e E \pi \infty \pm \text \times \cdot "
    r"1 2 10 0.5 .3 % $ \$ \! \, \mid \circ ° − √ < > = \in \cup \cdots and cm dollars "
    r"\begin{matrix} & \\ sin log ! 9^9 A B".split() + [" ", "\n", "\x00", "\ud800"])
LATEX = st.lists(PIECES, max_size=40).map("".join)


def one_line(capsys, function, *args):
    """The function's value, or None if it ended the program as it should."""
    try:
        return function(*args)
    except SystemExit as e:
        said = capsys.readouterr().err
        assert e.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    finally:
        capsys.readouterr()


@fuzz
@given(flags=st.lists(st.tuples(
    st.sampled_from(["--n=", "--x=", "--s=", "--t=", "--b", "--o=", ""]), TEXT).map("".join),
    max_size=3),
       file=st.none() | TEXT.map(lambda text: text.encode(errors="replace"))
       | st.binary(max_size=40) | st.tuples(st.sampled_from(["n = ", "x = ", "s = ", "t = "]),
                                           TEXT).map(lambda p: "".join(p).encode(errors="replace")))
def test_settings(tmp_path_factory, capsys, flags, file):
    path = tmp_path_factory.getbasetemp() / "config.py"
    if file is not None:
        path.write_bytes(file)
        flags = [*flags, str(path)]
    defaults = dict(n=1, x=0.5, s="", t=(), b=False, o=None)
    got = one_line(capsys, configure, dict(defaults), flags)
    for key, value in (got or {}).items():
        assert key == "o" or type(value) is type(defaults[key])


def lines_of(*fields):
    """Bytes of a JSON Lines file: rows with these fields of any value, other values, and noise."""
    row = st.fixed_dictionaries({}, optional=dict.fromkeys(fields, JSON | LATEX))
    line = (row | JSON).map(lambda x: json.dumps(x).encode()) | st.binary(max_size=40)
    deep = st.just(b"[" * 3000 + b"]" * 3000)
    return st.lists(line | deep, max_size=4).map(b"\n".join)


@fuzz
@given(content=lines_of("problem", "answer", "solution", "n_choices"))
def test_problems(tmp_path_factory, capsys, content):
    path = tmp_path_factory.getbasetemp() / "problems.jsonl"
    path.write_bytes(content)
    rows = one_line(capsys, data.load_problems, str(path), "train")
    for row in rows or []:
        assert row["problem"].strip().encode() and row["answer"].strip().encode()


@fuzz
@given(content=lines_of("problem", "correct", "response"), other=lines_of("problem", "correct"))
def test_files_of_responses(tmp_path_factory, capsys, content, other):
    paths = [tmp_path_factory.getbasetemp() / name for name in ("a.jsonl", "b.jsonl")]
    for path, text in zip(paths, (content, other)):
        path.write_bytes(text)
    one_line(capsys, compare_files, *map(str, paths))


@fuzz
@given(boxed=LATEX | TEXT, answer=LATEX, choices=st.none() | st.just(4))
def test_the_grader(boxed, answer, choices):
    problem = {"answer": answer, "n_choices": choices}
    verdict = grader.quick(f"so \\boxed{{{boxed}}}", problem)
    assert verdict in (True, False) or all(isinstance(x, str) for x in verdict)


@fuzz
@given(reply=TEXT | st.lists(st.sampled_from(
    ["Score", "score", " ", "ab12cd", ":", "10", "7.5", "/ 10", "*", "\n", "</think>", "nan"]),
    max_size=12).map("".join) | st.none())
def test_the_judges_reply(reply):
    score = parse_score(reply, "ab12cd")
    assert score is None or 1 <= score <= 10
