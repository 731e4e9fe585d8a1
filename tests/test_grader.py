"""The grader as it runs: spelling here, math-verify in workers that can be killed."""
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

import grader

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"

# "reference | boxed", three spaces apart; all of RIGHT are the same, all of WRONG are not
RIGHT = r"""
\frac12 | .5   \dfrac{3}{6} | \tfrac12   1/3 | 0.333333   \frac34 | 75\%
3\frac{1}{2} | \frac{7}{2}   3 1/2 | 3.5   -3./2 | -1.5   10,\!080 | 10080
1{,}234{,}567 | 1,234,567   12345 | 12 345   50\% | 50   50\% | 0.5   36 | \$36.00   5\text{ cm} | 5
5 | 5\text{ m}   5 \text{ centimeters} | 5\,\text{cm}   15\mbox{ cm}^2 | 15 cm^2
12 | 12 \text{ apples}   20 \text{ mph} | 20 \text{ miles per hour}
8\sqrt{3} | 8\sqrt{3} square inches   48\pi \text{ m} | 48\pi   90 | 90°   \sin 30^\circ | \frac12
4.5e33 | 4.5 \times 10^{33} \text{ erg/s}   1.04e-3 | 0.00104   2\sqrt{3} | \sqrt{12}   6+9i | 9i+6
\frac{1+i}{2} | 0.5+0.5i   0.\overline{27} | 3/11   x^2+2x+1 | (x+1)^2   \sin(2t) | 2\sin t\cos t
np.arcsin(10/13) | \arcsin\left(\frac{10}{13}\right)   x+y=5 | x=5-y   12 | 5+7=12
4:40 a.m. | 4:40 \text{ AM}   (3,4] | \left(3,4\right]   -2\le x\le 7 | [-2,7]
8\pi | 8\pi \approx 25.13   3.14 | x \approx 3.14   \frac23 \approx 0.67 | 2/3
8.24 | $\approx 8.24$   12 | 12 \text{ erg} \, \text{s}^{-1}   f(x)=2x | 2x \text{ for all } x
2(x+1) | 2\bigl(x+1\bigr)   7 | \boldsymbol{7}   7 | \bm{7}   1/3 | 0.\bar{3}
\begin{pmatrix} 1/3 \\ 2 \end{pmatrix} | \begin{pmatrix} 1/3 \\[4pt] 2\end{pmatrix}
x \in [-2,7] | [-2,7]   (2,5) | \{x \mid 2 < x < 5\}
(-\infty, 2) \cup (3, \infty) | (3,\infty)\cup(-\infty,2)   1,2 | 2 \text{ and } 1
1, 2 | x=1 \text{ or } x=2   $(0,1),(1,0)$ | (1,0),(0,1)
\frac{1 \pm \sqrt{5}}{2} | \frac{1+\sqrt5}{2}, \frac{1-\sqrt5}{2}
\begin{pmatrix} -1/3 \\ 2 \end{pmatrix} | \begin{bmatrix} -\frac13 \\ 2\end{bmatrix}
1/3 | 0.\overline{LONG}
E | \text{(E)}   \text{Evelyn} | Evelyn   \text{ellipse} | \text{an ellipse}
"""
WRONG = r"""
1/2 | 0.51   1000000 | 1000001   3\frac{1}{2} | \frac{3}{2}   5\% | 0.5   0.5 | 0.5\%
5\text{ cm} | 5\text{ m}   2.88e-19 | 3e-19   2.88e-19 | 0   ACF | FCA
2.88e-19 | E = 3 \times 10^{-19}   2\sqrt{3} | \sqrt{6}   6+9i | 6-9i
x=1 | y=1   x<2 | x \le 2   52_8 | 52_7   (1,2) | (2,1)   (1,2) | [1,2]   (3,4] | [3,4)   1 | 1,2
1,2 | 1,2,3   (-\infty, 2) \cup (3, \infty) | (-\infty, 2] \cup (3, \infty)
1 \pm \sqrt{19} | 1+\sqrt{19}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}
\text{silent} | \text{listen}   \text{(E)} | D   \pi r^2 h | \pi r^2   3:5:7 | 3:7:5   |x| | x
1011_2 | 1011\text{base(}   52_8 | 52\text{BASES}   11/2 | 1 1/2   23 | 2 \quad 3   12 | 1 2
3.14 | x \approx 3.15   8\pi | 9\pi \approx 28.27   4 | 3 \approx 4.2   2/3 | 0.\overline{LONG}
1:2 | 2:1   4:40 a.m. | 4:40 p.m.   100 | 100 \text{ million}   \infty | -\infty   2 | x = 3
"""


def grade(*pairs):
    return grader.grade_all([(f"So \\boxed{{{p}}}.", {"answer": g}) for g, p in pairs])


@pytest.mark.parametrize("table, verdict", [(RIGHT, True), (WRONG, False)])
def test_answers_that_are_the_same_and_that_are_not(table, verdict):
    table = table.strip().replace("LONG", "3" * 600)  # written out more digits than int() reads
    table = table.replace("BASES", "base " * 380)  # no time is lost on these
    pairs = [x.split(" | ") for x in re.split(r"\s{3,}|\n", table)]
    assert len(pairs) > 30
    assert [pair for pair, got in zip(pairs, grade(*pairs)) if got != verdict] == []


@pytest.mark.parametrize("text, boxed", [
    ("\\boxed{67}, no, \\boxed{68}", "68"), ("The answer is 68.", None), ("\\boxed{68", None),
    ("\\boxed {\\frac{1}{2}} and \\fbox{6}", "\\frac{1}{2}"), ("\\boxed{(1, 2\\}}", "(1, 2\\}"),
    ("<think>\\boxed{1}</think> It is \\boxed{2}.", "2"), ("<think>\\boxed{1}</think> 2.", None)])
def test_last_boxed(text, boxed):
    assert grader.last_boxed(text) == boxed


def test_multiple_choice():
    right = ["C", "(C)", "\\text{C}", "c", "C) days", "\\textbf{(C)}\\ 12", "\\text{Option C}",
             "C) 41,800 J", "C. Vitamin A"]
    wrong = ["B", "", "Cold", "AC", "(C), (D)", "(C)(D)", "C. A. B.", "C: A or B", "C) D", "3"]
    items = [(f"\\boxed{{{x}}}", {"answer": "C", "n_choices": 4}) for x in right + wrong]
    assert grader.grade_all(items) == [True] * len(right) + [False] * len(wrong)
    numbered = {"answer": "3", "n_choices": 4, "answer_letter": "C"}
    assert grader.grade_all([(f"\\boxed{{{x}}}", numbered) for x in "3C2"]) == [True, True, False]


HOSTILE = ["9^{9^{9^9}}", "(10^7)!", "(" * 900 + ")" * 900, "x" * 10**6, "\x00", "9" * 1999, "}{",
           "\ud800", "\\", "\\frac{1}{" * 99 + "2" + "}" * 99]


def test_hostile_answers_are_wrong_and_leave_the_others_alone(monkeypatch):
    monkeypatch.setattr(grader, "SECONDS", 1)
    good = [(f"{2 * n}\\sqrt{{{n}}}", f"\\sqrt{{{4 * n**3}}}") for n in range(2, 2 + len(HOSTILE))]
    bad = [("\\sqrt{7}+x", text) for text in HOSTILE]
    assert grade(*[x for pair in zip(bad, good) for x in pair]) == [False, True] * len(HOSTILE)
    assert grade(("9^{9^{9^9}}", "1"), ("1", "1")) == [False, True]


def test_any_thread_may_grade_and_dead_workers_are_replaced():
    for worker in psutil.Process().children():
        worker.kill()
    time.sleep(0.5)
    pairs = [(f"x^2+{2 * k}x+{k * k + k % 2}", f"(x+{k})^2") for k in range(2, 8)]
    with ThreadPoolExecutor(len(pairs)) as pool:
        assert list(pool.map(grade, pairs)) == [[True], [False]] * 3


def test_workers_end_with_their_parent():
    code = r"""import grader, time
print(grader.grade_all([(r'\boxed{(x+1)^2}', {'answer': 'x^2+2x+1'})]), flush=True)
time.sleep(60)"""
    command, root = [sys.executable, "-c", code], Path(grader.__file__).parent
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline() == b"[True]\n"
        workers = psutil.Process(parent.pid).children()
        parent.kill()
    assert workers and not psutil.wait_procs(workers, timeout=5)[1]


REWARDS = """
import os, signal, subprocess, time

def length(text, row):  # prints, where a verdict is read, and in a process of its own
    print("1.0", flush=True)
    subprocess.run(["echo", "1.0"])
    return len(text) / row["most"]

def evaluated(text, row):
    return float(eval(text))
"""
WRONG_REWARDS = ["time.sleep(60)", "os._exit(0)", "'nan'", "2", "-0.1", "'x'",
                 "[signal.signal(signal.SIGALRM, signal.SIG_IGN), time.sleep(60)]",
                 "[subprocess.Popen(['sleep', '60'], stderr=subprocess.DEVNULL), time.sleep(60)]"]


def test_a_reward_of_ones_own(tmp_path, capsys):
    """Its values, whatever it prints; what goes wrong is a 0 that is said, and hinders no other."""
    (tmp_path / "mine.py").write_text(REWARDS)
    texts = ["a", "ab", "abc"] * 4
    got = grader.grade_all([(x, {"most": 4}) for x in texts], f"{tmp_path}/mine.py:length")
    assert got == [len(x) / 4 for x in texts] and capsys.readouterr().out == ""
    began = time.time()
    items = [(x, {}) for wrong in WRONG_REWARDS for x in (wrong, "(os.fork(), 1)[1]", "0.5")]
    got = grader.grade_all(items, f"{tmp_path}/mine.py:evaluated", 0.5)
    assert got == [0.0, 1.0, 0.5] * len(WRONG_REWARDS) and time.time() - began < 40
    said = capsys.readouterr().out
    assert "reward: 4 of 24 responses are worth 0: over 0.5 seconds" in said
    assert "1 of 24 responses are worth 0: ValueError: could not convert" in said
    assert "AssertionError: nan is not from 0 to 1" in said


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the problem sets in ../shared/data")
def test_every_reference_answer_is_correct():
    rows = [json.loads(line) for f in sorted(DATA.glob("*.jsonl")) for line in open(f)]
    got = grader.grade_all([(f"\\boxed{{{row['answer']}}}", row) for row in rows])
    # one reference lacks its last brace, so no box around it closes
    assert len(rows) > 30000 and got.count(False) == 1
