"""What delta masks, and how far judge "self" agrees with the rubric.

On the responses of runs with judge "rubric" and anchors:

    python train.py config/dagrpo_quickstart.py --samples_per_step=999
    python bench/judges.py --run out/dagrpo_quickstart
"""
import itertools
import json
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rollout  # before torch, whose threads it sets

# isort: split
import numpy as np
from conftest import SCORED_TURNS

from advantages import dagrpo_masks
from configurator import configure, die
from data import load_tokenizer
from eval import table
from judge import ask_engine, judge_all_ranks
from model_utils import setup_distributed

run = ()                          # folders, their responses taken together
model = "models/SmolLM2-135M-Instruct"  # that judges
groups_asked = 40                 # groups that it judges, the first ones with an anchor
seed = 0

configure(globals())


def read_groups():
    """Groups of the runs that have a score for every response, and a gradient."""
    rows = []
    for folder in run or ("out/dagrpo_quickstart",):
        with open(os.path.join(folder, "samples.jsonl"), encoding="utf-8") as f:
            rows += [dict(json.loads(line), folder=folder) for line in f]
    groups = []
    for _, some in itertools.groupby(rows, key=lambda r: (r["folder"], r["step"], r["problem"])):
        some = list(some)
        scores = [r.get("score") for r in some]
        if None not in scores and any(r["advantage"] for r in some):
            groups.append(SimpleNamespace(
                row=dict(problem=some[0]["problem"], answer=some[0]["answer"],
                         solution=some[-1]["response"]),  # the last one, if it is an anchor
                has_anchor=some[-1]["anchor"],
                texts=[r["response"] for r in some],
                reward=np.array([r["reward"] for r in some]),
                truncated=np.array([r["truncated"] for r in some]),
                advantage=np.array([r["advantage"] for r in some]),
                rubric=np.array(scores)))
    return groups or die(f"run: {run} has no scores in samples.jsonl")


def masked(groups, delta):
    """A row of the table: shares of right and of wrong responses that keep their gradient."""
    masks = [dagrpo_masks(g.rubric, g.advantage, delta) for g in groups]
    mask, advantage = np.concatenate(masks), np.concatenate([g.advantage for g in groups])
    whole = [not mask[g.advantage != 0].any() for g, mask in zip(groups, masks)]
    shares = mask[advantage > 0].mean(), mask[advantage < 0].mean(), np.mean(whole)
    return [f"{delta:g}", *(f"{share:.2f}" for share in shares)]


def agreement(groups, other):
    """Pairs of rollouts that `other` orders (the name of an attribute), by what self says: text."""
    same = opposite = tied = 0
    for group in groups:
        theirs, mine = getattr(group, other), group.score
        # the demonstration is the last
        for i, j in itertools.combinations(range(len(mine) - 1), 2):
            if theirs[i] == theirs[j] or np.isnan([mine[i], mine[j]]).any():
                continue
            sign = np.sign(mine[i] - mine[j]) * np.sign(theirs[i] - theirs[j])
            same += sign > 0
            opposite += sign < 0
            tied += sign == 0
    return (f"  pairs that the {other} orders: {same} in the same order, {opposite} in the "
            f"opposite, {tied} tied")


groups = read_groups()
print(f"{len(groups)} groups, {sum(len(g.texts) for g in groups)} responses")
rows = [masked(groups, delta) for delta in (1.0, 3.0, 5.0)]
print(table([["delta", "lambda+", "lambda-", "groups masked whole"], *rows]))

setup_distributed()
tokenizer, _ = load_tokenizer(model)
engine = rollout.build_engine(model, 2000, seed, "float32")
asked = [g for g in groups if g.has_anchor][:groups_asked]
templates = {"its own chat template": tokenizer.chat_template, "example turns": SCORED_TURNS}
for name, tokenizer.chat_template in templates.items():
    ask = partial(ask_engine, engine=engine, tokenizer=tokenizer)
    counts = judge_all_ranks(asked, "self", ask, cache={})
    known = np.concatenate([g.score[np.isfinite(g.score)] for g in asked])
    values, of_each = np.unique(known, return_counts=True)
    scores = ", ".join(f"{n} x {value:g}" for value, n in zip(values, of_each))
    print(f"self with {name}: {counts['asked']} responses, {counts['groups_failed']} of "
          f"{len(asked)} groups without a score for each; scores: {scores or 'none'}")
    print(agreement(asked, "rubric"))
    print(agreement(asked, "reward"))
del engine  # last: its shutdown ends the process group
