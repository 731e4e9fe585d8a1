"""A run's folder: files written whole, the log, checkpoints and which of them are whole."""
import glob
import itertools
import json
import math
import os
import shutil
import zipfile

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.tensor import DTensor, distribute_tensor

from configurator import is_rank0, print0
from model_utils import full


def write_whole(path, text):
    """Write a text file whole or not at all."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(path + ".tmp", path)


def write_json(path, value):
    """Write a value as JSON, whole or not at all."""
    write_whole(path, json.dumps(value, indent=1))


def write_jsonl(path, rows):
    """Write rows as JSON Lines, whole or not at all."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def kept_rows(path, settings):
    """The rows after the first of a file that write_jsonl left, None if there is no such file. The
    first row are the settings that they belong to: a file of others, or a damaged one, is renamed.
    """
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as f:
            first, *rows = map(json.loads, f)
        if first == settings:
            return rows
    except ValueError:
        pass
    os.rename(path, free_name(f"{path}.old_"))


def free_name(stem, suffix=""):
    """The first of stem1suffix, stem2suffix, ... that does not exist, to keep an earlier file."""
    names = (f"{stem}{i}{suffix}" for i in itertools.count(1))
    return next(name for name in names if not os.path.exists(name))


def open_log(out_dir, config, wandb_project=None):
    """A function log(row, samples=()): appends to metrics.jsonl, samples.jsonl and W&B. Rank 0."""
    if wandb_project:
        import wandb
        wandb.init(project=wandb_project, name=os.path.basename(out_dir), config=config)

    def log(row, samples=()):
        for name, rows in (("metrics.jsonl", [row]), ("samples.jsonl", samples)):
            with open(os.path.join(out_dir, name), "a") as f:
                f.writelines(json.dumps(finite(r)) + "\n" for r in rows)
        if wandb_project:
            wandb.log(row, step=row["step"])

    return log


def finite(row):
    """A row with None for nan and infinities, which JSON does not have."""
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x
            for key, x in row.items()}


def read_metrics(out_dir):
    """Rows of a run's metrics.jsonl."""
    with open(os.path.join(out_dir, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


OURS = ("metrics.jsonl", "samples.jsonl", "judge_*.jsonl", "curves.png", "run_config.json", "eval",
        "step_" + "[0-9]" * 6)


def open_run(out_dir, config, start=None):
    """Make the run's folder, with config as run_config.json; what changes goes to old_N/. Rank 0.

    start: the checkpoint that is resumed, (folder, state): settings that differ are printed, rows
    that will come again leave metrics.jsonl and samples.jsonl. None: all of an earlier run goes.
    """
    old = free_name(os.path.join(out_dir, "old_"))
    there = [p for name in OURS for p in glob.glob(os.path.join(glob.escape(out_dir), name))]
    os.makedirs(old if there else out_dir, exist_ok=True)
    if start is None:
        for path in there:
            os.rename(path, os.path.join(old, os.path.basename(path)))
        if there:
            print0(f"{out_dir} held a run; it is now in {old}")
    else:
        folder, state = start
        with open(os.path.join(folder, "run_config.json")) as f:
            before = json.load(f)
        for key, value in json.loads(json.dumps(config)).items():
            if before.get(key) != value and key != "resume":
                print0(f"note: resumed with {key} {before.get(key)!r} -> {value!r}")
        for path in there:
            if path.endswith(("metrics.jsonl", "samples.jsonl", "run_config.json")):
                shutil.copy(path, old)
            if path.endswith(("metrics.jsonl", "samples.jsonl")):
                drop_later_rows(path, state["step"])
    write_json(os.path.join(out_dir, "run_config.json"), config)


def drop_later_rows(path, step):
    """Leave in a file of rows what a run that is resumed from `step` will not write again."""
    with open(path) as f:
        lines = [line for line in f if line.endswith("\n")]  # the last may have been cut off
    rows = map(json.loads, lines)
    write_whole(path, "".join(
        line for line, row in zip(lines, rows)
        if row["step"] < step or row["step"] == step and "eval/accuracy" not in row))


# --------------------------------------------------------------------------------------------------
# checkpoints: step_000010/ is a Hugging Face folder, with the trainer's state beside the weights

def checkpoints(out_dir):
    """Checkpoint folders of a run, newest first, whole or not."""
    pattern = os.path.join(glob.escape(out_dir), "step_" + "[0-9]" * 6)
    return sorted(glob.glob(pattern), reverse=True)


def save_checkpoint(out_dir, state, model, tokenizer, optimizer, config, keep_ckpts):
    """Write out_dir/step_NNNNNN aside and rename it, then delete all but the newest. All call.

    state: JSON-able, "step" and the data's "position". model: the Hugging Face model.
    """
    final = os.path.join(out_dir, f"step_{state['step']:06d}")

    def gather(x):  # on all ranks, kept by the first
        x = full(x.detach())
        return x.cpu() if is_rank0() else None

    weights = {name: gather(p) for name, p in model.named_parameters()}
    moments = {i: {k: gather(v) for k, v in of_param.items()}
               for i, of_param in optimizer.state_dict()["state"].items()}
    if is_rank0():
        tmp = final + ".tmp"
        shutil.rmtree(tmp, ignore_errors=True)
        model.save_pretrained(tmp, state_dict=weights)
        tokenizer.save_pretrained(tmp)
        torch.save(moments, os.path.join(tmp, "optimizer.pt"))
        write_json(os.path.join(tmp, "run_config.json"), config)
        sizes = {name: os.path.getsize(os.path.join(tmp, name)) for name in os.listdir(tmp)}
        write_json(os.path.join(tmp, "trainer_state.json"), dict(state, files=sizes))
        shutil.rmtree(final, ignore_errors=True)
        os.rename(tmp, final)
        prune(out_dir, final, keep_ckpts)
    dist.barrier()


def prune(out_dir, newest, keep):
    """Delete the checkpoints up to `newest` but the last `keep`; later ones are broken."""
    for path in [p for p in checkpoints(out_dir) if p <= newest][keep:]:
        shutil.rmtree(path)


def load_optimizer(path, optimizer):
    """Restore the optimizer state of a checkpoint, sharded like the parameters if they are."""
    saved = torch.load(os.path.join(path, "optimizer.pt"), weights_only=True, mmap=True)
    state = optimizer.state_dict()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, moments in saved.items():
        p = params[i]
        if isinstance(p, DTensor):
            moments = {k: distribute_tensor(v.to(p.device), p.device_mesh, p.placements)
                       if v.shape == p.shape and v.dim() else v for k, v in moments.items()}
        state["state"][i] = moments
    optimizer.load_state_dict(state)


def check_checkpoint(path):
    """A checkpoint's state; raises unless every file is there, as long, and opens."""
    with open(os.path.join(path, "trainer_state.json")) as f:
        state = json.load(f)
    for name, size in state["files"].items():
        file = os.path.join(path, name)
        if os.path.getsize(file) != size:
            raise ValueError(f"{name} has {os.path.getsize(file)} bytes, not {size}")
        if name.endswith(".json"):
            with open(file) as f:
                json.load(f)
        elif name.endswith(".safetensors"):
            with safe_open(file, "pt") as f:
                f.keys()
        elif name.endswith(".pt") and zipfile.ZipFile(file).testzip():
            raise ValueError(f"{name} is damaged")
    return state


def newest_checkpoint(out_dir):
    """(folder, state) of the newest whole checkpoint, or None; broken ones are passed over."""
    for path in checkpoints(out_dir):
        try:
            return path, check_checkpoint(path)
        except Exception as e:  # whatever is wrong with it, an older one may be whole
            print0(f"warning: {path} is not a whole checkpoint ({e}); looking for an older one")
    return None
