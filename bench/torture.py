"""What a kill, a full disk, damage, a second run and bad numbers do to a run: make torture

    python bench/torture.py                     30 kills, on one rank and two, and all faults
    python bench/torture.py --kills=3           a shorter form
    python bench/torture.py --kills=0 --only=disk,signals

Trains a small model (the first layers of --model) for a few steps, once undisturbed, then with
every fault, and prints a table: the fault, what the run said, and whether it held: after a resume
rows, samples and weights are those of the undisturbed run, to the bit. Exit code 1 if one did not.
"""
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import rollout  # noqa: F401  before torch, whose threads it sets

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configurator import check, configure, die
from eval import table
from runs import checkpoints, checksum, read_rows

model = "models/SmolLM2-135M-Instruct"
kills = 30                    # moments at which a run is killed, each on one rank and on two
only = ""                     # of FAULTS, with commas; "": all
seed = 0                      # of the moments

# few layers have nothing right: the demonstrations are what they learn from
FLAGS = ["config/dagrpo_quickstart.py", "--prompts_per_step=2", "--prompts_per_update=1",
         "--max_steps=3", "--eval_every=1", "--eval_problems=4", "--tokens_per_micro_batch=400"]
rows = []  # of the table


def command(out, *flags, ranks=1):
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, "train.py", *FLAGS, f"--model={small}", f"--out_dir={out}", *flags]


def start(out, *flags, ranks=1):
    """A run in a process group of its own, its output as text."""
    return subprocess.Popen(command(out, *flags, ranks=ranks), cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)


def ended(process):
    """(exit code, all that it said)."""
    out, err = process.communicate()
    return process.returncode, out + err


def leaves(out):
    """What a run leaves, less times: rows, samples and sums of the last checkpoint's files."""
    varies = ("time/", "perf/")
    metrics = [{k: v for k, v in row.items() if not k.startswith(varies)}
               for row in read_rows(out)]
    samples = Path(out, "samples.jsonl").read_text()
    sums = {name: checksum(f"{checkpoints(out)[0]}/{name}")
            for name in ("model.safetensors", "optimizer.pt")}
    return metrics, samples, sums


def note(fault, what, holds):
    rows.append([fault, what, "yes" if holds else "NO"])
    print(" | ".join(rows[-1]), flush=True)


def finish(out, ranks=1):
    """Resume until the run is whole, if there is something to resume. Returns what it said."""
    resume = ["--resume"] * bool(checkpoints(out))
    return ended(start(out, *resume, ranks=ranks))


def kill_runs(whole):
    """SIGKILL at random moments of a run, then a resume."""
    draw = random.Random(seed)
    for ranks, (wanted, seconds) in whole.items():
        held = 0
        for i in range(kills):
            out = f"{folder}/kill"
            process = start(out, ranks=ranks)
            time.sleep(draw.uniform(0.3, 1.0) * seconds)
            subprocess.run(["pkill", "-KILL", "-f", out])  # ranks are in groups of their own
            process.communicate()
            code, said = finish(out, ranks)
            held += code == 0 and leaves(out) == wanted
            shutil.rmtree(out)
        note(f"SIGKILL, {ranks} rank{'s' * (ranks > 1)}", f"{held} of {kills} resumed to the bit",
             held == kills)


def signals(whole):
    """SIGTERM and Ctrl-C: the run ends after its step, with a checkpoint."""
    for ranks, (wanted, _) in whole.items():
        for number in (signal.SIGTERM, signal.SIGINT):
            out = f"{folder}/signal"
            process = start(out, ranks=ranks)
            next(line for line in process.stdout if line.startswith("step 1/"))
            process.send_signal(number)
            code, said = ended(process)
            expected = 128 + number if ranks == 1 else 1
            tidy = "stopped by signal" in said and (ranks > 1 or "Traceback" not in said)
            saved = bool(checkpoints(out))
            finish(out, ranks)
            note(f"{signal.Signals(number).name}, {ranks} rank{'s' * (ranks > 1)}",
                 f"exit {code}, checkpoint {'saved' if saved else 'missing'}, resumed",
                 code == expected and tidy and saved and leaves(out) == wanted)
            shutil.rmtree(out)


def orphans(whole):
    """torchrun itself is killed: its ranks end, too."""
    out = f"{folder}/orphans"
    process = start(out, "--max_steps=99", ranks=2)
    next(line for line in process.stdout if line.startswith("step 1/"))
    process.kill()
    process.wait()
    began, lives = time.time(), True
    while lives and time.time() < began + 100:
        time.sleep(1)
        lives = subprocess.run(["pgrep", "-f", out], capture_output=True).stdout
    note("SIGKILL of torchrun alone", f"its ranks ended after {time.time() - began:.0f} s, the "
         f"checkpoint is {Path(checkpoints(out)[0]).name}", not lives)
    shutil.rmtree(out)


def second_run(whole):
    """Another run in a folder that is in use."""
    out = f"{folder}/whole_1"
    first = start(out, "--resume", "--max_steps=4")
    while first.poll() is None and not Path(out, "old_1").exists():
        time.sleep(0.1)
    code, said = ended(start(out, "--resume", "--max_steps=4"))
    ended(first)
    note("a second run in the folder", said.strip().splitlines()[-1][-60:],
         code == 2 and f"process {first.pid}" in said)


def damage(whole):
    """A byte of every file of the newest checkpoint, one after the other."""
    held, names = 0, os.listdir(checkpoints(f"{folder}/whole_1")[0])
    for name in names:
        out = f"{folder}/damaged"
        shutil.copytree(f"{folder}/whole_1", out)
        path = Path(checkpoints(out)[0], name)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        said = subprocess.run(
            [sys.executable, "-c", "import sys, runs; runs.newest_checkpoint(sys.argv[1])", out],
            cwd=ROOT, capture_output=True, text=True).stdout
        held += "is not a whole checkpoint" in said
        shutil.rmtree(out)
    note("a byte of a checkpoint's file", f"{held} of {len(names)} files: passed over, said",
         held == len(names))


def numbers(whole):
    """A learning rate that destroys the model, and a model with a weight that is not a number."""
    code, said = ended(start(f"{folder}/rate", "--learning_rate=1e30"))
    note("--learning_rate=1e30", said.strip().splitlines()[-1], code == 2)
    broken = AutoModelForCausalLM.from_pretrained(small)
    broken.model.norm.weight.data[0] = torch.nan
    shutil.copytree(small, f"{folder}/broken")
    broken.save_pretrained(f"{folder}/broken")
    code, said = ended(start(f"{folder}/nan", f"--model={folder}/broken", "--max_steps=9"))
    line = next((line for line in said.splitlines() if line.startswith("error: ")), said[-80:])
    note("a weight that is not a number", line.replace(folder, "")[:110],
         code == 1 and not checkpoints(f"{folder}/nan"))


def disk(whole):
    """A disk that fills up while a checkpoint, and while a row is written; and one too small."""
    size = sum(f.stat().st_size for f in Path(checkpoints(f"{folder}/whole_1")[0]).iterdir())
    for wanted, what, room in ((0, "for no checkpoint", 0.5), (1, "for one checkpoint", 1.5)):
        mount = f"{folder}/mount"
        os.makedirs(mount)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(room * size)}", "tmpfs",
                           mount], capture_output=True).returncode:
            note(f"a disk with room {what}", "not tried: no right to mount one", True)
            return
        try:
            code, said = ended(start(f"{mount}/run"))
            line = next((x for x in said.splitlines() if x.startswith("error: ")), "")
            kept = len(checkpoints(f"{mount}/run"))
            goes_on, _ = ended(start(f"{mount}/run", *["--resume"] * wanted,
                                     "--on_full_disk=go on"))
            note(f"a disk with room {what}", line.replace(folder, "")[:110],
                 code == 1 and goes_on == 0 and kept == wanted
                 and not list(Path(mount).glob("run/*.tmp")))
        finally:
            subprocess.run(["umount", mount])
            os.rmdir(mount)


def fuzz(whole):
    """20,000 inputs each for what reads from outside."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/test_fuzz.py"], cwd=ROOT,
                          env=dict(os.environ, FUZZ="20000"), capture_output=True, text=True)
    note("20,000 inputs each, hypothesis", done.stdout.strip().splitlines()[-1],
         done.returncode == 0)


FAULTS = dict(kills=kill_runs, signals=signals, orphans=orphans, second=second_run,
              damage=damage, numbers=numbers, disk=disk, fuzz=fuzz)

if __name__ == "__main__":
    config = configure(globals())
    chosen = only.split(",") if only else [*FAULTS]
    check(dict(config, only=tuple(chosen)), dict(only=[*FAULTS]), {">= 0": "kills"})
    with tempfile.TemporaryDirectory() as folder:
        small = f"{folder}/small"
        for auto in (AutoModelForCausalLM, AutoTokenizer):
            auto.from_pretrained(model, num_hidden_layers=4).save_pretrained(small)
        whole = {}  # by ranks: what the undisturbed run leaves, and its seconds
        for ranks in (1, 2) if {"kills", "signals"} & {*chosen} else (1,):
            began = time.time()
            code, said = ended(start(f"{folder}/whole_{ranks}", ranks=ranks))
            if code:
                die(f"torture: the undisturbed run failed: {said[-2000:]}")
            whole[ranks] = leaves(f"{folder}/whole_{ranks}"), time.time() - began
            print(f"undisturbed, {ranks} ranks: {whole[ranks][1]:.0f} s", flush=True)
        for name in chosen:
            FAULTS[name](whole)
    print(f"\n{table([['fault', 'what happened', 'held'], *rows])}")
    raise SystemExit(any(row[-1] == "NO" for row in rows))
