"""eval.py: statistics against enumeration, tables, files of responses, comparisons, bad input."""
import importlib
import itertools
import json
import math

import numpy as np
import pytest
from safetensors.numpy import save_file

from data import Group, load_tokenizer
from plot import plot_curves, plot_steps
from runs import kept_rows, write_jsonl

evaluation = importlib.import_module("eval")
GIVEN = {"top_p": 1.0, "seed": 0}


def test_statistics():
    pass_at_k, majority, mcnemar = evaluation.pass_at_k, evaluation.majority, evaluation.mcnemar
    for correct in [[1] * right + [0] * wrong for right in range(5) for wrong in range(5)]:
        for k in range(1, len(correct) + 1):  # the mean over all subsets of k
            solved = [any(some) for some in itertools.combinations(correct, k)]
            assert pass_at_k(correct, k) == pytest.approx(np.mean(solved))
    assert majority(["7", "7", "8"], [1, 1, 0]) == 1 and majority(["7", "8", "8"], [1, 0, 0]) == 0
    assert majority(["7", "8"], [1, 0]) == 0.5  # a tie
    assert majority([None, None, "7"], [0, 0, 1]) == 1 and majority([None], [0]) == 0  # no vote
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1 and mcnemar(1, 9) == pytest.approx(22 / 2**10)
    values, error = [1.0] * 30 + [0.0] * 70, 1.96 * math.sqrt(0.3 * 0.7 / 100)
    assert evaluation.bootstrap([values]) == pytest.approx((0.3 - error, 0.3 + error), abs=0.015)
    low, high = evaluation.bootstrap([values, [1.0] * 10])  # of the second nothing is uncertain
    assert (low, high) == pytest.approx((0.65 - error / 2, 0.65 + error / 2), abs=0.01)


def test_a_hand_made_set(tmp_path):
    saved, tokens = [], [np.arange(10 + i) for i in range(4)]
    for boxes, right, cut in (("1 1 2 1", [1, 1, 0, 1], False), ("9 9 9 9", [0, 0, 0, 0], True),
                              ("5 4 4 \\frac{8}{2}", [1, 0, 0, 0], False)):
        texts, reward = [f"\\boxed{{{box}}}" for box in boxes.split()], np.array(right, float)
        cut = np.full(4, cut)
        group = Group({}, None, tokens, None, texts, cut, reward, reward < 0, reward)
        saved.append(evaluation.graded_row(group))
    path, settings = str(tmp_path / "set_n4_t0.5.jsonl"), {"n": 4, "weights": {"a": 1.25}}
    write_jsonl(path, [settings, *saved])
    s = evaluation.summarize(kept_rows(path, settings))
    assert kept_rows(path, settings | {"n": 3}) is None  # and keeps the file aside
    assert [p.name for p in tmp_path.iterdir()] == ["set_n4_t0.5.jsonl.old_1"]
    assert s["accuracy"] == pytest.approx(4 / 12) and s["by_problem"] == [0.75, 0, 0.25]
    assert s["length"] == pytest.approx(11.5) and s["truncated"] == pytest.approx(1 / 3)
    assert s["pass@2"] == pytest.approx((1 + 1 / 2 + 0) / 3) and s["pass@4"] == pytest.approx(2 / 3)
    assert s["maj@4"] == pytest.approx(1 / 3)  # 4 wins the third, cut-off responses have no vote
    assert s["intervals"]["accuracy"] == evaluation.bootstrap([s["by_problem"]])


def test_tables_and_pictures(tmp_path):
    def result(model, data, solved):
        rows = [dict(correct=[i < solved], length=[12], truncated=[0]) for i in range(10)]
        return dict(model=model, data=data, n=1, temperature=1) | evaluation.summarize(rows)

    sets = evaluation.PROTOCOLS["dagrpo"]["data"].split(",")
    results = [result("step_000001", s, x) for s, x in zip(sets, (0, 1, 5, 3, 2, 1, 9, 5, 7))]
    line = "| arc_c | 10 x 1 | 1 | accuracy 90.0 (70.0 to 100.0) | 12.0 | 0.0% |"
    assert line in evaluation.results_table(results)
    results += [result("step_000002", s, 10) for s in sets]
    head, _, first, second = evaluation.protocol_table(results).splitlines()  # a row a model
    assert head == f"| model | {' | '.join(sets)} | Avg | OOD Avg |"
    assert first.startswith("| step_000001 | 0.0 (0.0 to 0.0) | 10.0 (0.0 to 30.0) | 50.0 (")
    assert [cell.split()[0] for cell in first.split(" | ")[-2:]] == ["20.0", "70.0"]
    assert second.count("100.0 (100.0 to 100.0)") == 11
    plot_steps(results, tmp_path / "accuracy.png")
    write_jsonl(str(tmp_path / "metrics.jsonl"), [{"step": 1, "time/step": 2.5, "x": None}])
    plot_curves(tmp_path)
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("accuracy", "curves"))


def test_a_run_is_asked_as_it_was_trained(tmp_path, model_dir):
    for name in ("step_000002", "step_000010", "step_000020"):
        (tmp_path / "run" / name).mkdir(parents=True)
        save_file({"x": np.zeros(3)}, tmp_path / "run" / name / "model.safetensors")
    (tmp_path / "run" / name / "model.safetensors").write_bytes(b"cut off")
    found = evaluation.find_models(str(tmp_path / "run"))
    assert [folder[-6:] for folder in found] == ["000002", "000010"]  # not the broken one
    assert found == evaluation.find_models(str(tmp_path))  # a folder of runs
    assert evaluation.find_models("a/b") == {"a/b": None}
    run = dict(dataset="sums", eval_problems=5, system_prompt="Hi", max_response_tokens=33)
    (tmp_path / "run_config.json").write_text(json.dumps(run | dict(temperature=1.0)))
    model, (tokenizer, _) = {"ckpt": str(tmp_path)}, load_tokenizer(model_dir)
    [(own, _, _, prompts)] = evaluation.plan(model, tokenizer, 8192, GIVEN)
    assert own["data"] == "sums" and "Hi" in tokenizer.decode(prompts[0]) and len(prompts) == 5
    assert own["max_response_tokens"] == 33 and own["temperature"] == 0 and own["n"] == 1
    given = GIVEN | dict(data="arithmetic,sums", temperature=0.5, max_response_tokens=10**6)
    one, four = evaluation.plan(model, tokenizer, 8192, given | dict(n_of={"sums": 4}))
    assert one[0]["n"] == 1 and four[0]["n"] == 4 and len(one[-1]) == 128
    assert one[0]["max_response_tokens"] == 8192 - max(map(len, one[-1]))


def test_comparisons(tmp_path, capsys):
    def file(name, correct, start=0):
        rows = [dict(problem=f"p{i}", correct=c) for i, c in enumerate(correct, start)]
        write_jsonl(f"{tmp_path}/{name}", [{}, *rows])
        return f"{tmp_path}/{name}"

    a, b = file("a", [[0]] * 9 + [[1]] * 11), file("b", [[1]] * 9 + [[0]] + [[1]] * 10)
    evaluation.compare_files(a, b)
    out = capsys.readouterr().out
    assert "20 problems in both: first 55.0%, second 95.0%\ndifference +40.0%, 95% +" in out
    assert "(1, 9), McNemar's exact p = 0.0215" in out
    evaluation.compare_files(a, file("c", [[0, 1]] * 10, start=16))
    assert "4 problems" in (out := capsys.readouterr().out) and "McNemar" not in out
    cases = [("expected 2", a), ("No such file", a, "none"), ("JSON", a, __file__)]
    for words, *paths in cases + [("in both", a, file("other", [[1]], 99))]:
        with pytest.raises(SystemExit, match="2"):
            evaluation.compare_files(*paths)
        assert words in capsys.readouterr().err


def test_bad_input_is_refused(refused, model_dir):
    for flag, words in (("--n=4", "n: 4"), ("--temperature=-1", "temperature=-1")):
        assert words in refused("eval.py", f"--ckpt={model_dir}", flag)
