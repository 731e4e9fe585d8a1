"""Accuracy of models on the papers' benchmarks or your own problems, through vLLM.

    python eval.py --ckpt=out/quickstart        a run: its checkpoints, on its own held-out problems
                                                (trained on a file alone: on that file)
    python eval.py config/eval_nthr.py --ckpt=Qwen/Qwen2.5-Math-1.5B     a row of [NTHR] Table 2
    python eval.py --ckpt=out/ --data=math500,mine.jsonl --n=8 --temperature=1.0    all runs in out/
    torchrun --nproc_per_node=8 -- eval.py --n=8 --temperature=1 --tp=2   `--`: torchrun has --n
    python eval.py --compare a.jsonl b.jsonl    two models' responses to the same problems

Results are in eval/ beside a run's checkpoints, else in out/eval/: results.md and .json of the last
call, and for each model and set responses, not made again. A run is asked as it was trained."""
import contextlib
import json
import math
import os
import zlib
from pathlib import Path

from rollout import build_engine, generate_all_ranks, load_weights  # before torch

import numpy as np
import torch.distributed as dist

from configurator import check, configure, die, is_rank0, load_function, print0, settings_for
from data import STYLES, encode_prompts, load_problems, load_tokenizer, of_ranks
from model_utils import setup_distributed
from runs import check_checkpoint, check_folder, free_name, read_config, write_jsonl, write_whole

ckpt = "out/quickstart"       # a run, runs, a step_* or other folder, several (commas), a hub id
as_trained = True             # ask a checkpoint of train.py with its run's prompt, length and set
data = None                   # sets and JSON Lines files, with commas; None: the run's, arithmetic
data_dir = None               # where known sets are; None: as in training, or data/
n = 1                         # responses a problem
n_of = ()                     # (("aime24", 32), ...): of sets that want another number
temperature = 0.0             # 0: greedy
max_response_tokens = None    # None: as in training, the set's own, 2048; at most what fits
max_problems = None           # the first so many of each set; None: all, or as in training
system_prompt = None          # None: as in training, else the set's own
prompt = None                 # likewise, see train.py
reward = None                 # likewise
seed = 0                      # of sampling; the number of ranks changes rounding alone
out_dir = None                # None: eval/ beside a run's checkpoints, out/eval for other models
compare = ()                  # two files of responses: compare them and do nothing else
dtype = "auto"                # of vLLM; "auto": bfloat16 on CUDA, float32 on a CPU
tp = 1                        # GPUs an engine; there are nproc / tp engines
gpu_memory_utilization = 0.9  # share of each GPU that vLLM takes
max_num_seqs = None           # sequences an engine runs at once; None: vLLM's own choice

OUT_OF_DISTRIBUTION = ("arc_c", "gpqa_diamond", "mmlu_pro")  # averaged by themselves: [DaGRPO]

# ---- statistics ----------------------------------------------------------------------------------

def pass_at_k(correct, k):
    """Probability that one of k of n responses is correct (2107.03374). correct: n of 0 or 1."""
    return 1.0 - math.comb(correct.count(0), k) / math.comb(len(correct), k)


def bootstrap(sets, seed=0):
    """[mean over sets of their means, low, high]: its 95% interval, problems drawn anew. sets:
    for each the values of its problems (P,)."""
    rng = np.random.default_rng(seed)
    means = [np.concatenate([rng.choice(values, (100, len(values))).mean(1) for _ in range(100)])
             for values in map(np.array, sets)]
    interval = np.quantile(np.mean(means, 0), (0.025, 0.975))
    return [np.mean([np.mean(values) for values in sets]), *interval]


def summarize(rows):
    """A set's figures from the rows of its file: of each problem, and `bootstrap` over them."""
    n = len(rows[0]["correct"])
    of_problems = {"accuracy": [np.mean(r["correct"]) for r in rows]}
    for k in range(2, n + 1):
        if n % k == 0:
            of_problems[f"pass@{k}"] = [pass_at_k(r["correct"], k) for r in rows]
    for key in ("length", "truncated"):
        of_problems[key] = [np.mean(r[key]) for r in rows]
    figures = {name: bootstrap([values]) for name, values in of_problems.items()}
    return {"figures": figures, "of_problems": of_problems}


def compare_files(*paths):
    """Print the difference of two files of responses and its 95% interval."""
    solved = []  # of each file {problem: share of its responses that are correct}
    try:
        for path in paths:
            _, *rows = map(json.loads, Path(path).read_text().splitlines())
            solved.append({r["problem"]: np.mean(r["correct"]) for r in rows})
        a, b = solved
    except Exception as e:  # of many kinds, since it may be any file
        die(f"compare: two files of responses are needed; {path}: {e!r}")
    both = [(a[problem], b[problem]) for problem in a if problem in b]
    if not both:
        die(f"compare: no problem is in both {' and '.join(paths)}")
    x, y = np.array(both).T
    mean, low, high = bootstrap([y - x])
    print0(f"{len(both)} problems in both: first {x.mean():.1%}, second {y.mean():.1%}")
    print0(f"difference {mean:+.1%}, 95% {low:+.1%} to {high:+.1%} (paired bootstrap)")


# ---- what to evaluate ----------------------------------------------------------------------------

def find_models(ckpt):
    """{folder: {file of weights: when it was changed}} of a part of the setting ckpt, a run's
    checkpoints oldest first, without those that are damaged; or {hub id: None}."""
    here, models = Path(ckpt).absolute(), {}
    if not here.is_dir():
        return {ckpt: None}
    folders = [here] if (here / "config.json").exists() else sorted(here.glob("step_??????"))
    for folder in folders or sorted(here.glob("*/step_??????")):
        try:
            if (folder / "trainer_state.json").exists():
                check_checkpoint(folder, unread=["optimizer.pt"])
            weights = {file.name: file.stat().st_mtime for file in folder.glob("*.safetensors")}
            models |= {str(folder): weights} if weights else {}
        except Exception as e:  # whatever is wrong with it
            print0(f"note: {folder} is damaged: {e}; left out")
    return models or die(f"ckpt: {ckpt} is neither a whole model nor a run with whole checkpoints")


def plan(model, tokenizer, room, given):
    """What to ask a model: (settings, tokenizer, problems, prompts) of every set.
    model: its name, ckpt, weights; room: tokens of its context; given: those of eval.py."""
    run, folder = {}, Path(model["ckpt"])
    if as_trained and (folder / "trainer_state.json").exists():  # its files are whole: find_models
        run = read_config(folder)
    own = run.get("eval_dataset") or run.get("dataset", "arithmetic")
    if "data" not in given:
        run["max_problems"] = run.get("eval_problems")
    for name in given.get("data", own).split(","):
        # later ones win: defaults, the set's style, the run, what was given
        how = {"dataset": name, "max_response_tokens": 2048} | STYLES.get(name, {}) | run
        how |= given | {"n": dict(n_of).get(name, n)}
        if how["n"] > 1 and how["temperature"] == 0:
            die(f"n: {how['n']} greedy responses are all the same; give a temperature")
        problems = load_problems(name, "test", "data", how.get("data_dir") or "data")
        problems = problems[: how.get("max_problems")]
        prompts = encode_prompts(tokenizer, problems, room=room - 1, key=f"data {name}",
                                 **settings_for(encode_prompts, how))
        longest = max(map(len, prompts))
        context = min(room, longest + how["max_response_tokens"])
        how["max_response_tokens"] = context - longest
        settings = model | settings_for(generate_all_ranks, how)
        settings |= dict(data=name, dtype=dtype, context=context,
                         crc32=checksum_asked(problems, prompts, how.get("reward")))
        yield settings, tokenizer, problems, prompts


def checksum_asked(problems, prompts, reward):
    """A checksum: responses to other prompts, or graded by other rules, are others."""
    asked = json.dumps(problems).encode() + np.concatenate(prompts).tobytes()
    if reward:
        load_function(reward, "reward")  # or a line that says what is wrong
        asked += Path(reward.rpartition(":")[0]).read_bytes()
    return zlib.crc32(asked)


# ---- results: files of responses, a line with the settings, then one for each problem; tables ----

def kept_rows(path, settings):
    """The rows of a file, on all ranks, after the first, the settings that they belong to; None if
    there is no such file. A file of other settings, or a damaged one, is renamed."""
    kept = None
    if is_rank0() and os.path.exists(path):
        with contextlib.suppress(ValueError, RecursionError):
            first, *rows = map(json.loads, Path(path).read_text().splitlines())
            kept = rows if first == settings else None
        if kept is None:
            os.rename(path, free_name(f"{path}.old_"))
    return of_ranks(kept)[0]


def table(rows):
    """Markdown of rows of texts, the first one the head."""
    head, *body = [f"| {' | '.join(row)} |\n" for row in rows]
    return "".join([head, "| --- " * len(rows[0]), "|\n", *body])


def averages(results):
    """More results: the mean accuracy over sets, as in the papers' tables."""
    sets = {}
    for r in results:
        name = "OOD Avg" if r["data"] in OUT_OF_DISTRIBUTION else "Avg"
        sets.setdefault((r["model"], name), []).append(r["of_problems"]["accuracy"])
    return [{"model": model, "data": name, "figures": {"accuracy": bootstrap(values)}}
            for (model, name), values in sorted(sets.items())]


def results_table(results):
    """Markdown: a row for every model and figure, shares in percent; a column for every set."""
    names = dict.fromkeys(r["data"] for r in results)
    cells = {}  # (model, figure): {set: text}
    for r in results:
        for figure, ends in r["figures"].items():
            mean, low, high = np.array(ends) * (1 if figure == "length" else 100)
            text = f"{mean:.1f} ({low:.1f} to {high:.1f})"
            cells.setdefault((r["model"], figure), {})[r["data"]] = text
    return table([["model", "figure", *names],
                  *([*key, *(row.get(name, "") for name in names)] for key, row in cells.items())])


if __name__ == "__main__":
    config = configure(globals())
    if compare:
        compare_files(*compare)
        raise SystemExit
    check(config, dict(dtype=("auto", "float32", "bfloat16"), n_of=[tuple]),
          {"> 0": "n max_problems max_response_tokens max_num_seqs gpu_memory_utilization",
           ">= 0": "temperature", "<= 1": "gpu_memory_utilization"},
          optional={str: "data data_dir system_prompt prompt reward out_dir",
                    int: "max_num_seqs max_response_tokens max_problems"})
    for pair in n_of:
        if [*map(type, pair)] != [str, int] or pair[1] < 1:
            die(f"n_of: {pair} is not a set and a number of responses")
    given = {key: value for key, value in config.items() if value is not None}
    models = {}
    for part in ckpt.split(","):
        models |= find_models(part)
    if len(models) > 1 and None in models.values():
        die("ckpt: a hub id is evaluated by itself")
    parent = os.path.commonpath([Path(folder).absolute().parent for folder in models])
    of_runs = all("/step_" in folder for folder in models)
    home = out_dir or (f"{parent}/eval" if of_runs else "out/eval")
    check_folder(home)
    jobs, first = [], None
    for folder, weights in models.items():
        tokenizer, hf_config = load_tokenizer(folder, tp, "ckpt")
        ignored = dict.fromkeys(("_name_or_path", "transformers_version", "dtype"))
        kind = hf_config.to_dict() | ignored
        first = first or kind
        if kind != first:
            die(f"ckpt: {folder} is another kind of model than the first; evaluate it by itself")
        model = {"model": os.path.relpath(folder, parent), "ckpt": folder, "weights": weights}
        jobs += plan(model, tokenizer, hf_config.max_position_embeddings, given)

    setup_distributed()
    context = max(settings["context"] for settings, *_ in jobs)
    inside, results = None, []  # inside: whose weights the engine has
    for settings, *questions in jobs:
        folder, sampling = settings["ckpt"], settings_for(generate_all_ranks, settings)
        name = settings["data"].replace("/", "_").lstrip(".")[-200:]  # one for each set
        stem = f"{name}_n{settings['n']}_t{settings['temperature']:g}"
        path = f"{home}/{settings['model']}/{stem}.jsonl"
        rows = kept_rows(path, settings)
        if rows is None:
            if inside is None:
                engine = build_engine(folder, context, **settings_for(build_engine, config))
            elif folder != inside:
                load_weights(engine, folder)
            inside = folder
            groups = generate_all_ranks(engine, *questions, **sampling)
            rows = [g.row | {"response": g.texts, "length": g.lengths, "reward": g.reward.tolist(),
                             "correct": g.correct.tolist(), "truncated": g.truncated.tolist()}
                    for g in groups]
            if is_rank0():
                check_folder(os.path.dirname(path))
                write_jsonl(path, [settings, *rows])
        results.append(settings | summarize(rows))
        print0(f"{path}: accuracy {results[-1]['figures']['accuracy'][0]:.1%}")
    if is_rank0():
        results += averages(results) if len(jobs) > len(models) else []
        text = results_table(results)
        write_whole(f"{home}/results.json", json.dumps(results, indent=1))
        write_whole(f"{home}/results.md", text)
        print0(f"\n{text}\nalso in {home}/results.md")
    dist.barrier()
    engine = None  # last, since its shutdown ends the process group
