"""bench/study.py: its intervals, and the whole of it at a tiny size."""
import json
import os
import signal
import subprocess
import sys

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
    assert study.difference(of_seeds, 0 * of_seeds)[1] == pytest.approx(0.3**0.5 / 6**0.5, rel=0.05)


@pytest.mark.slow
def test_two_methods_and_two_seeds_killed_and_taken_up_again(run, tmp_path):
    """The second call makes what is missing; the lines that it leaves give the tables."""
    extra = ("--max_steps=1 --prompts_per_step=4 --prompts_per_update=4 --group_size=8 "
             "--eval_every=0 --eval_problems=4 --learning_rate=1e-4")
    args = ("bench/study.py", "--grounds=pairs", "--problems=12", "--sampled_problems=6",
            f"--out_dir={tmp_path}/out", f"--results={tmp_path}", f"--extra={extra}",
            "--methods=grpo,nthr", "--seeds=0,1")
    with subprocess.Popen([sys.executable, *args], stdout=subprocess.PIPE, text=True,
                          start_new_session=True) as process:
        next(line for line in process.stdout if "3 runs left" in line)
        os.killpg(process.pid, signal.SIGKILL)
    printed = run(*args).stdout
    assert printed.count("train.py config/quickstart.py") == 3 and "0 runs left" in printed
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("before", 0), ("grpo", 0), ("nthr", 0), ("grpo", 1), ("nthr", 1)]
    for row in rows:
        assert len(row["greedy"]) == 12 and len(row["pass@8"]) == 6
    of = {(row["method"], row["seed"]): row for row in rows}
    gain = 100 * np.mean([np.subtract(of["nthr", s]["pass@1"], of["grpo", s]["pass@1"])
                          for s in (0, 1)])
    tables = (tmp_path / "out" / "pairs.md").read_text()
    assert f"| {gain:+.2f} (" in tables
    change = np.array([np.subtract(*(np.array(row["ln p of right"], float)
                                     for row in (of["nthr", s], of["before", 0]))) for s in (0, 1)])
    known = change[~np.isnan(change)]
    assert np.abs(known).max() > 1e-3
    [row] = [line for line in tables.splitlines() if line.startswith("| nthr | 2 |")][:1]
    assert f"| {known.mean():.2f} | {100 * np.mean(known < 0):.1f} |" in row
