"""train.py on responses that are given instead of sampled; all the rest of it runs as it is.

    updates, policy = replay(steps, "--variant=nthr", ...)

test_golden.py replays fixed groups, bench/race.py the responses that TRL sampled. As a program
(under torchrun) it replays the groups of a JSON file with the flags of each of its cases.
"""
import contextlib
import functools
import json
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import rollout  # before torch, whose threads it sets

import numpy as np
import torch
import torch.distributed as dist

import data
import losses
import model_utils
import plot
import runs
from data import Group


def read_groups(rows):
    """Groups of JSON rows: row, prompt, responses, rollout_logp, texts, reward, is_anchor."""
    return [Group(**r | dict(
        seed=seed, prompt=np.array(r["prompt"], np.int32), reward=np.array(r["reward"], np.float32),
        responses=[np.array(x, np.int32) for x in r["responses"]],
        rollout_logp=[np.array(x, np.float32) for x in r["rollout_logp"]],
        is_anchor=np.array(r["is_anchor"], bool))) for seed, r in enumerate(rows)]


@contextlib.contextmanager
def replaced(module, **functions):
    """Functions of a module, others for a time."""
    before = {name: getattr(module, name) for name in functions}
    vars(module).update(functions)
    try:
        yield
    finally:
        vars(module).update(before)


def replay(steps, *flags, probes=()):
    """Run train.py with flags on the groups of every step. Returns (updates, policy).

    An update: its loss over all ranks, gradient norm, the gradient at the probes (parameter, row,
    column) that are trained, the advantages of this rank's tokens, the anchor_texts that
    sample_batch was given.
    """
    updates, upcoming = [], iter(steps)
    loss, per_token, known = [0.0], [], {}
    given_loss, given_step = losses.policy_loss, model_utils.optimizer_step

    def load_problems(name, split, *args, **kwargs):  # the groups' own, and no evaluation
        return [g.row for groups in steps for g in groups] if split == "train" else []

    def sample_batch(*args, **kwargs):
        groups = next(upcoming)
        known["texts"] = {p: [*texts] for p, texts in kwargs["anchor_texts"].items()}
        return groups, groups, 0, 0

    @functools.wraps(given_loss)  # train.py reads which settings it takes
    def policy_loss(logp, batch, **kwargs):
        out = given_loss(logp, batch, **kwargs)
        loss[0] += out.item()
        per_token.extend(batch.advantage.tolist())
        return out

    def optimizer_step(net, *args):
        params = {name.removeprefix("module."): p for name, p in net.named_parameters()}
        grads = [float(model_utils.full(params[name].grad)[i, j]) for name, i, j in probes
                 if name in params and params[name].grad is not None]
        norm = given_step(net, *args)
        total = torch.tensor(loss[0], dtype=torch.float64)
        dist.all_reduce(total)
        updates.append(dict(loss=total.item(), grad_norm=norm.item(), grads=grads,
                            advantages=list(per_token), anchor_texts=known["texts"]))
        loss[0] = 0.0
        per_token.clear()
        return norm

    def nothing(*args, **kwargs):
        pass

    sys.argv = ["train.py", f"--max_steps={len(steps)}", *flags]
    with (replaced(rollout, build_engine=nothing, sample_batch=sample_batch, sync_weights=nothing,
                   sleep_engine=nothing),
          replaced(data, load_problems=load_problems), replaced(losses, policy_loss=policy_loss),
          replaced(model_utils, optimizer_step=optimizer_step),
          replaced(plot, plot_runs=nothing), replaced(runs, save_checkpoint=nothing)):
        scope = runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    return updates, scope["policy"]


if __name__ == "__main__":
    with open(sys.argv[1]) as f:
        given = json.load(f)
    model_utils.setup_distributed()
    found = {name: replay([read_groups(given["groups"])], *flags, probes=given["probes"])[0]
             for name, flags in given["cases"].items()}
    if dist.get_rank() == 0:
        print("REPLAYED", json.dumps(found), flush=True)
    dist.destroy_process_group()
