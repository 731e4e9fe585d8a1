"""What a step leaves to be read: figures, measured where they arise, seconds, a line."""
import math
import time
from functools import partialmethod

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist


class Figures:
    """Means, sums and maxima over a step's tokens, responses or groups, on all ranks.
    A figure's key is written where it is measured. Values are tensors, numpy arrays or numbers; a
    GPU is not waited for before `all_ranks`, but by `lap`, which stands between phases."""

    def __init__(self, device):
        self.device = device
        self.start = self.last = time.time()
        self.noted = {}  # (key, kind): pairs (2,) of sum and count, or of the maximum twice

    def note(self, kind, key, values, where=True):
        values, where = (
            torch.as_tensor(x).detach().to(self.device, torch.float64, non_blocking=True)
            for x in (values, where))
        where = where.expand_as(values) > 0
        if kind == "max":
            lowest = values.new_full((1,), -torch.inf)  # for fillers, which have no values
            pair = torch.cat([lowest, values[None].where(where, lowest).flatten()]).max().expand(2)
        else:
            pair = torch.stack([values.where(where, 0).sum(), where.sum()])
        self.noted.setdefault((key, kind), []).append(pair)

    mean = partialmethod(note, "mean")
    sum = partialmethod(note, "sum")
    max = partialmethod(note, "max")

    def lap(self, phase):
        """The seconds since the last lap are time/`phase`, of the slowest rank."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.max(f"time/{phase}", time.time() - self.last)
        self.last = time.time()
        self.max("time/step", self.last - self.start)

    def all_ranks(self):
        """{key: float} over all ranks, which call together; the mean of nothing is nan."""
        noted = {name: torch.stack(pairs) for name, pairs in self.noted.items()}
        mine = {name: (pairs.amax(0) if name[1] == "max" else pairs.sum(0)).tolist()
                for name, pairs in noted.items()}
        seen, out = [None] * dist.get_world_size(), {}
        dist.all_gather_object(seen, mine)
        for key, kind in dict.fromkeys(name for of_rank in seen for name in of_rank):
            pairs = [of_rank[key, kind] for of_rank in seen if (key, kind) in of_rank]
            pair = np.max(pairs, 0) if kind == "max" else np.sum(pairs, 0)
            count = pair[1] or math.nan
            out[key] = float(pair[0] / count if kind == "mean" else pair[0])
        return out


def find_alarms(row, rows):
    """Set alarm/* of a step's row; returns lines to print, each the first time that it is due.
    rows: all of metrics.jsonl so far."""
    steps = pd.DataFrame([*(r for r in rows if "time/step" in r), row]).astype(float)
    idle = (steps["rollout/groups_kept"] == 0) | steps["reward/mean"].isin([0, 1])
    first, usual = steps[:5].median(), steps.rolling(21, min_periods=6).median().iloc[-1]
    ten = steps.rolling(10)
    change, spread = ten.mean().diff(10).iloc[-1], (ten.std() / ten.std().shift(10)).iloc[-1]
    found = (
        ("no_signal", len(idle) > 2 and idle[-3:].all(),
         "no group had right and wrong responses for three steps: try other problems, a larger "
         "group_size, a higher temperature, anchors=1"),
        ("gradient", row["train/grad_norm"] > 10 * usual["train/grad_norm"],
         "the gradient norm is ten times its median: try a smaller learning_rate"),
        ("length", row["rollout/mean_length"] < first["rollout/mean_length"] / 3,
         "responses are a third as long as at first: see samples.jsonl, try loss_norm=token"),
        ("entropy", row["train/entropy"] < 0.01,
         "hardly any entropy is left: try clip_high=0.28, a higher temperature, fewer steps"),
        ("flat", abs(change["reward/accuracy"]) < 0.01 and spread["train/loss"] > 3,
         "accuracy stays while the loss swings more: try a smaller learning_rate; of dagrpo "
         "a smaller delta, another judge"),
        ("gap", row["gap/mean"] > max(0.01, 3 * first["gap/mean"]),
         "vLLM's log-probabilities drift from the trainer's: try tis_cap=2, another rollout_dtype"))
    due = {f"alarm/{name}": text for name, is_due, text in found if is_due}
    row |= dict.fromkeys(due, 1)
    return [f"{key}: {text}" for key, text in due.items() if not any(key in r for r in rows)]


# the printed line: label, key, format. All other figures are in metrics.jsonl
LINE = (
    ("accuracy", "reward/accuracy", ".3f"), ("groups", "rollout/groups_kept", "d"),
    ("length", "rollout/mean_length", ".1f"), ("entropy", "train/entropy", ".3f"),
    ("grad", "train/grad_norm", ".2f"), ("gap", "gap/max", ".0e"),
    ("update", "time/update", ".1f"), ("step", "time/step", ".1f"))


def step_line(row, steps):
    """A step's figures as train.py prints them, at most 120 columns; steps: how many in all."""
    return f"step {row['step']}/{steps}: " + ", ".join(
        f"{label} {row[key]:{form}}" for label, key, form in LINE if key in row)
