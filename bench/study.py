"""Do the methods train better than GRPO? Every method with every seed, and tables with intervals.

    python bench/study.py                                             all of it; it can be stopped
    python bench/study.py --grounds=steps --methods=grpo,nthr --seeds=0,1       a part
    python bench/study.py --train=False                               tables of the runs there are

A run is one `train.py` with its own folder, out/study/GROUND/METHOD_SEED; whole ones are not run
again, broken ones go on, so the work can be split over calls and machines that share the folder. A
seed is one data order and sampling for all methods, so differences are paired. Then eval.py asks
the last checkpoints the same fresh problems: greedily, and 8 times at temperature 1. Last, the
log-likelihood of the start model's own right answers, fixed before training: what [NTHR] says a
penalty on wrong answers takes away. Leaves GROUND.md, GROUND.json and GROUND.png in out/study.

Intervals: 95%, bootstrap over seeds and problems together: seeds are drawn anew, and problems, the
same ones for both methods. With one seed it says nothing of another seed, and is marked.
"""
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rollout  # noqa: F401  before torch, whose threads it sets

# isort: split
import numpy as np
import torch

import model_utils
from configurator import check, configure, die
from data import Group, encode_anchor, encode_prompts, end_token, load_problems, load_tokenizer
from eval import table
from plot import plot_runs
from runs import newest_checkpoint, read_metrics, write_json, write_jsonl, write_whole

grounds = "steps,pairs,late"  # of GROUNDS, with commas
methods = ""                  # of METHODS, with commas; "": those of FIRST
seeds = "0,1,2,3,4"
train = True                  # run what is missing; False: evaluate and tabulate what is there
problems = 512                # fresh ones, asked greedily, at most
sampled_problems = 128        # the first of them, asked 8 times at temperature 1
out_dir = "out/study"
extra = ""                    # further flags of every train.py, with spaces between

FIRST = ("grpo", "pos_only", "random", "nthr")
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
    "nsr": ["--advantage_norm=sign", "--pos_weight=0.0"],
    "w_reinforce": ["--advantage_norm=sign", "--pos_weight=0.1"],
    "llds": ["--llds=0.2"],
    "gspo": ["--loss=gspo", "--loss_norm=response", "--clip_low=3e-4", "--clip_high=4e-4"],
}
# config; the model that it starts from, and the train.py that leaves it; problems none has met
GROUNDS = {
    "steps": ("config/study_steps.py", "out/study/start/step_000008",
              ["config/dagrpo_quickstart.py", "--out_dir=out/study/start"], "fresh_sums.jsonl"),
    "pairs": ("config/quickstart.py", "models/SmolLM2-135M-Instruct", None, "addition"),
    "late": ("config/study_late.py", "out/study/start_late/step_000022",
             ["config/quickstart.py", "--out_dir=out/study/start_late"], "addition"),
}


def run_script(*args):
    """A script in a process of its own; ends the program if that fails."""
    print(" ".join(args), flush=True)
    if subprocess.run([sys.executable, *args], stdout=subprocess.DEVNULL).returncode:
        die(f"study: this failed: {' '.join(args)}")


def train_missing(ground, cells):
    """Run what is missing of a ground's cells, and say how long the rest will take."""
    config, start, leaves_start, _ = GROUNDS[ground]
    if leaves_start and not os.path.exists(start):
        run_script("train.py", *leaves_start)
    took = []
    for i, (method, seed) in enumerate(cells):
        folder = f"{out_dir}/{ground}/{method}_{seed}"
        if is_done(ground, method, seed):
            continue
        began, resume = time.time(), ["--resume"] * bool(newest_checkpoint(folder))
        run_script("train.py", config, *METHODS[method], *extra.split(), f"--seed={seed}",
                   f"--out_dir={folder}", *resume)
        path, _ = newest_checkpoint(folder)
        write_whole(f"{folder}/done", path)
        os.unlink(f"{path}/optimizer.pt")  # two thirds of it, and no longer wanted
        took.append(time.time() - began)
        left = sum(not is_done(ground, *cell) for cell in cells[i + 1:])
        print(f"{ground}: {took[-1]:.0f} s; {left} runs left, about "
              f"{left * statistics.median(took) / 60:.0f} minutes", flush=True)


def is_done(ground, method, seed):
    """Did this run come to its end?"""
    return os.path.exists(f"{out_dir}/{ground}/{method}_{seed}/done")


def write_fresh(path):
    """Sums of three that are in no split of the set `sums`, in whatever order of their numbers."""
    rows = load_problems("sums", "train") + load_problems("sums", "test")
    known = {tuple(sorted(row["problem"].split(" + "))) for row in rows}
    draw, rows = random.Random(1), []
    while len(rows) < problems:
        numbers = [str(draw.randint(10, 99)) for _ in range(3)]
        if tuple(sorted(numbers)) not in known:
            known.add(tuple(sorted(numbers)))
            rows.append({"problem": " + ".join(numbers), "answer": str(sum(map(int, numbers)))})
    write_jsonl(path, rows)


def ask(ground, models, *flags):
    """{model: {figure: of each problem (P,)}} of eval.py on the ground's fresh problems."""
    data = GROUNDS[ground][-1]
    if data.endswith(".jsonl"):
        data = f"{out_dir}/{data}"
        write_fresh(data)
    home = f"{out_dir}/{ground}_eval"
    run_script("eval.py", f"--ckpt={','.join(models)}", f"--data={data}", f"--out_dir={home}",
               *flags)
    with open(f"{home}/results.json") as f:
        return {os.path.relpath(r["ckpt"]): r["of_problems"] for r in json.load(f) if "ckpt" in r}


def right_answers(ground, tokenizer):
    """A right answer of the start model to each problem that it has one to: Groups of one."""
    _, start, _, data = GROUNDS[ground]
    name = "/".join(Path(start).parts[-2:])
    [path] = Path(f"{out_dir}/{ground}_eval").glob(f"**/{name}/*_n8_t1.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    dataset = "sums" if ground == "steps" else data
    end = end_token(tokenizer, start)
    groups = []
    for row, prompt in zip(rows, encode_prompts(tokenizer, rows, dataset)):
        texts = [text for text, right in zip(row["response"], row["correct"]) if right]
        if texts:
            ids = encode_anchor(tokenizer, prompt, texts[0], end)
            groups.append(Group(row, prompt, [ids], [0.0 * ids], texts[:1], np.ones(1)))
    return groups


@torch.no_grad()
def log_likelihoods(model, groups):
    """ln p of each group's one response (groups,), nats."""
    policy = model_utils.load_policy(model, torch.float32, "cpu").eval()
    units = model_utils.pack_units(groups, 3000)
    logp = torch.cat([policy(batch, 1.0)[0] for unit in units for batch in unit.batches])
    return np.array([x.sum().item() for x in logp.split([g.lengths[0] for g in groups])])


def difference(a, b, draws=4000):
    """[mean, low, high] of a - b (seeds, problems), both drawn anew, and its standard error."""
    rng, d = np.random.default_rng(0), np.array(a) - np.array(b)
    seeds, problems = d.shape
    means = [d[rng.integers(seeds, size=seeds)][:, rng.integers(problems, size=problems)].mean()
             for _ in range(draws)]
    return [d.mean(), *np.quantile(means, (0.025, 0.975))], float(np.std(means))


def mean_of(rows, key):
    """Mean of a metric over the rows that have it: steps without a group to train on lack some."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return np.mean(values) if values else np.nan


def tabulate(ground, cells):
    """Evaluate a ground's whole runs; leave its tables and its picture."""
    start = GROUNDS[ground][1]
    paths = {cell: os.path.relpath(open(f"{out_dir}/{ground}/{cell[0]}_{cell[1]}/done").read())
             for cell in cells}
    models = [start, *paths.values()]
    greedy = ask(ground, models, f"--max_problems={problems}")
    sampled = ask(ground, models, "--n=8", "--temperature=1.0",
                  f"--max_problems={sampled_problems}")
    tokenizer, _ = load_tokenizer(start)
    groups = right_answers(ground, tokenizer)
    before = log_likelihoods(start, groups)
    values = {}  # of each figure: {cell: of each problem}
    for cell, path in paths.items():
        after = log_likelihoods(path, groups)
        for name, x in (
            ("greedy", greedy[path]["accuracy"]), ("pass@1", sampled[path]["accuracy"]),
            ("pass@8", sampled[path]["pass@8"]), ("ln p of right", after - before),
            ("fell", after < before), ("length", sampled[path]["length"]),
            ("truncated", sampled[path]["truncated"])):
            values.setdefault(name, {})[cell] = np.array(x, float)
    names = [*dict.fromkeys(method for method, _ in cells)]
    rows = [["method", "seeds", *values, "entropy at the end", "gradient norm", "s/step"]]
    gains = [["minus GRPO (95%)", "seeds", "greedy", "could be seen", "pass@1", "pass@8",
              "ln p of right", "fell"]]
    of_start = [greedy[start]["accuracy"], sampled[start]["accuracy"], sampled[start]["pass@8"]]
    rows.append(["before", "", *(f"{100 * np.mean(x):.1f}" for x in of_start), "", "",
                 f"{np.mean(sampled[start]['length']):.1f}",
                 f"{100 * np.mean(sampled[start]['truncated']):.1f}", "", "", ""])
    for method in names:
        own = [cell for cell in cells if cell[0] == method]
        runs = [read_metrics(f"{out_dir}/{ground}/{m}_{s}") for m, s in own]
        metrics = [[row for row in rows if "time/step" in row] for rows in runs]
        scale = {"ln p of right": 1, "length": 1}
        rows.append([method, str(len(own)), *(
            f"{scale.get(name, 100) * np.mean([x[cell] for cell in own]):.{1 + (name in scale)}f}"
            for name, x in values.items()),
            f"{mean_of([m[-1] for m in metrics], 'train/entropy'):.3f}",
            f"{mean_of(sum(metrics, []), 'train/grad_norm'):.2f}",
            f"{mean_of(sum(metrics, []), 'time/step'):.1f}"])
        pairs = [(cell, ("grpo", cell[1])) for cell in own if ("grpo", cell[1]) in cells]
        if method == "grpo" or not pairs:
            continue
        line = [method, str(len(pairs))]
        for name in ("greedy", "pass@1", "pass@8", "ln p of right", "fell"):
            ours, theirs = zip(*((values[name][cell], values[name][grpo]) for cell, grpo in pairs))
            (mean, low, high), error = difference(ours, theirs)
            k = scale.get(name, 100)
            line.append(f"{k * mean:+.2f} ({k * low:+.2f} to {k * high:+.2f})")
            if name == "greedy":
                line.append(f"{k * 2.8 * error:.1f}")
        gains.append(line)
    text = f"{table(rows)}\n{table(gains)}"
    write_whole(f"{out_dir}/{ground}.md", text)
    write_json(f"{out_dir}/{ground}.json", [rows, gains])
    plot_runs([f"{out_dir}/{ground}/{m}_{s}" for m, s in cells], f"{out_dir}/{ground}.png")
    print(f"\n{ground}: {len(groups)} right answers of the start model\n\n{text}", flush=True)


if __name__ == "__main__":
    config = configure(globals())
    chosen = methods.split(",") if methods else FIRST
    check(dict(methods=tuple(chosen), grounds=tuple(grounds.split(","))),
          dict(methods=[*METHODS], grounds=[*GROUNDS]), {})
    if not all(seed.isdigit() for seed in seeds.split(",")):
        die(f"seeds: {seeds!r} is not whole numbers with commas between")
    os.makedirs(out_dir, exist_ok=True)
    for ground in grounds.split(","):
        cells = [(method, int(seed)) for seed in seeds.split(",") for method in chosen]
        if train:
            train_missing(ground, cells)
        cells = [cell for cell in cells if is_done(ground, *cell)]
        if cells:
            tabulate(ground, cells)
