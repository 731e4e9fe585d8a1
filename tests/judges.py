"""What delta masks, and how far judge "self" agrees with the rubric, on the responses of a run with judge "rubric" and anchors.

    python train.py config/dagrpo_quickstart.py --samples_per_step=999
    python tests/judges.py --run out/dagrpo_quickstart
"""
import itertools
import json
import os
import sys
from functools import partial

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from configurator import configure, die

run = ()                          # folders, their responses taken together; none: out/dagrpo_quickstart
model = "models/SmolLM2-135M-Instruct"  # that judges
groups_asked = 40                 # groups that it judges, the first ones with an anchor
judge_tokens = 128
seed = 0
configure(globals())

import rollout  # before torch
import data
import numpy as np
import torch

from advantages import dagrpo_masks
from conftest import SCORED_TURNS
from judge import ask_engine, judge_groups
from model_utils import setup_distributed

groups = []
for folder in run or ("out/dagrpo_quickstart",):
    with open(os.path.join(folder, "samples.jsonl")) as f:
        rows = [json.loads(line) for line in f]
    for _, group in itertools.groupby(rows, key=lambda r: (r["step"], r["problem"])):
        groups.append(list(group))
groups = [g for g in groups if all(r.get("score") is not None for r in g) and any(r["advantage"] for r in g)]
if not groups:
    die(f"run: {run or folder} has no scores in samples.jsonl")

print(f"{len(groups)} groups, {sum(map(len, groups))} responses")
print("| delta | lambda+ | lambda- | groups masked whole |\n|---|---|---|---|")
scores = torch.tensor([r["score"] for g in groups for r in g], dtype=torch.float64)
advantages = torch.tensor([r["advantage"] for g in groups for r in g], dtype=torch.float64)
number = torch.tensor([i for i, g in enumerate(groups) for _ in g])
for delta in (1.0, 3.0, 5.0):
    kept = dagrpo_masks(scores, advantages, number, delta)
    whole = torch.zeros(len(groups), dtype=torch.float64).index_add(0, number, kept * (advantages != 0)) == 0
    print(f"| {delta:g} | {kept[advantages > 0].mean():.2f} | {kept[advantages < 0].mean():.2f} | {whole.double().mean():.2f} |")

setup_distributed()
tokenizer, _ = data.load_tokenizer(model)
engine = rollout.build_engine(model, 1500, seed, "float32")
asked = [g for g in groups if g[-1]["anchor"]][:groups_asked]
asked = [dict(problem=g[0]["problem"], answer=g[0]["answer"], solution=g[-1]["response"], texts=[r["response"] for r in g],
              rubric=[r["score"] for r in g], rewards=np.array([r["reward"] for r in g])) for g in asked]
for name, template in (("its own chat template", tokenizer.chat_template), ("example turns", SCORED_TURNS)):
    tokenizer.chat_template = template
    found, counts = judge_groups(asked, "self", partial(ask_engine, engine=engine, tokenizer=tokenizer, max_tokens=judge_tokens))
    agree = {"rubric": [0, 0, 0], "reward": [0, 0, 0]}  # pairs: same order, opposite, tied by self
    for g, mine in zip(asked, found):
        for what, other in (("rubric", g["rubric"]), ("reward", g["rewards"])):
            for i, j in itertools.combinations(range(len(mine) - 1), 2):  # of rollouts; the demonstration is the last
                if np.isfinite([mine[i], mine[j]]).all() and other[i] != other[j]:
                    sign = np.sign(mine[i] - mine[j]) * np.sign(other[i] - other[j])
                    agree[what][{1: 0, -1: 1, 0: 2}[int(sign)]] += 1
    known = [s for row in found for s in row if np.isfinite(s)]
    print(f"self with {name}: {counts['asked']} asked about, {counts['failed']} without a score; scores "
          + (f"{np.mean(known):.1f} +- {np.std(known):.1f}, values {sorted(set(known))}" if known else "none"))
    for what, (same, opposite, tied) in agree.items():
        if same + opposite + tied:
            print(f"  pairs that the {what} orders: {same} in the same order, {opposite} in the opposite, {tied} tied")
del engine
