"""eval.py: statistics against enumeration, tables, files of responses, comparisons, bad input."""
import importlib
import itertools
import json
import math
import runpy

import numpy as np
import pytest
from safetensors.numpy import save_file

from data import load_tokenizer
from runs import write_jsonl

evaluation = importlib.import_module("eval")
GIVEN = {"seed": 0, "temperature": 0.0}


def test_statistics():
    pass_at_k = evaluation.pass_at_k
    for correct in [[1] * right + [0] * wrong for right in range(5) for wrong in range(5)]:
        for k in range(1, len(correct) + 1):  # the mean over all subsets of k
            solved = [any(some) for some in itertools.combinations(correct, k)]
            assert pass_at_k(correct, k) == pytest.approx(np.mean(solved))
    values, error = [1.0] * 30 + [0.0] * 70, 1.96 * math.sqrt(0.3 * 0.7 / 100)
    want = (0.3, 0.3 - error, 0.3 + error)
    assert evaluation.bootstrap([values]) == pytest.approx(want, abs=0.015)
    want = (0.65, 0.65 - error / 2, 0.65 + error / 2)  # of the second nothing is uncertain
    assert evaluation.bootstrap([values, [1.0] * 10]) == pytest.approx(want, abs=0.01)


def test_a_hand_made_set(tmp_path):
    saved = [dict(correct=right, length=[10, 11, 12, 13], truncated=[cut] * 4)
             for right, cut in (([1, 1, 0, 1], False), ([0, 0, 0, 0], True), ([1, 0, 0, 0], False))]
    path, settings = str(tmp_path / "set_n4_t0.5.jsonl"), {"n": 4, "weights": {"a": 1.25}}
    write_jsonl(path, [settings, *saved])
    s = evaluation.summarize(evaluation.kept_rows(path, settings))
    assert evaluation.kept_rows(path, settings | {"n": 3}) is None  # and keeps the file aside
    assert [p.name for p in tmp_path.iterdir()] == ["set_n4_t0.5.jsonl.old_1"]
    assert s["of_problems"]["accuracy"] == [0.75, 0, 0.25]
    means = {name: mean for name, (mean, *_) in s["figures"].items()}
    assert means == pytest.approx({"accuracy": 4 / 12, "pass@2": (1 + 1 / 2 + 0) / 3,
                                   "pass@4": 2 / 3, "length": 11.5, "truncated": 1 / 3})
    assert s["figures"]["accuracy"] == evaluation.bootstrap([[0.75, 0, 0.25]])


def test_tables():
    def result(model, data, solved):
        rows = [dict(correct=[i < solved], length=[12], truncated=[0]) for i in range(10)]
        return dict(model=model, data=data) | evaluation.summarize(rows)

    sets = runpy.run_path("config/eval_dagrpo.py")["data"].split(",")
    results = [result("step_000001", s, x) for s, x in zip(sets, (0, 1, 5, 3, 2, 1, 9, 5, 7))]
    results += [result("step_000002", s, 10) for s in sets]
    results += evaluation.averages(results)
    head, _, *lines = evaluation.results_table(results).splitlines()  # a row a model and figure
    assert head == f"| model | figure | {' | '.join(sets)} | Avg | OOD Avg |"
    assert lines[0].startswith("| step_000001 | accuracy | 0.0 (0.0 to 0.0) | 10.0 (0.0 to 30.0) |")
    assert [cell.split()[0] for cell in lines[0].split(" | ")[-2:]] == ["20.0", "70.0"]
    assert lines[1].startswith("| step_000001 | length | 12.0 (12.0 to 12.0) | ")
    assert lines[3].count("100.0 (100.0 to 100.0)") == 11 and len(lines) == 6


def test_a_run_is_asked_as_it_was_trained(tmp_path, model_dir, monkeypatch):
    for name in ("step_000002", "step_000010", "step_000020"):
        (tmp_path / "run" / name).mkdir(parents=True)
        save_file({"x": np.zeros(3)}, tmp_path / "run" / name / "model.safetensors")
    (tmp_path / "run" / name / "trainer_state.json").write_text('{"files": {"config.json": ""}}')
    found = evaluation.find_models(str(tmp_path / "run"))
    assert [folder[-6:] for folder in found] == ["000002", "000010"]  # not the broken one
    assert found == evaluation.find_models(str(tmp_path))  # a folder of runs
    assert evaluation.find_models("a/b") == {"a/b": None}
    mine = tmp_path / "mine.py"
    mine.write_text("import functools\n@functools.cache\ndef score(text, row):\n    return 1\n")
    run = dict(dataset="sums", eval_problems=5, system_prompt="Hi", max_response_tokens=33,
               reward=f"{mine}:score", reward_seconds=5.0, prompt=None)
    (tmp_path / "run_config.json").write_text(json.dumps(run | dict(temperature=1.0)))
    (tmp_path / "trainer_state.json").write_text("{}")
    model, (tokenizer, _) = {"ckpt": str(tmp_path)}, load_tokenizer(model_dir)
    [(own, _, _, prompts)] = evaluation.plan(model, tokenizer, 8192, GIVEN)
    assert own["data"] == "sums" and "Hi" in tokenizer.decode(prompts[0]) and len(prompts) == 5
    assert own["max_response_tokens"] == 33 and own["temperature"] == 0 and own["n"] == 1
    assert own["reward"] == f"{mine}:score" and own["reward_seconds"] == 5
    assert own["dtype"] == "auto"
    mine.write_text("def score(text, row):\n    return 0\n")
    [(changed, *_)] = evaluation.plan(model, tokenizer, 8192, GIVEN)
    assert own == changed | {"crc32": own["crc32"]} != changed
    given = GIVEN | dict(data="arithmetic,sums", temperature=0.5, max_response_tokens=10**6)
    monkeypatch.setattr(evaluation, "n_of", (("sums", 4),))
    one, four = evaluation.plan(model, tokenizer, 8192, given)
    assert one[0]["n"] == 1 and four[0]["n"] == 4 and len(one[-1]) == 128
    assert one[0]["max_response_tokens"] == 8192 - max(map(len, one[-1]))


def test_comparisons(tmp_path, capsys, dies):
    def file(name, correct, start=0):
        rows = [dict(problem=f"p{i}", correct=c) for i, c in enumerate(correct, start)]
        write_jsonl(f"{tmp_path}/{name}", [{}, *rows])
        return f"{tmp_path}/{name}"

    a, b = file("a", [[0]] * 9 + [[1]] * 11), file("b", [[1]] * 9 + [[0]] + [[1]] * 10)
    evaluation.compare_files(a, b)
    out = capsys.readouterr().out
    assert "20 problems in both: first 55.0%, second 95.0%\ndifference +40.0%, 95% +" in out
    evaluation.compare_files(a, file("c", [[0, 1]] * 10, start=16))
    assert "4 problems" in capsys.readouterr().out
    cases = [("expected 2", a), ("No such file", a, "none"), ("JSON", a, __file__)]
    for words, *paths in cases + [("in both", a, file("other", [[1]], 99))]:
        dies(words, evaluation.compare_files, *paths)
