"""What a step leaves to be read: figures, measured where they arise, seconds, a line."""
import resource
import time
from collections import defaultdict
from functools import partialmethod

import numpy as np
import pandas as pd
import torch

from advantages import response_advantages
from data import accuracy, of_ranks


class Figures:
    """Means, sums and maxima over a step's tokens, responses or groups, on all ranks.
    A figure's key is written where it is measured. Values are tensors, numpy arrays or numbers; a
    GPU is waited for in `lap`, which stands between phases, and `all_ranks` only."""

    def __init__(self, device):
        self.device = device
        self.start = self.last = time.time()
        self.noted = {}  # (key, kind): [(3,) sum, count and maximum, ...]

    def note(self, kind, key, values, where=True):
        values, where = (torch.as_tensor(x).detach().to(
            self.device, torch.float64, non_blocking=True) for x in (values, where))
        where = where.expand_as(values) > 0
        lowest = values.new_full((1,), -torch.inf)  # fillers have no values, and so no maximum
        largest = torch.cat([lowest, values.where(where, lowest).flatten()]).max()
        triple = torch.stack([values.where(where, 0).sum(), where.sum(), largest])
        self.noted.setdefault((key, kind), []).append(triple)

    mean = partialmethod(note, "mean")
    sum = partialmethod(note, "sum")
    max = partialmethod(note, "max")

    def lap(self, phase):
        """The seconds since the last lap are time/`phase`: of the slowest rank, in each phase."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.max(f"time/{phase}", time.time() - self.last)
        self.last = time.time()
        self.max("time/step", self.last - self.start)

    def all_ranks(self):
        """{key: float} over all ranks, which call together; the mean of nothing is nan."""
        mine = {name: torch.stack(noted).cpu() for name, noted in self.noted.items()}
        seen, out = of_ranks(mine), {}
        for key, kind in dict.fromkeys(name for of_rank in seen for name in of_rank):
            noted = torch.cat([of_rank[key, kind] for of_rank in seen if (key, kind) in of_rank])
            total, count, _ = noted.sum(0)
            of = {"mean": total / count, "sum": total, "max": noted[:, 2].max()}
            out[key] = of[kind].item()
        return out


def rollout_figures(groups, sampled, wasted, step, anchor_texts):
    """Figures of a step. groups: those trained on; sampled: all; wasted: prompts issued in vain.
    anchor_texts: {problem: {text: the step that it is of}}."""
    def of_rollouts(groups, field):  # demonstrations do not count
        return np.concatenate([[], *(np.array(getattr(g, field))[~g.is_anchor] for g in groups)])

    tokens, kept = of_rollouts(sampled, "lengths"), of_rollouts(groups, "lengths").sum()
    row = {
        "reward/accuracy": accuracy(sampled), "reward/mean": accuracy(sampled, "reward"),
        "rollout/groups_sampled": len(sampled), "rollout/groups_kept": len(groups),
        "rollout/response_tokens": int(kept), "rollout/tokens_dropped": int(tokens.sum() - kept),
        "rollout/prompts_wasted": wasted, "rollout/mean_length": tokens.mean(),
        "rollout/truncated": of_rollouts(sampled, "truncated").mean(),
        "rollout/anchor_share": np.mean([g.is_anchor.any() for g in sampled])}
    hard = [not g.right.any() for g in groups if g.is_anchor.any()]
    ages = [step - anchor_texts.get(g.row["problem"], {}).get(text, np.nan) for g in groups
            for text, is_anchor in zip(g.texts, g.is_anchor) if is_anchor]
    if hard:
        row |= {"anchor/hard": np.mean(hard), "anchor/age": np.mean(ages)}
    return row


def note_anchors(figures, group, old):
    """How far a group's demonstrations are from the policy. old: advantages.Old."""
    if group.is_anchor.any():
        anchor, right = (np.repeat(x, group.lengths) for x in (group.is_anchor, group.right))
        figures.mean("anchor/logp", old.logp, where=anchor)
        figures.mean("anchor/logp_right", old.logp, where=right)  # of the same groups' rollouts
        figures.mean("anchor/entropy", old.entropy, where=anchor)
        figures.mean("anchor/unlikely", old.logp.exp() < 0.01, where=anchor)


def samples(groups, step, tokenizer, of_response):
    """Rows of samples.jsonl, figures of tokens from the ranks that trained on them. All call."""
    mine = [(i, g.of_tokens.double().round(decimals=4).tolist()) for i, g in enumerate(groups)
            if g.of_tokens is not None]
    of_tokens = dict(sum(of_ranks(mine), []))
    return [{"step": step, "problem": g.row["problem"], "answer": g.row["answer"],
             "prompt": tokenizer.decode(g.prompt), "responses": g.texts, "lengths": g.lengths,
             "reward": g.reward.tolist(), "truncated": g.truncated.tolist(),
             "is_anchor": g.is_anchor.tolist(), "score": g.score.tolist(),
             "advantage": response_advantages(g, **of_response).tolist(),
             "tokens": tokenizer.batch_decode(np.concatenate(g.responses)[:, None]),
             **dict(zip(("logp", "entropy", "token_advantage"), of_tokens.get(i, ())))}
            for i, g in enumerate(groups)]


def speed_figures(row, vllm_bytes):
    """Tokens/s of all ranks; this rank's peak memory, on a GPU the step's less the engine's."""
    tokens = row["rollout/response_tokens"] + row["rollout/tokens_dropped"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() - vllm_bytes
    return {"perf/rollout_tok_s": tokens / row["time/rollout"],
            "perf/train_tok_s": row.get("train/packed_tokens", 0) / row["time/update"],
            "perf/peak_memory_gib": peak / 2**30}


def find_alarms(row, rows):
    """Set alarm/* of a step's row; returns lines to print, of alarms that no earlier row has.
    rows: all of metrics.jsonl so far. What a step lacks is nan and gives no alarm."""
    keys = ["reward/accuracy", "rollout/mean_length", "train/entropy", "train/grad_norm",
            "train/loss", "gap/mean", "train/bad_step"]
    steps = pd.DataFrame([*(r for r in rows if "time/step" in r), row], columns=keys, dtype=float)
    now, first = steps.iloc[-1], steps[:5].median()
    gradient = steps["train/grad_norm"].where(lambda x: x > 0)
    usual = gradient.rolling(21, min_periods=6).median().iloc[-1]
    change = steps["reward/accuracy"].rolling(10).mean().diff(10).iloc[-1]
    spread = steps["train/loss"].rolling(10).std()
    idle = gradient.isna() & (steps["train/bad_step"] != 1)
    found = (
        ("no_signal", len(steps) > 2 and idle[-3:].all(),
         "no response had an advantage for three steps: try other problems, a larger group_size"),
        ("gradient", now["train/grad_norm"] > 10 * usual,
         "the gradient norm is ten times its median: try a smaller learning_rate"),
        ("length", now["rollout/mean_length"] < first["rollout/mean_length"] / 3,
         "responses are a third as long as at first: see samples.jsonl, try loss_norm=token"),
        ("entropy", now["train/entropy"] < 0.01,
         "hardly any entropy is left: try clip_high=0.28, a higher temperature, fewer steps"),
        ("flat", abs(change) < 0.01 and spread.iloc[-1] > 3 * spread.shift(10).iloc[-1] > 0,
         "accuracy stays while the loss swings more: try a smaller learning_rate, a smaller delta"),
        ("gap", now["gap/mean"] > max(0.01, 3 * first["gap/mean"]),
         "vLLM's log-probabilities drift from the trainer's: try tis_cap=2, another rollout_dtype"))
    due = {f"alarm/{name}": text for name, is_due, text in found if is_due}
    row |= dict.fromkeys(due, 1)
    return [f"{key}: {text}" for key, text in due.items() if not any(key in r for r in rows)]


def step_line(row, steps):
    """What train.py prints of a step, at most 120 columns; steps: how many in all. All other
    figures are in metrics.jsonl."""
    row = defaultdict(lambda: np.nan, row)  # a step without groups has no train/ and gap/
    return (f"step {row['step']}/{steps}: accuracy {row['reward/accuracy']:.3f}, groups "
            f"{row['rollout/groups_kept']}, length {row['rollout/mean_length']:.1f}, entropy "
            f"{row['train/entropy']:.3f}, grad {row['train/grad_norm']:.2f}, gap "
            f"{row['gap/max']:.0e}, update {row['time/update']:.1f}, step {row['time/step']:.1f}")
