r"""The grader as it runs: spelling here, math-verify in worker processes that are killed when they take too long."""
import json
import os
import re
import signal
import threading
from pathlib import Path

import pytest

import grader

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"

# (reference answer, boxed answer), grouped by what they are about; all of RIGHT are the same, all of WRONG are not
RIGHT = r"""
1/2 | 0.5            \frac12 | .5            \frac{1}{2} | 1/2      \dfrac{3}{6} | \tfrac12      -\frac{3}{2} | \frac{-3}{2}
1/3 | 0.333333       -3./2 | -1.5            12 | 12.0              12 | 012                     0 | -0
9 | +9               \frac{15}4 | 3.75       \frac{9}{17} | 9/17    \frac34 | 75\%               0.75 | \frac{3}{4}
3\frac{1}{2} | \frac{7}{2}                   3 1/2 | 3.5            1\frac{4}{5} | 9/5           -2\frac12 | -2.5
10,\!080 | 10080     58,500 | 58{,}500       1,234 | 1234           1{,}234{,}567 | 1,234,567    1000 | 1\,000
50\% | 50            50\% | 0.5              14.29\% | 14.29        64 | 64\%                    5\% | 5 \text{ percent}
\$36 | 36            36 | \$36.00            \$32 | 32 \text{ dollars}                           7 | $7$
5\text{ cm} | 5      5 | 5\text{ m}          5\text{ cm} | 5 \mathrm{~cm}                        5 \text{ centimeters} | 5\,\text{cm}
15\mbox{ cm}^2 | 15 cm^2                     15\mbox{ cm}^2 | 15\text{ square centimeters}       864 \mbox{ inches}^2 | 864
90^\circ | 90        90^\circ | 90^{\circ}   90 | 90°               120^{\circ} | 120 \text{ degrees}
4.5e33 | 4.5 \times 10^{33}                  4.5e33 | 4.5\cdot10^{33}                            1e-5 | 10^{-5}     1e-5 | 0.00001
2.5 \times 10^{-3} | 0.0025                  1.04e-3 | 0.00104                                   7e37 | 7 \cdot 10^{37}
2\sqrt{3} | \sqrt{12}                        11\sqrt2 | 11\sqrt{2}   \frac{1}{\sqrt{2}} | \frac{\sqrt{2}}{2}   \sqrt{3} | sqrt(3)
7\pi | 7 pi          2\pi/3 | \frac{2\pi}{3}   2^6 * 3^5 * 5^4 | 9720000   10! | 3628800          \binom{10}{3} | 120
6+9i | 9i+6          2^{100} | 1267650600228229401496703205376     \ln 2 | \ln(2)                e^2 | e^{2}
x^2+2x+1 | (x+1)^2   (a+5)(b+2) | (b+2)(a+5)   8n^2+4n+1 | 4n + 8n^2 + 1   \frac{x}{x-1} | 1+\frac{1}{x-1}   ab | ba
\arcsin(10/13) | \sin^{-1}(10/13)            np.arcsin(10/13) | \arcsin\left(\frac{10}{13}\right)   \cot x | \frac{\cos x}{\sin x}
y=2x+3 | 2x+3        2x+3 | y = 2x + 3       x=5 | 5                 5 | x = 5        f(x)=x+1 | f(x) = 1+x     f(x)=x+1 | x+1
5x - 11y + z - 17 = 0 | -5x+11y-z+17=0       x<2 | 2>x               m \neq 1 | m\ne 1
x+y=5 | x=5-y        x=y | y=x               \sin 30^\circ | \frac12             5\text{ km/h} | 5      9.8 \text{ m/s}^2 | 9.8
\emptyset | \varnothing                      \{(2,3),(4,5)\} | (4,5), (2,3)     \mathbb{R} | (-\infty, \infty)      3 \pm 1 | 2, 4
k \geqslant 2 | k \ge 2                      x \le 5 | x \leqslant 5             c < \sqrt{2} | \sqrt{2} > c           \frac{10{,}000}{3} | \frac{10000}{3}
12 | 12 \text{ apples}                        4.5e33 | 4.5 \times 10^{33} \text{ erg/s}   7 \text{ distinct integers} | 7    12 | \approx 12
0.\overline{27} | \frac{3}{11}                (2516)_8 | 2516_8                     \text{ellipse} | \text{an ellipse}       4:40 a.m. | 4:40 AM
\sin(2t) | 2\sin t\cos t                      2:4 | 1:2                            12 | 5+7=12                            48\pi \text{ m} | 48\pi
(2,5) | \{x \mid 2 < x < 5\}    (2,5) | \{ x \in \mathbb{R} : 2<x<5 \}   \emptyset | \{\}   \mathbb{R} | \text{all real numbers}   2\sqrt{3} | 2√3   \frac12 | ½
\frac{1+i}{2} | 0.5+0.5i   \sqrt{5} | 5^{0.5}
y'' + y = 0 | y + y'' = 0                      \frac{E_1+2E_2}{3} | \frac13 E_1 + \frac{2}{3} E_{2}
\log_2 3 | \frac{\ln 3}{\ln 2}              \sqrt[3]{2} | 2^{1/3}              20 \text{ mph} | 20 \text{ miles per hour}
(3,4] | \left(3,4\right]                     -2\le x\le 7 | [-2,7]   [-2,7] | -2 \leq x \leq 7    x \in [-2,7] | [-2,7]
(-\infty, 2) \cup (3, \infty) | (3,\infty)\cup(-\infty,2)            (-\infty, 2) \cup (3, \infty) | x<2 \text{ or } x>3
\left( 3, \frac{\pi}{2} \right) | (3, \pi/2)    (15,-29) | (15, -29)    (1,2) | (1.0, 2)              (x,y)=(1,2) | (1,2)
1,2 | 2,1            1,2 | \{2,1\}           1,2 | 2 \text{ and } 1  \{1,2\} | \{2, 1\}            -2 \text{ or } -12 | -12, -2
n = 2, 5, 13 | 13,5,2                        x=1,y=2 | y=2,x=1       $69$,$84$ | 84, 69            x=1 \text{ or } x=2 | 1, 2
$(0,1),(1,0)$ | (1,0),(0,1)                  1 \pm \sqrt{19} | 1+\sqrt{19}, 1-\sqrt{19}          3 \pm 2\sqrt{2} | 3\pm\sqrt{8}
\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix} | \begin{bmatrix} -\frac13 \\ \frac{2}{3} \end{bmatrix}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{pmatrix}1&2\\3&4\end{pmatrix}
\text{Evelyn} | Evelyn                       \text{even} | even      \text{Yes} | yes              \text{(E)} | E      E | \text{(E)}
52_8 | 52_{8}        52_8 | 52               4:40 a.m. | 4:40 \text{ a.m.}                         \infty | +\infty    \infty | ∞
"""
WRONG = r"""
1/2 | 0.51           1/3 | 0.333             1/3 | 0.33              1000000 | 1000001           0.1 | 0.10001       5 | -5
12 | 21              12 | 120                \frac{1}{2} | \frac{2}{1}                           3\frac{1}{2} | \frac{3}{2}
5\% | 0.5            5\% | 500               0.5 | 0.5\%             5\text{ cm} | 5\text{ m}    15\mbox{ cm}^2 | 15\text{ cm}
2.88e-19 | 3e-19     2.88e-19 | 0            1e-5 | 1e-6             4.5e33 | 4.5e32             \pi | 3.14
2\sqrt{3} | \sqrt{6}  x^2+1 | t^2+1           x^2 | x^3               \ln 2 | \ln 3               6+9i | 6-9i         x | y
y=2x+3 | y=2x-3      x=1 | y=1               x<2 | x \le 2           52_8 | 52_7                 1.5 \pi \times 10^{-9} | 0
(1,2) | (2,1)        (1,2) | [1,2]           (3,4] | (3,4)           [3,4) | (3,4]               (3,4] | [3,4)       [-2,7] | (-2,7)
(1,2) | (1,2,3)      1,2 | 1                 1 | 1,2                 1,2 | 1,3                   1,2 | 1,2,3         \{1,2\} | (1,2)
(-\infty, 2) \cup (3, \infty) | (-\infty, 2] \cup (3, \infty)        $(0,1),(1,0)$ | (0,1)         1 \pm \sqrt{19} | 1+\sqrt{19}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{pmatrix} 1 & 2 \end{pmatrix}
\text{Evelyn} | Evelin                       \text{silent} | \text{listen}   \text{even} | odd     \text{Yes} | no     \text{(E)} | D
2\pi r h | 2\pi r    \pi r^2 h | \pi r^2    m g | m    \frac{1}{\sqrt{2}}c | \frac{1}{\sqrt{2}}    5 \text{ acres} | 5 \text{ hectares}
4:40 a.m. | 4:45 a.m.  4:40 a.m. | 4:40 p.m.   3:5:7 | 3:7:5   N | n                 7 | 1=7           x=7 | x=8=7         12 | 12_8
1 | \pm 1 \pm 1   6 | 6 xy   6 xy | 6   5 \text{ apples} | 5 \text{ pears}       |x| | x                 \sqrt{x^2} | x  10^{30}+1 | 10^{30}   \sin(2t) | \cos(2t)
5 \text{ km/h} | 5 \text{ m/s}                x+y=5 | x=5+y          1:2 | 2:1           0 | \emptyset
3 | \text{none}      \infty | -\infty        5 | \text{five cm}      2 | x = 3                   1234 | 1,235
"""


def pairs(text):
    return [tuple(x.split(" | ")) for line in text.strip().splitlines()
            for x in re.split(r"\s{2,}", line.strip())]


def test_answers_that_are_the_same_and_that_are_not():
    cases = [(g, p, True) for g, p in pairs(RIGHT)] + [(g, p, False) for g, p in pairs(WRONG)]
    assert len(cases) == 235
    got = grader.grade_all([(f"So it is \\boxed{{{p}}}.", {"answer": g}) for g, p, _ in cases])
    assert [case for case, verdict in zip(cases, got) if verdict != case[2]] == []


@pytest.mark.parametrize("text, boxed", [
    ("\\boxed{67}, no, \\boxed{68}", "68"),                      # the last box counts
    ("The answer is 68.", None),
    ("\\boxed{68", None),                                        # a box that never closes
    ("\\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
    ("\\boxed {5} and \\fbox{6}", "5"),
    ("\\boxed{\\boxed{5}}", "5"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),                       # printed braces open and close nothing
    ("\\boxed{(-\\infty, 1\\}}", "(-\\infty, 1\\}"),
    ("<think>\\boxed{1}</think> It is \\boxed{2}.", "2"),
    ("<think>\\boxed{1}</think> It is 2.", None),                # a box inside the thought is not an answer
    ("\\boxed{}", ""),
    ("\\boxed", None),
])
def test_last_boxed(text, boxed):
    assert grader.last_boxed(text) == boxed


@pytest.mark.parametrize("boxed, answer, right", [
    ("C", "C", True), ("(C)", "C", True), ("\\text{C}", "C", True), ("c", "C", True), ("C) longer days", "C", True),
    ("\\textbf{(C)}\\ 12", "C", True), ("C. 12", "C", True), ("B", "C", False), ("", "C", False), ("Cold", "C", False),
    ("[C]", "C", True), ("\\text{Option C}", "C", True), ("**C**", "C", True), ("C - days", "C", True), ("(C), (D)", "C", False),
    ("(C)(D)", "C", False), ("A. B. C.", "A", False), ("3", "3", True), ("C", "3", True), ("2", "3", False), ("J", "J", True), ("AC", "C", False),
])
def test_multiple_choice(boxed, answer, right):
    row = {"answer": answer, "n_choices": 4, "answer_letter": "C" if answer == "3" else answer}
    assert grader.grade_all([(f"\\boxed{{{boxed}}}", row)]) == [right]


HOSTILE = ["9^{9^{9^9}}", "9^{9^{9^{9^{9^9}}}}", "(10^7)!", "10^{10^{10}}!", "{" * 10000 + "}" * 10000, "(" * 900 + ")" * 900,
           "\\frac{1}{" * 200 + "2" + "}" * 200, "\x00", "1\x002", "x" * 3_000_000, "9" * 3_000_000, "\\sqrt{" * 300 + "2" + "}" * 300,
           "\\int_0^{\\infty} e^{x^{x^x}} dx", "\\sum_{n=1}^{10^{12}} \\frac{1}{n^3}", "\\prod_{n=1}^{10^{9}} n",
           "+".join(f"x_{{{i}}}^{{{i}}}" for i in range(100)), "1,2" * 500, "\\{" * 500, "(x+y+z)^{1000}", "\\pm" * 100,
           "\ud800", "\\begin{pmatrix}" + "1 & " * 300 + "1\\end{pmatrix}", "\\", "}{", "\\text{", "2" + "^2" * 300, "1e999"]


def test_hostile_answers_are_wrong_and_leave_the_others_alone():
    good = [(f"\\boxed{{\\sqrt{{{4 * n * n * n}}}}}", {"answer": f"{2 * n}\\sqrt{{{n}}}"}) for n in range(2, 2 + len(HOSTILE))]
    bad = [(f"\\boxed{{{text}}}", {"answer": "\\sqrt{7}+x"}) for text in HOSTILE]
    items = [x for pair in zip(bad, good) for x in pair]
    assert grader.grade_all(items) == [False, True] * len(HOSTILE)
    assert grader.grade_all(good) == [True] * len(good)


def test_hostile_references_and_no_box():
    assert grader.grade_all([("", {"answer": "1"}), ("\\boxed{1}", {"answer": "9^{9^{9^9}}"}), ("\\boxed{1}", {"answer": "1"})]) \
        == [False, False, True]
    assert grader.grade_all([]) == []
    assert grader.grade_all([("\\boxed{%s}" % ("1+" * 5000 + "1"), {"answer": "1+" * 5000 + "1"})]) == [True]  # long, and equal


def test_any_thread_may_grade_and_dead_workers_are_replaced():
    verdicts = {}

    def ask(k):
        verdicts[k] = grader.grade_all([(f"\\boxed{{(x+{k})^2}}", {"answer": f"x^2+{2 * k}x+{k * k + (k % 2)}"})])

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(2, 8)]
    [t.start() for t in threads]
    for worker in list(grader._started):
        os.kill(worker.pid, signal.SIGKILL)
    [t.join() for t in threads]
    assert verdicts.keys() == set(range(2, 8))
    for k in range(2, 8):  # a killed worker's answer counts as wrong; the next time it is graded
        ask(k)
        assert verdicts[k] == [k % 2 == 0]


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the problem sets in ../shared/data")
def test_every_reference_answer_is_correct():
    rows = [(f.stem, json.loads(line)) for f in sorted(DATA.glob("*.jsonl")) for line in open(f)]
    assert len(rows) > 30000
    got = grader.grade_all([(f"\\boxed{{{row['answer']}}}", row) for _, row in rows])
    # one reference lacks its last brace, so no box around it closes
    assert [(name, row["answer"]) for (name, row), verdict in zip(rows, got) if not verdict] == [
        ("deepscaler_sub", "\\frac{2 k n}{n+k-1}-2 \\frac{k!n!}{(k+n-1)!")]
