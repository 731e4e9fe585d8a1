"""Statistics against enumeration and hand-made tables, data sets by name, and eval.py's comparisons."""
import importlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

import data
from grader import vote

evaluation = importlib.import_module("eval")
DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


# --- statistics ------------------------------------------------------------------------------------------------------

def test_pass_at_k_is_the_mean_over_all_subsets():
    for n in range(1, 8):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([1] * correct + [0] * (n - correct), k))
                assert evaluation.pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    assert evaluation.pass_at_k(10, 3, 5) == pytest.approx(1 - 21 / 252) and evaluation.pass_at_k(32, 0, 32) == 0


def test_maj_at_k():
    maj = evaluation.maj_at_k
    assert maj(["7", "7", "8"], [1, 1, 0], 3) == 1 and maj(["7", "8", "8"], [1, 0, 0], 3) == 0
    assert maj(["7", "8"], [1, 0], 2) == 0.5                      # a tie shares the vote
    assert maj([None, None, "7"], [0, 0, 1], 3) == 1              # no answer is no vote
    assert maj([None, None], [0, 0], 2) == 0
    assert maj(["7", "8", "7", "9"], [1, 0, 1, 0], 1) == pytest.approx(0.5, abs=0.05)  # the mean over subsets
    answers, correct = ["7", "8", "8", None, "7", "7"], [1, 0, 0, 0, 1, 1]
    subsets = list(itertools.combinations(range(6), 3))
    want = np.mean([maj([answers[i] for i in s], [correct[i] for i in s], 3) for s in subsets])
    assert maj(answers, correct, 3, draws=20_000) == pytest.approx(want, abs=0.01)


def test_bootstrap_interval():
    values = [1.0] * 30 + [0.0] * 70
    low, high = evaluation.bootstrap([values])
    assert (low, high) == evaluation.bootstrap([values])           # seeded
    se = math.sqrt(0.3 * 0.7 / 100)
    assert low == pytest.approx(0.3 - 1.96 * se, abs=0.015) and high == pytest.approx(0.3 + 1.96 * se, abs=0.015)
    assert evaluation.bootstrap([[1, 1, 1]]) == (1.0, 1.0)
    low, high = evaluation.bootstrap([values, [1.0] * 10])         # the average of two sets, one of them certain
    assert low == pytest.approx(0.65 - 0.98 * se, abs=0.01) and high == pytest.approx(0.65 + 0.98 * se, abs=0.01)


def test_mcnemar():
    assert evaluation.mcnemar(0, 0) == evaluation.mcnemar(5, 5) == 1
    assert evaluation.mcnemar(1, 9) == evaluation.mcnemar(9, 1) == pytest.approx(2 * (1 + 10) / 2**10)
    assert evaluation.mcnemar(0, 20) == pytest.approx(2 / 2**20)


def test_a_hand_made_table():
    """Three problems, four responses each."""
    boxes = [["1", "1", "2", "1"], ["5", "4", "4", "\\frac{8}{2}"], ["9", "9", "9", "9"]]
    right = [[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    rows = [dict(vote=None if i == 2 else vote(f"\\boxed{{{b}}}", {}), correct=bool(c), truncated=i == 2, tokens=10 + i)
            for i in range(3) for b, c in zip(boxes[i], right[i])]
    s = evaluation.summarize(rows, 4)
    assert s["accuracy"] == pytest.approx(4 / 12) and s["problems"] == 3 and s["responses"] == 12
    assert s["mean_length"] == pytest.approx(11) and s["truncated"] == pytest.approx(1 / 3)
    assert s["pass@2"] == pytest.approx((1 + 1 / 2 + 0) / 3) and s["pass@4"] == pytest.approx(2 / 3)
    assert s["by_problem"] == [0.75, 0.25, 0] and s["intervals"]["accuracy"] == evaluation.bootstrap([s["by_problem"]])
    assert s["maj@4"] == pytest.approx(1 / 3)  # 4 wins the second in two spellings; cut-off answers have no vote


def test_responses_of_other_settings_are_kept_beside_the_new_ones(tmp_path):
    path, settings = str(tmp_path / "sub" / "set.jsonl"), dict(n=2, seed=0, weights=[["model.safetensors", 1, 2]])
    problems = [dict(problem=f"p{i}", answer="1") for i in range(4)]
    rows = {i: [dict(problems[i], index=i, sample=k, correct=True) for k in range(2)] for i in (3, 1)}
    evaluation.start_file(path, settings, {})
    evaluation.start_file(path, settings, rows)
    assert evaluation.finished(path, settings, problems) == rows
    problems[1] = dict(problem="p1", answer="2")  # the set has changed there
    assert evaluation.finished(path, settings, problems) == {3: rows[3]}
    first = open(path).read()
    assert evaluation.finished(path, settings | dict(seed=1), problems) == {}
    evaluation.start_file(path, settings | dict(seed=1), {})
    assert open(tmp_path / "sub" / "set.old_1.jsonl").read() == first and open(path).read().count("\n") == 1
    # a problem that has changed since: its responses are not the set's any more, but stay in a file
    evaluation.start_file(path, settings, rows)
    whole = open(path).read()
    evaluation.start_file(path, settings, {1: rows[1]})
    assert open(tmp_path / "sub" / "set.old_2.jsonl").read() == whole and len(open(path).readlines()) == 1 + len(rows[1])


def test_table_of_a_protocol():
    def result(model, data, n, accuracy, protocol="nthr"):
        values = [1.0] * round(10 * accuracy) + [0.0] * round(10 * (1 - accuracy))
        return dict(model=model, data=data, protocol=protocol, n=n, temperature=0.0, accuracy=accuracy, problems=10,
                    by_problem=values, intervals=dict(accuracy=(0.0, 1.0)), mean_length=1.0, truncated=0.0)
    sets = list(evaluation.PROTOCOLS["nthr"]["averages"]["Avg"])
    results = [result("a", s, 1, x / 10) for s, x in zip(sets, (0, 1, 5, 3, 2))]
    results += [result("b", s, 8, 0.9, None) for s in sets] + [result("c", "math500", 1, 0.4)]
    text = evaluation.tables(results)
    row, = [line for line in text.splitlines() if line.startswith("| a | 0.00")]
    assert row.startswith("| a | 0.00 | 10.00 | 50.00 | 30.00 | 20.00 | 22.00 (")
    assert "| c | - | - | 40.00 | - | - | - |" in text  # no average of some of the sets
    assert "| b | -" not in text and "| b | 90.00" not in text  # other settings are no row of the protocol


# --- comparisons -----------------------------------------------------------------------------------------------------

def responses(path, correct, n=1, problems=None):
    rows = [dict(problem=f"p{i if problems is None else problems[i]}", correct=bool(c)) for i, cs in enumerate(correct)
            for c in (cs if n > 1 else [cs])]
    path.write_text("".join(json.dumps(r) + "\n" for r in [dict(n=n)] + rows))
    return path


def test_compare(run, tmp_path):
    a = responses(tmp_path / "a.jsonl", [0] * 9 + [1] * 11)
    b = responses(tmp_path / "b.jsonl", [1] * 9 + [0] + [1] * 10)
    out = run("eval.py", "--compare", a, b).stdout
    assert "20 problems" in out and "55.0%" in out and "95.0%" in out and "+40.0 points" in out
    assert "first only 1, by the second only 9" in out and "p = 0.0215" in out
    c = responses(tmp_path / "c.jsonl", [[0, 1]] * 5, n=2, problems=[0, 1, 2, 3, 99])
    out = run("eval.py", "--compare", a, c).stdout
    assert "4 problems" in out and "16 problems are in" in out and "+50.0 points" in out and "several" in out


def test_bad_comparisons_are_refused(run, tmp_path):
    good = responses(tmp_path / "good.jsonl", [1, 0])
    (tmp_path / "bad.jsonl").write_text('{"n": 1}\n{"problem": "x"}\n')
    (tmp_path / "json.jsonl").write_text('{"n": 1}\n{"problem"\n{"problem": "x", "correct": true}\n')
    (tmp_path / "rows.jsonl").write_text('{"problem": "x", "answer": "1"}\n')
    other = responses(tmp_path / "other.jsonl", [1], problems=["q"])
    for args, words in [((good,), "two files"), ((good, tmp_path / "none.jsonl"), "none.jsonl: No such file"),
                        ((good, tmp_path / "bad.jsonl"), "bad.jsonl, line 2: 'problem' or 'correct'"),
                        ((good, tmp_path / "json.jsonl"), "json.jsonl, line 2: not JSON"),
                        ((good, tmp_path / "rows.jsonl"), "rows.jsonl, line 1"), ((good, other), "no problem in common")]:
        done = run("eval.py", "--compare", *args, check=False)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, (args, done.stderr)


# --- data sets by name -----------------------------------------------------------------------------------------------

HUB = {  # a row of each set as the hub has it -> (problem, answer) as we have it
    "aime24": (dict(problem="P", answer="033", id=1), "P", "33"),
    "aime25": (dict(problem="P", answer="70"), "P", "70"),
    "amc23": (dict(question="P", answer="27.0"), "P", "27.0"),
    "amc83": (dict(problem="P", answer=142.0), "P", "142"),
    "math500": (dict(problem="P", answer="\\frac{1}{2}", level=3, subject="Algebra"), "P", "\\frac{1}{2}"),
    "minerva_math": (dict(question="P", answer="4.5e33"), "P", "4.5e33"),
    "olympiadbench": (dict(question="P", final_answer=["$69$,$84$"], is_multiple_answer=True), "P", "$69$,$84$"),
    "gsm8k": (dict(question="P", answer="He has 3 + 4 = 7.\n#### 1,007"), "P", "1,007"),
    "arc_c": (dict(question="Q?", choices=dict(text=["a", "b", "c"], label=["1", "2", "3"]), answerKey="3"),
              "Q?\n\nA) a\nB) b\nC) c", "C"),
    "mmlu_pro": (dict(question="Q?", options=["a", "b"], answer="B", category="law"), "Q?\n\nA) a\nB) b", "B"),
}


@pytest.mark.parametrize("name", list(HUB))
def test_rows_of_the_hub(name, monkeypatch):
    import datasets
    row, problem, answer = HUB[name]
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or datasets.Dataset.from_list([row]))
    got, = data.load_problems(name, "test")
    assert (got["problem"], got["answer"]) == (problem, answer)
    assert asked == [((data.SETS[name]["test"][1:3]), dict(split=data.SETS[name]["test"][3]))]
    assert bool(got.get("n_choices")) == (name in ("arc_c", "mmlu_pro"))


def test_rows_of_the_hub_for_training_and_gpqa(monkeypatch):
    import datasets
    rows = [dict(problem="A", answer="1", solution="s", level=level) for level in ("Level 2", "Level 5")]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: rows)
    assert data.load_problems("math", "train") == [dict(problem="A", answer="1", solution="s")]
    assert data.load_problems("deepscaler", "train") == 2 * [dict(problem="A", answer="1", solution="s")]
    rows = [dict(prompt=[dict(role="system", content="S"), dict(role="user", content="P")],
                 target=[dict(role="assistant", content="T")], reward_model=dict(ground_truth="5", style="rule"))]
    assert data.load_problems("openr1-math-46k-8192", "train") == [dict(problem="P", answer="5", solution="T")]
    rows = [{"Question": f"Q{i}", "Correct Answer": "right\n", **{f"Incorrect Answer {k}": f"w{k}" for k in (1, 2, 3)}}
            for i in range(50)]
    got = data.load_problems("gpqa_diamond", "test")
    assert got == data.load_problems("gpqa_diamond", "test") and {r["answer"] for r in got} == set("ABCD")
    for row in got:
        assert f"{row['answer']}) right" in row["problem"] and row["problem"].count(")") == 4


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the problem sets in ../shared/data")
def test_sets_of_a_folder():
    sizes = {name: len(data.load_problems(name, split, data_dir=str(DATA))) for name, split in (
        ("aime24", "test"), ("aime25", "test"), ("amc23", "test"), ("amc83", "test"), ("math500", "test"),
        ("minerva_math", "test"), ("olympiadbench", "test"), ("gsm8k", "train"), ("math", "train"), ("arc_c", "test"))}
    assert sizes == dict(aime24=30, aime25=30, amc23=40, amc83=83, math500=500, minerva_math=272, olympiadbench=675,
                         gsm8k=7473, math=8886, arc_c=1172)
    train = data.load_problems(str(DATA / "aime_1983_2023.jsonl"), "train")
    kept, dropped = data.drop_evaluated(train, "aime_1983_2023.jsonl", str(DATA), [])
    assert dropped == 4 == len(train) - len(kept)  # the four that are in MATH-500


def test_training_problems_that_are_evaluated_are_dropped():
    rows = [dict(problem=p, answer="1") for p in ("Find  $x$.", "find $y$", "Find $z$")]
    kept, dropped = data.drop_evaluated(rows, "mine.jsonl", None, [dict(problem="Find $X$."), dict(problem="Find\n$y$")])
    assert kept == rows[2:] and dropped == 2


def test_a_file_of_another_encoding_is_refused(tmp_path, capsys):
    (tmp_path / "latin.jsonl").write_bytes('{"problem": "a", "answer": "1"}\n{"problem": "b", "answer": "1½"}\n'.encode("latin-1"))
    with pytest.raises(SystemExit) as e:
        data.load_problems(str(tmp_path / "latin.jsonl"), "test")
    assert e.value.code == 2 and "latin.jsonl, line 2: not UTF-8" in capsys.readouterr().err
    (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"problem": "a", "answer": 1}\n')
    assert data.load_problems(str(tmp_path / "bom.jsonl"), "test") == [dict(problem="a", answer="1")]


@pytest.mark.parametrize("few_shot", [5, "ab", ((1, 2),), (("q",),)])
def test_few_shot_that_is_no_list_of_pairs_is_refused(few_shot, capsys):
    with pytest.raises(SystemExit) as e:
        data.encode_prompts(None, [], "arithmetic", few_shot=few_shot)
    assert e.value.code == 2 and "few_shot: " in capsys.readouterr().err
