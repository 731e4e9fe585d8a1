"""Do the methods train better than GRPO? Every method with every seed, and tables with intervals.

    python bench/study.py                                             all of it; it can be stopped
    python bench/study.py --grounds=steps --methods=grpo,nthr --seeds=0,1       a part
    python bench/study.py --grounds=anchors --methods=grpo,dagrpo,anchor_share=0.25       [DaGRPO]
    python bench/study.py --train=False                               tables of the runs there are

A run is one `train.py` with its own folder, out/study/GROUND_START/METHOD_SEED; one that was
stopped goes on. A seed is one data order and sampling for all methods, so differences are paired.
After all runs one engine asks their last checkpoints problems that no run has met, greedily, and 8
times at temperature 1, and the log-likelihood of the start model's own right answers is taken: what
[NTHR] says a penalty on wrong answers takes away. All that a table needs of a run is then a line of
docs/study/GROUND.jsonl, and the run is not made again. Files of several machines can be joined;
START is a checksum of the start model's weights: only runs from the same ones are compared.

Intervals: 95%, bootstrap over seeds and problems together: problems are drawn anew, the same ones
for both methods, and one seed fewer than there are, whose mean then varies as that of all seeds
does. Where seeds differ more than problems, three of them still give too narrow an interval. With
one seed it says nothing of another seed.
"""
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

ENVIRONMENT = dict(os.environ)  # of the runs: what rollout and torch add is of this process
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rollout  # before torch, whose threads it sets

import numpy as np
import torch

import model_utils
import runs
from configurator import check, configure, die
from data import STYLES, Group, encode_prompts, load_problems, load_tokenizer
from eval import pass_at_k, table
from plot import plot_runs
from runs import check_folder, checksum, newest_checkpoint, write_jsonl, write_whole

grounds = "steps,pairs,late"  # of GROUNDS, with commas
methods = ""                  # of METHODS, with commas; "": those of FIRST
seeds = "0,1,2,3,4"
train = True                  # make the runs that are missing; False: only the tables
problems = 512                # asked greedily
sampled_problems = 128        # the first of them, asked 8 times at temperature 1
against = "grpo"              # the method that the others are compared with
out_dir = "out/study"         # of runs and pictures
results = "docs/study"        # of what is kept
extra = ""                    # more flags of train.py, with spaces; known runs are not made again

FIRST = ["grpo", "pos_only", "random", "nthr"]
METHODS = {
    "grpo": ["--variant=grpo"],
    "pos_only": ["--variant=pos_only"],
    "random": ["--variant=random"],
    "nthr": ["--variant=nthr"],
    "nthr_eta_0": ["--variant=nthr", "--nthr_eta=0.0"],
    "nthr_eta_1-p": ["--variant=nthr", "--nthr_eta=1-p"],
    "nthr_beta_0": ["--variant=nthr", "--nthr_beta=0.0"],
    "dagrpo": ["--variant=dagrpo"],
    "thr_0.1": ["--variant=thr", "--thr_p=0.1"],
    "thr_0": ["--variant=thr", "--thr_p=0.0"],
    "thr_-0.1": ["--variant=thr", "--thr_p=-0.1"],
    "nsr": ["--advantage_norm=sign", "--pos_weight=0.0", "--loss_norm=token"],
    "w_reinforce": ["--advantage_norm=sign", "--pos_weight=0.1", "--loss_norm=token"],
    "llds": ["--llds=0.2"],
    "gspo": ["--loss=gspo", "--loss_norm=response", "--clip_low=3e-4", "--clip_high=4e-4"],
}
# DaGRPO's own questions: how many anchors, how good a judge, which threshold
DAGRPO = dict(anchor_share=(0.0, 0.25, 0.5), judge_noise=(1.0, 3.0), judge=("random",),
              delta=(1, 5, "q0.25", "q0.5"), demos=("self",))
METHODS |= {f"{key}={value}": ["--variant=dagrpo", f"--{key}={value}"]
            for key, values in DAGRPO.items() for value in values}
# why its masks cost: is it right responses (wrong ones have no advantage then), or small gradients
# (all are then cut to one norm, which none is below)
WHY = dict(right_alone="--neg_weight=0.0", one_norm="--grad_clip=0.05")
METHODS |= {f"{method}_{name}": [f"--variant={method}", flag]
            for method in ("grpo", "dagrpo") for name, flag in WHY.items()}
# the config, its problems' kind, the model that it starts from and the train.py that leaves it
GROUNDS = {
    "steps": ("config/study_steps.py", "sums", "out/study/start/step_000008",
              ["config/dagrpo_quickstart.py", "--out_dir=out/study/start"]),
    "pairs": ("config/quickstart.py", "addition", "models/SmolLM2-135M-Instruct", None),
    "anchors": ("config/dagrpo_quickstart.py", "sums", "models/SmolLM2-135M-Instruct", None),
    "again": ("config/study_again.py", "sums", "models/SmolLM2-135M-Instruct", None),
    "late": ("config/study_late.py", "addition", "out/study/start_late/step_000022",
             ["config/quickstart.py", "--out_dir=out/study/start_late"]),
}
# figures of a step that are kept of a run
KEPT = ["step", "eval/accuracy", "reward/accuracy", "train/entropy", "train/grad_norm",
        "train/clip_fraction", "rollout/mean_length", "rollout/truncated", "rollout/groups_kept",
        "displacement/mean", "displacement/fell", "nthr/selected", "nthr/eta",
        "dagrpo/lambda_pos", "dagrpo/lambda_neg", "time/rollout", "time/update", "time/step"]


def run_script(*args):
    """train.py in a process of its own; ends the program if that fails."""
    print(" ".join(args), flush=True)
    run = subprocess.run([sys.executable, *args], stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    if run.returncode:
        die(f"study: this failed: {' '.join(args)}")


def make_run(ground, start, method, seed):
    """Train a run, or the rest of it; returns its folder. start: the checksum."""
    folder = f"{out_dir}/{ground}_{start}/{method}_{seed}"
    if not os.path.exists(f"{folder}/done"):
        resume = ["--resume"] * bool(newest_checkpoint(folder))
        run_script("train.py", GROUNDS[ground][0], *METHODS[method], *extra.split(),
                   f"--seed={seed}", f"--out_dir={folder}", *resume)
        path, _ = newest_checkpoint(folder)
        write_whole(f"{folder}/done", path)
        os.unlink(f"{path}/optimizer.pt")  # two thirds of it, and no longer wanted
    return folder


def fresh_problems(kind):
    """Problems that no run has met: rows. Of `sums` more than the set's own test split has."""
    if kind != "sums":
        return load_problems(kind, "test")[:problems]
    rows = load_problems("sums", "train") + load_problems("sums", "test")
    known = {tuple(sorted(row["problem"].split(" + "))) for row in rows}
    draw, rows = random.Random(1), []
    while len(rows) < problems:
        numbers = [str(draw.randint(10, 99)) for _ in range(3)]
        if tuple(sorted(numbers)) not in known:
            known.add(tuple(sorted(numbers)))
            rows.append({"problem": " + ".join(numbers), "answer": str(sum(map(int, numbers)))})
    return rows


@torch.no_grad()
def log_likelihoods(model, prompts, answers):
    """ln p of one answer to each of some prompts, nats: a list. answers: {prompt's index: ids}."""
    policy = model_utils.load_policy(model, torch.float32, "cpu").eval()
    groups = [Group({}, prompts[i], [np.array(ids, np.int32)], [np.zeros(len(ids), np.float32)],
                    [""], np.ones(1)) for i, ids in answers.items()]
    units = model_utils.pack_units(groups, 3000)
    logp = torch.cat([policy(batch, 1.0)[0] for unit in units for batch in unit.batches])
    return [x.sum().item() for x in logp.split([g.lengths[0] for g in groups])]


def questions(ground):
    """(tokenizer, rows, prompts, tokens of a response) of a ground."""
    _, kind, start, _ = GROUNDS[ground]
    tokenizer, _ = load_tokenizer(start)
    rows = fresh_problems(kind)
    prompts = encode_prompts(tokenizer, rows, kind)
    return tokenizer, rows, prompts, STYLES[kind]["max_response_tokens"]


def ask(engine, model, asked, answers=None):
    """(answers, a checkpoint's figures, of each problem). answers: {index of a problem: ids}, whose
    log-likelihood is taken; None: the model's own, the first right one to each."""
    tokenizer, rows, prompts, tokens = asked
    rollout.load_weights(engine, model)
    greedy, sampled = (
        rollout.generate_all_ranks(engine, tokenizer, rows[:count], prompts[:count], n, temperature,
                                   tokens)
        for count, n, temperature in ((problems, 1, 0.0), (sampled_problems, 8, 1.0)))
    if answers is None:
        answers = {i: g.responses[g.reward.argmax()].tolist()
                   for i, g in enumerate(sampled) if g.reward.any()}
    logp = dict(zip(answers, log_likelihoods(model, prompts, answers)))
    return answers, {
        "greedy": [int(g.reward[0]) for g in greedy],
        "pass@1": [float(g.reward.mean()) for g in sampled],
        "pass@8": [pass_at_k(g.reward.tolist(), 8) for g in sampled],
        "length": [float(np.mean(g.lengths)) for g in sampled],
        "truncated": [float(g.truncated.mean()) for g in sampled],
        "ln p of right": [logp.get(i) for i in range(len(sampled))]}  # None: had no right answer


def read_rows(ground):
    """What is kept of a ground's runs: {(method, seed, start): row}."""
    path = Path(f"{results}/{ground}.jsonl")
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {(row["method"], row["seed"], row["start"]): row for row in rows}


def train_missing(ground, chosen, of_seeds):
    """Make the runs that are missing: (start, [(method, seed), ...] that are to be asked)."""
    _, _, folder, leaves_start = GROUNDS[ground]
    rows = read_rows(ground)
    cells = [(method, seed) for seed in of_seeds for method in chosen]
    for start in dict.fromkeys(of_row for *_, of_row in rows):
        if all((*cell, start) in rows for cell in cells):
            return start, []
    if leaves_start and not os.path.exists(folder):
        run_script("train.py", *leaves_start)
    if not os.path.exists(folder):
        die(f"grounds: {folder}, from which {ground} starts, is not there: make setup")
    start, took = checksum(f"{folder}/model.safetensors")[:12], []
    missing = [cell for cell in cells if (*cell, start) not in rows]
    for i, cell in enumerate(missing, 1):
        began = time.time()
        make_run(ground, start, *cell)
        took.append(time.time() - began)
        left = len(missing) - i
        print(f"{ground}: {took[-1]:.0f} s; {left} runs left, about "
              f"{left * statistics.median(took) / 60:.0f} minutes", flush=True)
    return start, missing


def keep_answers(engine, ground, start, cells, asked):
    """Ask the last checkpoints of runs, and the start model, if it was not; keep a line of each."""
    rows = read_rows(ground)
    if ("before", 0, start) not in rows:
        cells = [("before", 0), *cells]
    for method, seed in cells:
        row = dict(method=method, seed=seed, start=start, date=time.strftime("%Y-%m-%d"))
        if method == "before":
            row["answers"], figures = ask(engine, GROUNDS[ground][2], asked)
        else:
            folder = make_run(ground, start, method, seed)
            answers = {int(i): ids for i, ids in rows["before", 0, start]["answers"].items()}
            _, figures = ask(engine, Path(f"{folder}/done").read_text(), asked, answers)
            row["metrics"] = [{key: r[key] for key in KEPT if key in r}
                              for r in runs.read_rows(folder)]
        rows = read_rows(ground) | {(method, seed, start): row | figures}  # another's may be new
        write_jsonl(f"{results}/{ground}.jsonl", rows.values())


def difference(a, b):
    """[mean, low, high] of a - b (seeds, problems), both drawn anew, and its standard error. nan
    is left out."""
    rng, d = np.random.default_rng(0), np.array(a) - np.array(b)
    seeds, problems = d.shape
    draw = rng.integers
    means = [np.nanmean(d[draw(seeds, size=max(1, seeds - 1))][:, draw(problems, size=problems)])
             for _ in range(4000)]
    return [np.nanmean(d), *np.quantile(means, (0.025, 0.975))], float(np.std(means))


def mean_of(rows, key):
    """Mean of a metric over the rows that have it: steps without a group to train on lack some."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return np.mean(values) if values else np.nan


def tabulate(ground):
    """Print the tables of the runs that are kept; leave them and a picture in out_dir."""
    rows, shares = read_rows(ground), ("greedy", "pass@1", "pass@8", "fell", "truncated")
    before = {start: np.array(row["ln p of right"], float)
              for (method, _, start), row in rows.items() if method == "before"}
    rows = {key: row for key, row in rows.items() if key[2] in before}
    sizes = {(len(row["greedy"]), len(row["pass@1"])) for row in rows.values()}
    if len(sizes) > 1:
        die(f"study: the runs of {results}/{ground}.jsonl were asked {sizes} problems")
    for key, row in rows.items():
        change = np.array(row["ln p of right"], float) - before[key[2]]
        fell = np.where(np.isnan(change), np.nan, change < 0)
        rows[key] = row | {"ln p of right": change, "fell": fell}
    methods = [m for m in METHODS if any(m == method for method, *_ in rows)]
    figures = ("greedy", "pass@1", "pass@8", "ln p of right", "fell", "length", "truncated")
    of_steps = ("train/entropy", "train/grad_norm", "displacement/mean", "displacement/fell",
                "train/clip_fraction", "nthr/selected", "dagrpo/lambda_pos", "dagrpo/lambda_neg",
                "time/rollout", "time/update", "time/step")
    values = [["method", "runs", *figures]]
    mechanism = [["mean over steps", *of_steps]]
    gains = [[f"minus {against} (95%)", "pairs", *figures[:5], "greedy that could be seen"]]
    curves = {}
    for method in ["before", *methods]:
        own = [row for (other, *_), row in rows.items() if other == method]
        values.append([method, str(len(own)), *(
            f"{100 * np.nanmean([r[key] for r in own]):.1f}" if key in shares else
            f"{np.nanmean([r[key] for r in own]):.2f}" for key in figures)])
        if method == "before":
            continue
        curves[method] = [row["metrics"] for row in own]
        steps = [row for r in own for row in r["metrics"] if "time/step" in row]
        mechanism.append([method, *(f"{mean_of(steps, key):.3g}" for key in of_steps)])
        pairs = [(row, rows[against, row["seed"], row["start"]]) for row in own
                 if (against, row["seed"], row["start"]) in rows]
        if method == against or not pairs:
            continue
        cells = []
        for key in figures[:5]:
            k = 100 if key in shares else 1
            (mean, low, high), error = difference(
                *np.array([(a[key], b[key]) for a, b in pairs], float).swapaxes(0, 1))
            cells.append(f"{k * mean:+.2f} ({k * low:+.2f} to {k * high:+.2f})")
            if key == "greedy":
                visible = f"{280 * error:.1f}"  # 2.8 errors in %: 80% power at 5%
        gains.append([method, str(len(pairs)), *cells, visible])
    text = f"{table(values)}\n{table(gains)}\n{table(mechanism)}"
    check_folder(out_dir)
    write_whole(f"{out_dir}/{ground}.md", text)
    plot_runs(curves, f"{out_dir}/{ground}.png")
    print(f"\n{ground}\n\n{text}", flush=True)


if __name__ == "__main__":
    configure(globals())
    chosen = methods.split(",") if methods else FIRST
    check(dict(methods=tuple(chosen), grounds=tuple(grounds.split(",")), against=against,
               problems=problems, sampled_problems=sampled_problems),
          dict(methods=[*METHODS], grounds=[*GROUNDS], against=(*METHODS,)),
          {"> 0": "problems sampled_problems"})
    if not all(seed.isdecimal() for seed in seeds.split(",")):
        die(f"seeds: {seeds!r} is not whole numbers with commas between")
    check_folder(results)
    chosen_grounds = grounds.split(",")
    if train:
        made = {ground: train_missing(ground, chosen, [int(seed) for seed in seeds.split(",")])
                for ground in chosen_grounds}
        made = {ground: cells for ground, cells in made.items() if cells[1]}
        if made:  # after the last training, which has the machine for itself until then
            asked = {ground: questions(ground) for ground in made}
            context = max(max(map(len, prompts)) + tokens for *_, prompts, tokens in asked.values())
            model_utils.setup_distributed()
            engine = rollout.build_engine(GROUNDS[[*made][0]][2], context, 0, "auto")
            for ground, (start, cells) in made.items():
                keep_answers(engine, ground, start, cells, asked[ground])
    for ground in chosen_grounds:
        if read_rows(ground):
            tabulate(ground)
