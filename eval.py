"""Accuracy of a model on a set of problems, through vLLM.

    python eval.py --ckpt=out/quickstart                             a run: its newest whole checkpoint
    python eval.py --ckpt=Qwen/Qwen2.5-Math-1.5B --data=math.jsonl   a hub id or Hugging Face folder, a file of problems
    python eval.py --ckpt=out/quickstart --n=8 --temperature=1.0     sampled instead of greedy

A checkpoint of train.py is asked the way it was trained: prompt and length come from its run_config.json unless given
here. Under torchrun the problems are split over the ranks.
"""
import json
import os

from configurator import configure, die, is_rank0, print0

ckpt = "out/quickstart"       # a run's folder, one of its step_* folders, any Hugging Face folder, or a hub id
data = None                   # a built-in set or a JSON Lines file; None: the held-out problems of the run, or arithmetic
n = 1                         # responses a problem
temperature = 0.0             # 0: greedy
top_p = 1.0
max_response_tokens = None    # tokens; None: as in training, else the set's own, else 2048
max_problems = None           # the first so many; None: all of a file, as many as in training of a run's own set
system_prompt = None          # None: as in training, else the set's own
few_shot = None               # likewise
seed = 0
output = None                 # results file; None: eval_<data>_n<n>_t<temperature>.jsonl in the run's or in out/eval
dtype = "auto"                # of vLLM; "auto": bfloat16 on CUDA, float32 on a CPU
gpu_memory_utilization = 0.9  # share of each GPU that vLLM takes (CUDA)
max_num_seqs = 256            # sequences a vLLM engine runs at once

config = configure(globals())

from rollout import (DATASETS, accuracy, build_engine, check_lengths, encode_prompts, generate_all_ranks, load_problems,
                     load_tokenizer, write_jsonl)

for key in ("n", "max_num_seqs", "max_response_tokens", "max_problems"):
    if config[key] is not None and (not isinstance(config[key], int) or config[key] < 1):
        die(f"{key}: {config[key]!r} is not a positive number")
if temperature < 0 or not 0 < top_p <= 1:
    die(f"temperature={temperature}, top_p={top_p}: need temperature >= 0 and 0 < top_p <= 1")
if dtype not in ("auto", "float32", "bfloat16"):
    die(f"dtype: {dtype!r} is none of auto, float32, bfloat16")
if n > 1 and temperature == 0:
    die(f"n: {n} greedy responses are all the same; give a temperature")

folder = ckpt
if os.path.isdir(ckpt) and not os.path.isfile(os.path.join(ckpt, "config.json")):
    from model_utils import newest_checkpoint
    runs = [ckpt] + sorted((e.path for e in os.scandir(ckpt) if e.is_dir() and not e.name.startswith("old_")),
                           key=os.path.getmtime, reverse=True)
    found = next((f for f in map(newest_checkpoint, runs) if f), None)
    if found is None:
        die(f"ckpt: {ckpt} is neither a Hugging Face folder (no config.json) nor a run with a whole checkpoint (step_*)")
    folder = found[0]
run = {}
if os.path.isfile(os.path.join(folder, "run_config.json")):
    with open(os.path.join(folder, "run_config.json")) as f:
        run = json.load(f)
    max_problems = run["eval_problems"] if data is None and max_problems is None else max_problems
    data = data or run["eval_dataset"] or run["dataset"]
data = data or "arithmetic"
style = run.get("dataset", data)  # the set whose prompt the model knows
system_prompt = run.get("system_prompt") if system_prompt is None else system_prompt
few_shot = run.get("few_shot") if few_shot is None else few_shot
max_response_tokens = (max_response_tokens or run.get("max_response_tokens")
                       or DATASETS.get(data, {}).get("max_response_tokens", 2048))

problems = load_problems(data, "test", "data")[:max_problems]
tokenizer, hf_config = load_tokenizer(folder, "ckpt")
prompts = encode_prompts(tokenizer, problems, style, system_prompt, few_shot)
context = check_lengths(prompts, max_response_tokens, hf_config.max_position_embeddings, f"data {data}")

import torch

from model_utils import setup_distributed

device = setup_distributed()
engine = build_engine(folder, context, seed, ("bfloat16" if device.type == "cuda" else "float32") if dtype == "auto"
                      else dtype, gpu_memory_utilization, max_num_seqs)
torch.manual_seed(seed + int(os.environ["RANK"]))  # of vLLM's sampling
groups = generate_all_ranks(engine, tokenizer, problems, prompts, n=n, temperature=temperature, top_p=top_p,
                            max_response_tokens=max_response_tokens, progress=True)

lengths = [len(r) for g in groups for r in g["responses"]]
summary = dict(ckpt=folder, data=data, accuracy=accuracy(groups), problems=len(groups), responses=len(lengths), n=n,
               temperature=temperature, top_p=top_p, max_response_tokens=max_response_tokens, seed=seed,
               mean_length=sum(lengths) / len(lengths),
               truncated=sum(int(g["truncated"].sum()) for g in groups) / len(lengths))
if is_rank0():
    home = ckpt if os.path.isdir(ckpt) and folder != ckpt else os.path.join("out", "eval")
    stem = "_".join(os.path.basename(p.rstrip("/")).removesuffix(".jsonl") for p in ((data,) if run else (folder, data)))
    output = output or os.path.join(home, f"eval_{stem}_n{n}_t{temperature:g}.jsonl")
    os.makedirs(os.path.dirname(output) or ".", exist_ok=True)
    write_jsonl(output, [summary] + [
        dict(problem=g["problem"], answer=g["answer"], response=g["texts"][i], correct=bool(g["rewards"][i]),
             truncated=bool(g["truncated"][i]), tokens=len(g["responses"][i]))
        for g in groups for i in range(n)])
    print0(f"{folder} on {data}: accuracy {summary['accuracy']:.1%} ({len(groups)} problems x {n}, "
           f"{'greedy' if temperature == 0 else f'temperature {temperature:g}'}), mean length "
           f"{summary['mean_length']:.1f} tokens, {summary['truncated']:.1%} truncated; responses in {output}")
del engine  # last: its shutdown ends the process group
