"""A run's folder: files written whole, the log, checkpoints and which of them are whole."""
import contextlib
import errno
import fcntl
import glob
import hashlib
import itertools
import json
import os
import shutil
import signal
import socket
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor, distribute_tensor

from configurator import blame, die, is_rank0, print0
from model_utils import full, plain_weights


def write_whole(path, text):
    """Write a text file whole or not at all."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        f.write(text)
    to_disk(f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def to_disk(path):
    """Wait until a file or folder is where no power cut takes it."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def write_jsonl(path, rows):
    """Write rows as JSON Lines, whole or not at all."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


@contextlib.contextmanager
def or_say_so(out_dir, what, on_full_disk):
    """Its body writes `what`; if that fails, a line says so and the run ends with 1, or goes on."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:  # a checkpoint raises the last two
        free = shutil.disk_usage(out_dir).free / 2**30
        print(f"error: {what} is not written: {e}; {free:.2f} GiB are free in {out_dir}")
        if on_full_disk == "stop":
            raise SystemExit(1)


def check_space(out_dir, model):
    """Raise OSError if there is no room for a checkpoint: weights, and moments of the trained."""
    need = 4 * model.num_parameters() + 8 * model.num_parameters(only_trainable=True)
    if shutil.disk_usage(out_dir).free < need:
        raise OSError(f"it takes {need / 2**30:.2f} GiB")


def free_name(stem):
    """The first of stem1, stem2, ... that does not exist, to keep an earlier file."""
    return next(f"{stem}{i}" for i in itertools.count(1) if not os.path.exists(f"{stem}{i}"))


def log(out_dir, **files):
    """Append rows to files: metrics=[...] are those of metrics.jsonl, whole or not at all. One rank
    a file. JSON has no nan and no infinities: they become null."""
    for name in filter(files.get, files):  # those with rows
        rows = json.loads(json.dumps(files[name]), parse_constant=lambda _: None)
        text = "".join(json.dumps(r) + "\n" for r in rows).encode()
        with open(f"{out_dir}/{name}.jsonl", "ab", buffering=0) as f:
            end = f.tell()
            if f.write(text) < len(text):  # the disk is full
                f.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f.name)


def read_rows(out_dir, name="metrics"):
    """Rows of a file that a run logs to, without those that are cut off or damaged; or none."""
    path, rows = Path(out_dir, f"{name}.jsonl"), []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError, LookupError, OverflowError):
            row = json.loads(line)
            rows.append(row | {"step": int(row["step"])})
    return rows


def read_config(folder):
    """The settings of a run or of a checkpoint of one."""
    return json.loads(Path(folder, "run_config.json").read_text())


def check_folder(path):
    """Make a folder to write to, or end the program."""
    with blame(f"out_dir: {path!r} cannot be written to"):
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


STEPS = "step_" + "[0-9]" * 6
CHANGING = ("metrics.jsonl", "samples.jsonl", "right_answers.jsonl", "run_config.json")
OURS = (*CHANGING, "judge_*.jsonl", "curves.png", "report.html", "eval", "bad_step_*.pt", STEPS)


def catch_signals(signals):
    """SIGTERM and Ctrl-C add themselves to the list `signals`: the run ends after its step. One
    that comes two seconds later or more ends it at once (torchrun repeats the first)."""
    def handler(number, frame):
        signals.append((number, time.time()))
        if signals[-1][1] > signals[0][1] + 2:
            os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def lock_folder(out_dir):
    """A file to be kept open: no other run writes to the folder as long as this process lives. On
    NFS the server keeps the lock. Ends the program if another process has it."""
    lock = open(f"{out_dir}/lock", "a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        die(f"out_dir: {out_dir} belongs to a run that is under way: {lock.read()}")
    lock.truncate(0)
    print(f"{socket.gethostname()}, process {os.getpid()}", file=lock, flush=True)
    return lock


def open_run(out_dir, config, start=None):
    """Make the run's folder, with config as run_config.json; what changes goes to old_N/. Rank 0.
    start: the checkpoint that is resumed, (folder, state): settings that differ are printed, rows
    that will come again leave the .jsonl of CHANGING. None: all of an earlier run goes."""
    if start:
        before = read_config(start[0])
        for key, value in json.loads(json.dumps(config)).items():
            if before.get(key) != value and key != "resume":
                print0(f"note: resumed with {key} {before.get(key)!r} -> {value!r}")
                if key == "lora_rank" or key == "model" and config.get("lora_rank"):
                    die(f"{key}: adapters are resumed with the rank, and on the model, of before")
    old = free_name(f"{out_dir}/old_")
    there = [p for name in OURS for p in glob.glob(f"{glob.escape(out_dir)}/{name}")]
    os.makedirs(old if there else out_dir, exist_ok=True)
    for path in there:
        if start is None:
            os.rename(path, f"{old}/{os.path.basename(path)}")
        elif path.endswith(CHANGING):
            shutil.copy(path, old)
            if path.endswith(".jsonl"):
                rows = read_rows(out_dir, Path(path).stem)
                write_jsonl(path, [row for row in rows if row["step"] <= start[1]["step"]])
    if there and start is None:
        print0(f"{out_dir} held a run; it is now in {old}")
    write_whole(f"{out_dir}/run_config.json", json.dumps(config, indent=1))


# ---- checkpoints: step_000010/ is a Hugging Face folder, with the trainer's state beside it ------

def checkpoints(out_dir):
    """Checkpoint folders of a run, newest first, whole or not."""
    return sorted(glob.glob(f"{glob.escape(str(out_dir))}/{STEPS}"), reverse=True)


def save_checkpoint(out_dir, state, model, tokenizer, optimizer, config):
    """Write out_dir/step_NNNNNN aside and rename it, then keep the newest. All ranks call.
    state: JSON-able, "step" and the data's "position". model: the Hugging Face model."""
    def gather(x):  # on all ranks, kept by the first
        x = full(x.detach())
        return x.cpu() if is_rank0() else None

    weights = {name: gather(w) for name, w in plain_weights(model)}
    adapters = {name: gather(p) for name, p in model.named_parameters() if ".lora_" in name}
    moments = {i: {k: gather(v) for k, v in of_param.items()}
               for i, of_param in optimizer.state_dict()["state"].items()}
    if is_rank0():
        final = f"{out_dir}/step_{state['step']:06d}"
        tmp = f"{final}.tmp"
        shutil.rmtree(tmp, ignore_errors=True)
        if not all(w.isfinite().all() for w in weights.values()):
            die(f"{final} is not written: a weight is not finite", code=1)
        with or_say_so(out_dir, final, config["on_full_disk"]):
            check_space(out_dir, model)
            try:
                model.save_pretrained(tmp, state_dict=weights)
                tokenizer.save_pretrained(tmp, save_jinja_files=False)  # they may be a folder
                torch.save(moments, f"{tmp}/optimizer.pt")
                if adapters:
                    torch.save(adapters, f"{tmp}/adapters.pt")
                write_whole(f"{tmp}/run_config.json", json.dumps(config, indent=1))
                files = {name: checksum(f"{tmp}/{name}") for name in os.listdir(tmp)}
                write_whole(f"{tmp}/trainer_state.json", json.dumps(dict(state, files=files)))
                for name in (*files, ""):  # the last is the folder
                    to_disk(f"{tmp}/{name}")
                shutil.rmtree(final, ignore_errors=True)
                os.rename(tmp, final)
            finally:
                shutil.rmtree(tmp, ignore_errors=True)
            to_disk(out_dir)
            prune(out_dir, final, config["keep_ckpts"])
    dist.barrier()


def prune(out_dir, newest, keep):
    """Keep the last `keep` of the checkpoints up to `newest`; later ones are broken, and stay."""
    for path in [p for p in checkpoints(out_dir) if p[-6:] <= newest[-6:]][keep:]:
        shutil.rmtree(path)


def load_optimizer(path, optimizer):
    """Restore the optimizer state of a checkpoint, sharded like the parameters if they are."""
    saved = torch.load(f"{path}/optimizer.pt", weights_only=True, mmap=True)
    for i, moments in saved.items():
        p = optimizer.param_groups[0]["params"][i]
        for key, x in moments.items():
            if isinstance(p, DTensor) and x.shape == p.shape:
                moments[key] = distribute_tensor(x.to(p.device), p.device_mesh, p.placements)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": saved})


def checksum(path):
    """SHA-256 of a file, str."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_checkpoint(path, unread=()):
    """A checkpoint's state; raises if one of its files, but those unread, is not as written."""
    state = json.loads(Path(path, "trainer_state.json").read_text())
    for name, written in state["files"].items():
        if name not in unread and checksum(f"{path}/{name}") != written:
            raise ValueError(f"{name} is damaged")
    return state


def newest_checkpoint(out_dir):
    """(folder, state) of the newest whole checkpoint, or None; broken ones are passed over."""
    for path in checkpoints(out_dir):
        try:
            return path, check_checkpoint(path)
        except Exception as e:  # whatever is wrong with it, an older one may be whole
            print0(f"warning: {path} is not a whole checkpoint ({e}); looking for an older one")
