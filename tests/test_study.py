"""bench/study.py: two methods with two seeds, of tiny size; stopped, and gone on."""
import json
import shutil

import numpy as np
import pytest
import study


def test_the_difference_is_paired_and_its_interval_is_over_seeds_and_problems():
    rng = np.random.default_rng(1)
    hard, seed = rng.random(400), rng.normal(size=(6, 1)) / 5  # what both methods share
    theirs = (hard + seed + rng.normal(size=(6, 400)) / 20 > 0.5).astype(float)
    ours = (hard + seed + 0.1 + rng.normal(size=(6, 400)) / 20 > 0.5).astype(float)
    (mean, low, high), error = study.difference(ours, theirs)
    assert mean == pytest.approx((ours - theirs).mean()) and 0 < low < mean < high < 0.2
    assert error == pytest.approx((high - low) / 3.92, rel=0.1)
    of_seeds = np.array([[0.0], [1.0]] * 3).repeat(400, 1)  # all the variance is between seeds
    assert study.difference(of_seeds, 0 * of_seeds)[1] == pytest.approx(0.5 / 6**0.5, rel=0.05)


def test_two_methods_and_two_seeds(run, tmp_path):
    flags = ("bench/study.py", "--grounds=pairs", "--methods=grpo,nthr", f"--out_dir={tmp_path}",
             "--problems=16", "--sampled_problems=8", "--extra=--max_steps=1 --eval_every=0 "
             "--prompts_per_step=6 --prompts_per_update=6 --eval_problems=2")
    done = run(*flags, "--seeds=0")
    assert "1 runs left" in done.stdout
    shutil.rmtree(tmp_path / "pairs" / "nthr_0")  # as if it had been stopped before
    done = run(*flags, "--seeds=0,1")
    assert done.stdout.count("train.py config/quickstart.py") == 3
    rows, gains = json.loads((tmp_path / "pairs.json").read_text())
    assert [row[:2] for row in rows[1:]] == [["before", ""], ["grpo", "2"], ["nthr", "2"]]
    assert [row[:2] for row in gains[1:]] == [["nthr", "2"]]
    files = [path for path in tmp_path.glob("pairs_eval/**/*_n1_t0.jsonl") if "nthr" in str(path)]
    greedy = [json.loads(line)["correct"][0] for path in files
              for line in path.read_text().splitlines()[1:]]
    assert rows[3][2] == f"{100 * np.mean(greedy):.1f}" and len(greedy) == 32
    assert (tmp_path / "pairs.png").stat().st_size > 10_000
