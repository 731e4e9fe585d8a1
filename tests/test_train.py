"""train.py and eval.py as users run them: whole runs, resumed runs, two ranks, bad input."""
import json
import re
import runpy
import signal
import subprocess
import sys

import rollout

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import judge
from metrics import step_line
from runs import read_rows

SMALL = ("config/quickstart.py", "--prompts_per_step=2", "--prompts_per_update=1", "--oversample=4",
         "--max_rounds=8", "--tokens_per_micro_batch=200", "--eval_problems=8", "--variant=grpo",
         "--compute_dtype=float32", "--rollout_dtype=float32")
KEYS = """
    reward/accuracy reward/mean rollout/groups_sampled rollout/groups_kept rollout/response_tokens
    rollout/tokens_dropped rollout/prompts_wasted rollout/mean_length rollout/truncated train/lr
    train/loss train/entropy train/tokens train/grad_norm train/clip_fraction train/kl_old gap/mean
    gap/max gap/importance time/rollout time/sleep time/judge time/old_policy time/update time/sync
    time/step perf/rollout_tok_s perf/train_tok_s perf/peak_memory_gib""".split()


def steps(out):
    return [row for row in read_rows(out) if "train/loss" in row]


def weights(out, step):
    return load_file(out / f"step_{step:06d}" / "model.safetensors")


def figures(out):
    """Metrics less what a clock or a process's memory decides."""
    varies = ("time/", "perf/", "rollout/prompts_wasted")  # the last one: on a GPU
    return [{k: v for k, v in r.items() if not k.startswith(varies)} for r in read_rows(out)]


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """A run of two steps, checkpointed every step."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    args = ("train.py", *SMALL, "--max_steps=2", "--eval_every=1", "--keep_ckpts=3",
            "--demos=self", "--anchors=2")
    return out, args, run(*args, f"--out_dir={out}").stdout


def test_a_run_leaves_what_it_promises(whole):
    out, _, printed = whole
    assert [row["step"] for row in read_rows(out)] == [0, 1, 1, 2, 2]
    assert [row["step"] for row in steps(out)] == [1, 2]
    for row in steps(out):
        assert row.keys() >= set(KEYS)
        assert 0 < row["gap/max"] < 1e-2  # sampled from the weights the step before left
        assert row["rollout/groups_kept"] == 2 and row["train/grad_norm"] > 0
        assert row["reward/mean"] == pytest.approx(row["reward/accuracy"])  # of all that is sampled
        # the first update moves the correct responses of the second
        assert abs(row["displacement/mean"]) > 1e-5 and 0 <= row["displacement/fell"] <= 1
        assert len(step_line(row | {"step": 9_999}, 9_999)) <= 120 and step_line(row, 2) in printed
    samples = read_rows(out, "samples")
    assert [s["step"] for s in samples] == [1, 1, 2, 2]
    answers = [(r["problem"], r["solution"], r["step"]) for r in read_rows(out, "right_answers")]
    for s in samples:
        right = [text for text, reward in zip(s["responses"], s["reward"]) if reward]
        assert {(s["problem"], text, s["step"]) for text in right[:2]} <= {*answers}
        assert [a > 0 for a in s["advantage"]] == [r == 1 for r in s["reward"]]
        assert len(s["responses"]) == len(s["truncated"]) == 4 and s["score"] == [None] * 4
        # of every token what a page can show
        assert "".join(s["tokens"]).startswith(s["responses"][0])
        wanted = np.repeat(s["advantage"], s["lengths"])
        assert s["token_advantage"] == pytest.approx(wanted, abs=1e-4)
        assert max(s["logp"]) <= 0 <= min(s["entropy"]) and len(s["logp"]) == len(wanted)
    assert (out / "curves.png").stat().st_size > 10_000
    assert sorted(p.name for p in out.glob("step_*")) == ["step_000001", "step_000002"]
    assert not torch.equal(*(weights(out, step)["model.norm.weight"] for step in (1, 2)))


@pytest.mark.slow
def test_eval_of_a_run_gives_the_accuracy_of_its_evaluations(whole, run, monkeypatch):
    """Every checkpoint in turn through one engine, on its run's problems and with its prompt."""
    out, *_ = whole
    printed = run("eval.py", f"--ckpt={out}").stdout
    results = json.loads((out / "eval" / "results.json").read_text())
    assert [r["model"] for r in results] == ["step_000001", "step_000002"]
    wanted = [row["eval/accuracy"] for row in read_rows(out) if "eval/accuracy" in row]
    assert [r["figures"]["accuracy"][0] for r in results] == wanted[1:]
    table = (out / "eval" / "results.md").read_text()
    assert table in printed and "| model | figure | addition |" in table
    # what is there is not done again, by no engine
    monkeypatch.setattr(rollout, "build_engine", None)
    monkeypatch.setattr("sys.argv", ["eval.py", f"--ckpt={out}"])
    runpy.run_path("eval.py", run_name="__main__")
    assert json.loads((out / "eval" / "results.json").read_text()) == results


@pytest.mark.slow
def test_a_stopped_run_saves_and_its_resume_gives_the_same_metrics(whole, run):
    """SIGTERM ends it after its step; then a row is cut off, as by a kill."""
    out, args, _ = whole
    cut = out.parent / "cut"
    with subprocess.Popen([sys.executable, *args, f"--out_dir={cut}"], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        next(line for line in process.stdout if line.startswith("step 1/2"))
        process.send_signal(signal.SIGTERM)
        rest, errors = process.communicate()
    assert process.returncode == 143 and "Traceback" not in errors
    assert re.search(r"stopped by signal 15 after step ([12]); .*step_00000\1'[^\n]*\n$", rest)
    with open(cut / "metrics.jsonl", "a") as f:
        f.write('{"step": 2, "eval/acc')
    (cut / "step_000003.tmp").mkdir()
    run(*args, f"--out_dir={cut}", "--resume")
    assert figures(cut) == figures(out)
    for name in ("samples", "right_answers"):
        assert read_rows(cut, name) == read_rows(out, name)
    again = weights(cut, 2)
    assert all(torch.equal(p, again[name]) for name, p in weights(out, 2).items())


@pytest.mark.slow
def test_two_ranks(run, tmp_path, small):
    """An engine a rank. DDP on two machines that share no folder; its checkpoint is resumed by
    FSDP2 on one, as another variant."""
    near, far = tmp_path / "near", tmp_path / "far"
    args = ("train.py", *SMALL, f"--model={small}", "--eval_every=0", "--kl_coef=0.01",
            "--lora_rank=4", "--anchors=1", "--dataset=sums", "--max_response_tokens=48")
    run(*args, "--variant=nthr", "--max_steps=1", "--tis_cap=2",
        nodes=([f"--out_dir={near}"], [f"--out_dir={far}"]))
    assert list(far.iterdir()) == []  # the first machine's rank 0 writes
    run(*args, f"--out_dir={near}", "--max_steps=2", "--parallel=fsdp", "--resume",
        "--variant=dagrpo", "--eval_every=1", ranks=2)
    # step 1 keeps its evaluation, and has no second one
    assert [row["step"] for row in read_rows(near) if "eval/accuracy" in row] == [1, 2]
    first, second = steps(near)
    for row in (first, second):
        assert 0 < row["gap/max"] < 1e-2 and abs(row["gap/importance"] - 1) < 1e-3
        assert row["train/kl"] > 0 and row["train/grad_norm"] > 0 and "displacement/mean" in row
    assert first["gap/importance_cut"] == 0 and 0 <= first["nthr/eta"] <= 1
    assert second["rollout/anchor_share"] == 1 and second["rollout/groups_kept"] == 2
    assert second["anchor/logp"] < 0 < second["anchor/entropy"] and second["anchor/age"] is None
    # every response has the score that is its own, whichever rank judged it
    samples = [s for s in read_rows(near, "samples") if s["step"] == 2]
    assert [s["is_anchor"] for s in samples] == [[False] * 3 + [True]] * 2
    for s in samples:
        row = s | {"solution": s["responses"][-1]}
        scores = [judge.rubric_score(row, *of_response) for of_response in
                  zip(s["responses"], s["reward"], s["truncated"])]
        assert s["score"] == pytest.approx(scores)
    assert weights(near, 1).keys() == weights(near, 2).keys() >= {"model.norm.weight"}


# bad input, refused before anything is loaded
GOOD = '{"problem": "1 + 1", "answer": "2"}\n'
FILES = {"empty": "", "good": GOOD, "long": GOOD + GOOD.replace("1 +", "1 + " * 9000),
         "wrong": '{"problem": "10 + 10", "solution": "y"}', "x.safetensors": "cut off",
         "mine.py": "def rows(split):\n    return 1 / 0\ndef ask(row):\n    return 'x'\n",
         "solved": '{"problem": "1 + 1", "answer": "2", "solution": "\\\\boxed{2}"}'}
REFUSED = """
train.py --eval_dataset=nowhere.jsonl            eval_dataset: there is no file nowhere.jsonl
train.py --dataset=DIR/empty                     has no rows
train.py --dataset=DIR/long                      problem 2, '1 + 1
train.py --dataset=DIR/good --eval_dataset=DIR/good  are in an evaluation set
train.py --dataset=DIR/mine.py:rows              mine.py:rows, line 2: ZeroDivisionError
train.py --dataset=DIR/good --prompt=DIR/mine.py:ask  mine.py:ask: TypeError
train.py --dataset=math500                       no file math500; train sets are
train.py --dataset=math --data_dir=config        math_lvl3to5_12k_split.jsonl
train.py --model=models/nowhere                  models/nowhere
train.py --prompts_per_update=3                  prompts_per_update
train.py --nthr_beta=inf                         nthr_beta
train.py --dataset=DIR/good --max_response_tokens=100000            context
train.py --variant=dagrpo                        has a solution
train.py --learning_rate=1e30                   1e+30 is not <= 0.01
train.py --weight_decay=2                        weight_decay: 2.0 is not <= 1
train.py --lora_rank=-1                          lora_rank: -1 is not >= 0
train.py --max_gap=0                             max_gap: 0 is not > 0
train.py --seq_mask_cap=0.5                      seq_mask_cap: 0.5 is not >= 1
train.py --llds=0.2                              llds: is always 0 with one update a step
train.py --delta=9.5                             delta: 9.5
train.py --delta=q1.5                            delta: 'q1.5' is neither points nor a share
train.py --anchors=8 --demos=self                anchors: 8 is not less than group_size=8
train.py --demos=DIR/good                        anchors: 0
train.py DIR/good                                good' is neither a --flag nor a config file
train.py --reward=DIR/mine.py:rows               mine.py:rows does not take (text, row)
train.py --temperature=0.001                     temperature: 0.001 is not >= 0.01
train.py --anchor_share=1.5                      anchor_share: 1.5 is not <= 1
train.py --judge_noise=-1                        judge_noise: -1.0 is not >= 0
train.py --judge=gpt-4o                          neither rubric nor random nor an address
train.py --variant=dagrpo --demos=nowhere        demos: cannot read nowhere
train.py --anchors=1 --demos=DIR/good            good, line 1: 'solution' is missing
train.py --anchors=1 --demos=DIR/wrong           all 1 demonstrations are wrong
train.py --anchors=1 --dataset=DIR/solved --max_response_tokens=3  are longer than
train.py --variant=dagrpo --dataset=DIR/solved --judge=http://127.0.0.1:9  9 does not answer
train.py --tp=2                                  tp: 2 is not a divisor of 1, the ranks
train.py --resume --out_dir=DIR                  no whole checkpoint
train.py --out_dir=DIR/empty                     out_dir
train.py --out_dir=DIR/empty/x                   out_dir
eval.py --ckpt=DIR                               neither a whole model
eval.py --ckpt=MODEL,of/the_hub                  a hub id is evaluated by itself
eval.py --ckpt=MODEL --data=arithmetic,nowhere   there is no file nowhere
eval.py --n_of=('aime24',32)                     n_of: 'aime24' is none of tuple
eval.py --n_of=(('aime24',),)                    n_of: ('aime24',) is not a set and a number
eval.py --chkpt=x                                'ckpt'
eval.py --compare                                --compare needs a value
eval.py --ckpt=MODEL --n=4                       n: 4
eval.py --ckpt=MODEL --temperature=-1            temperature: -1
lld.py --variants=('grpo','gpro')                variants: 'gpro'
lld.py --group_size=1                            group_size: 1
lld.py --split=valid                             split: 'valid'"""


@pytest.mark.parametrize("case", REFUSED.split("\n")[1:])
def test_bad_input(case, refused, tmp_path, model_dir):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    command, words = re.split("  +", case)
    command = command.replace("DIR", str(tmp_path)).replace("MODEL", model_dir)
    assert words in refused(*command.split())


@pytest.mark.slow
def test_bad_input_of_a_process(run, tmp_path):
    (tmp_path / "long").write_text(FILES["long"])
    done = run("train.py", f"--dataset={tmp_path}/long", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
