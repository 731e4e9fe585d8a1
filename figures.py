"""What a step leaves to be read: figures, measured where they arise, seconds, a line."""
import math
import time
from functools import partialmethod

import numpy as np
import torch
import torch.distributed as dist


class Figures:
    """Means, sums and maxima over a step's tokens, responses or groups, on all ranks.
    A figure's key is written where it is measured. Values are tensors, numpy arrays or numbers; a
    GPU is not waited for before `all_ranks`."""

    def __init__(self, device):
        self.device = device
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

    def all_ranks(self):
        """{key: float} over all ranks, which call together; the mean of nothing is nan."""
        mine = {}
        for (key, kind), pairs in self.noted.items():
            pairs = torch.stack(pairs)
            mine[key, kind] = (pairs.amax(0) if kind == "max" else pairs.sum(0)).tolist()
        seen, out = [None] * dist.get_world_size(), {}
        dist.all_gather_object(seen, mine)
        for key, kind in dict.fromkeys(name for of_rank in seen for name in of_rank):
            pairs = [of_rank[key, kind] for of_rank in seen if (key, kind) in of_rank]
            pair = np.max(pairs, 0) if kind == "max" else np.sum(pairs, 0)
            count = pair[1] or math.nan
            out[key] = float(pair[0] / count if kind == "mean" else pair[0])
        return out


class Clock:
    """Seconds of a step by phase; `lap` waits for the GPU, so it stands between phases only."""

    def __init__(self):
        self.start = self.last = time.time()
        self.seconds = {}

    def lap(self, phase):
        """The seconds since the last lap go to time/`phase`."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.time()
        self.seconds[f"time/{phase}"] = now - self.last
        self.seconds["time/step"] = now - self.start
        self.last = now


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
