"""What other values of delta would have masked, on the responses of a run with judge "rubric".

    python train.py config/dagrpo_quickstart.py --samples_per_step=99
    python bench/judges.py out/dagrpo_quickstart ...        folders, their responses taken together
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np

from advantages import dagrpo_masks
from configurator import die
from eval import table


def read_groups(runs):
    """(scores (G,), advantages (G,)) of the groups that have all scores, and a gradient."""
    groups = []
    for folder in runs:
        with open(f"{folder}/samples.jsonl", encoding="utf-8") as f:
            for row in map(json.loads, f):
                if None not in row["score"] and any(row["advantage"]):
                    groups.append((np.array(row["score"]), np.array(row["advantage"])))
    return groups or die(f"{runs}: no scores in samples.jsonl")


def masked(groups, delta):
    """A row of the table: shares of right and of wrong responses that keep their gradient."""
    masks = [dagrpo_masks(score, advantage, delta) for score, advantage in groups]
    mask, advantage = np.concatenate(masks), np.concatenate([a for _, a in groups])
    whole = [not mask[a != 0].any() for mask, (_, a) in zip(masks, groups)]
    shares = mask[advantage > 0].mean(), mask[advantage < 0].mean(), np.mean(whole)
    return [f"{delta:g}", *(f"{share:.2f}" for share in shares)]


groups = read_groups(sys.argv[1:] or ["out/dagrpo_quickstart"])
print(f"{len(groups)} groups, {sum(len(score) for score, _ in groups)} responses")
rows = [masked(groups, delta) for delta in (1.0, 3.0, 5.0)]
print(table([["delta", "lambda+", "lambda-", "groups masked whole"], *rows]))
