"""Is it just entropy? Do the methods pick the same tokens of incorrect responses?

    python bench/overlap.py out/lld     what lld.py left there; writes overlap.md beside it

Overlap (Jaccard) of NTHR's tokens with THR's negative ones, and with as many of highest entropy, of
lowest likelihood and at random; rank correlation of the scores over all incorrect tokens."""
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from advantages import as_many
from configurator import die
from eval import bootstrap, table
from runs import write_whole


def of_question(row, nthr_beta):
    """One question's {(what, a, b): number} of a row of questions.jsonl."""
    flat = {key: np.concatenate(row[key]) for key in ("s", "thr", "entropy", "surprisal")}
    nthr = np.concatenate(row["selected_tokens"]).astype(bool)  # (n,)
    lengths = [len(x) for x in row["s"]]
    wrong = np.repeat([not right for right in row["correct"]], lengths)
    # THR has the scores' means with 1 / length, of incorrect tokens with the other sign
    tau = nthr_beta * min(np.mean(x) for x, right in zip(row["thr"], row["correct"]) if right)
    picked = {"nthr": nthr, "thr < 0": wrong & (-flat["thr"] > max(tau, 0))}
    chance = np.random.default_rng(row["question"]).random(len(wrong))
    for name, by in dict(entropy=flat["entropy"], logp=flat["surprisal"], random=chance).items():
        picked[name] = as_many(*map(torch.from_numpy, (nthr, by)), lengths).numpy()
    scores = {"s": flat["s"], "-thr": -flat["thr"], "entropy": flat["entropy"],
              "-logp": flat["surprisal"]}
    scores = pd.DataFrame({name: x[wrong] for name, x in scores.items()})
    rank = scores.corr("spearman").fillna(1.0)
    found = {("correlation", *pair): rank.loc[pair] for pair in itertools.combinations(rank, 2)}
    for a, b in itertools.combinations(picked, 2):
        either = (picked[a] | picked[b]).sum()  # NTHR may select nothing
        found["jaccard", a, b] = (picked[a] & picked[b]).sum() / either if either else np.nan
    return found


def overlap(path):
    """{(what, a, b): [mean over questions, and its 95% interval]} of a questions.jsonl."""
    try:
        settings, *rows = map(json.loads, Path(path).read_text().splitlines())
        found = pd.DataFrame([of_question(row, settings["nthr_beta"]) for row in rows])
    except (OSError, ValueError, KeyError) as e:
        die(f"overlap: {path} is not what lld.py leaves: {e!r}")
    return {name: bootstrap([values.dropna().to_numpy()]) for name, values in found.items()}


if __name__ == "__main__":
    out_dir = sys.argv[1] if len(sys.argv) > 1 else "out/lld"
    rows = [["", "a", "b", "mean", "95% interval"]]
    for name, (mean, low, high) in overlap(f"{out_dir}/questions.jsonl").items():
        rows.append([*name, f"{mean:.2f}", f"{low:.2f} to {high:.2f}"])
    write_whole(f"{out_dir}/overlap.md", table(rows))
    print(table(rows))
