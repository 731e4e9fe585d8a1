"""Accuracy of models on the papers' benchmarks or your own problems, through vLLM.

    python eval.py --ckpt=out/quickstart        a run: its checkpoints, on its own held-out problems
    python eval.py --ckpt=Qwen/Qwen2.5-Math-1.5B --protocol=nthr     a row of [NTHR] Table 2
    python eval.py --ckpt=out/ --data=math500,mine.jsonl --n=8 --temperature=1.0    all runs in out/
    torchrun --nproc_per_node=8 -- eval.py --ckpt=DIR --n=8 --tp=2     `--`, since torchrun has --n
    python eval.py --compare a.jsonl b.jsonl    two models' responses to the same problems

Results are in eval/ beside the checkpoints of a run, of other models in out/eval/: results.json
and results.md of the last command, accuracy.png over a run's steps, and for every model and set a
file of all responses with their grades, which is not done again. A checkpoint of train.py is asked
as it was trained: prompt and length come from its run_config.json.
"""
import json
import math
import os
import zlib
from pathlib import Path

import numpy as np

# First, since it sets torch's threads.
from rollout import build_engine, generate_all_ranks, load_weights

# isort: split
import torch.distributed as dist
from safetensors import safe_open

from configurator import check, check_folder, configure, die, is_rank0, print0, settings_for
from data import STYLES, check_lengths, encode_prompts, load_problems, load_tokenizer
from grader import vote
from model_utils import setup_distributed
from plot import plot_steps
from runs import kept_rows, write_json, write_jsonl, write_whole

# A run's folder, a folder of runs, a step_* folder, any Hugging Face folder; several folders of one
# kind of model, with commas; or a hub id.
ckpt = "out/quickstart"
protocol = None  # "nthr" or "dagrpo": the paper's sets, samples and temperature, see PROTOCOLS
# Names of data.py and JSON Lines files, with commas; None: the protocol's, the run's, or arithmetic
data = None
data_dir = None  # folder of JSON Lines files, where names are looked for before the hub
n = None  # responses a problem; None: the protocol's, else 1
temperature = None  # None: the protocol's, else 0, greedy
top_p = 1.0
# None: the protocol's, as in training, the set's own, or 2048; cut to what the context leaves
max_response_tokens = None
max_problems = None  # the first so many of each set; None: all, of a run's own as in training
system_prompt = None  # None: as in training, else the set's own
few_shot = None  # likewise
seed = 0  # of sampling; a problem's responses do not depend on the number of ranks
out_dir = None  # None: eval/ beside a run's checkpoints, out/eval for other models
compare = ()  # two files of responses: compare them and do nothing else
dtype = "auto"  # of vLLM; "auto": bfloat16 on CUDA, float32 on a CPU
tp = 1  # GPUs an engine is spread over; the ranks make nproc / this engines
gpu_memory_utilization = 0.9  # share of each GPU that vLLM takes
max_num_seqs = None  # sequences an engine runs at once; None: vLLM's own choice

OUT_OF_DISTRIBUTION = "arc_c,gpqa_diamond,mmlu_pro"  # averaged by themselves
# [NTHR] sec. 5: greedy. [DaGRPO]: temperature 0.6, avg@32 on the small sets, 1 on the others.
# Lengths: the longest that the papers trained with.
PROTOCOLS = {
    None: {},
    "nthr": {"max_response_tokens": 4000,
             "data": "aime24,amc23,math500,minerva_math,olympiadbench"},
    "dagrpo": {"max_response_tokens": 8192, "temperature": 0.6,
               "n_of": {"aime24": 32, "aime25": 32, "amc83": 32},
               "data": "aime24,aime25,amc83,math500,minerva_math,olympiadbench,"
                       + OUT_OF_DISTRIBUTION},
}

# --------------------------------------------------------------------------------------------------
# statistics

def pass_at_k(correct, k):
    """Unbiased probability that one of k of n responses is correct (arXiv 2107.03374). correct: n
    numbers, 0 or 1."""
    return 1.0 - math.comb(correct.count(0), k) / math.comb(len(correct), k)


def majority(votes, correct):
    """Probability that the most frequent of n answers is correct, ties broken at random. votes: the
    answers, None where there is none, which never wins and is not correct."""
    counts = [0 if v is None else votes.count(v) for v in votes]
    return np.mean([c for c, count in zip(correct, counts) if count == max(counts)])


def bootstrap(sets, seed=0, draws=10_000):
    """95% interval (low, high) of the mean over sets of their means, problems drawn anew. sets:
    for each the values of its problems (P,)."""
    rng = np.random.default_rng(seed)
    means = [[rng.choice(values, len(values)).mean() for _ in range(draws)]
             for values in map(np.array, sets)]
    return tuple(np.quantile(np.mean(means, 0), (0.025, 0.975)).tolist())


def mcnemar(only_a, only_b):
    """Exact two-sided p-value that two models differ, from the problems that only one solved."""
    total = only_a + only_b
    tail = sum(math.comb(total, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**total)


def summarize(rows):
    """A set's figures, with 95% intervals over its P problems, from the rows of its file."""
    n = len(rows[0]["correct"])
    figures = {"accuracy": [np.mean(r["correct"]) for r in rows]}  # each (P,)
    for k in range(2, n + 1):
        if n % k == 0:
            figures[f"pass@{k}"] = [pass_at_k(r["correct"], k) for r in rows]
    if n > 1:
        figures[f"maj@{n}"] = [majority(r["vote"], r["correct"]) for r in rows]
    summary = {name: np.mean(values) for name, values in figures.items()}
    summary |= {key: np.mean([r[key] for r in rows]) for key in ("length", "truncated")}
    summary["intervals"] = {name: bootstrap([values]) for name, values in figures.items()}
    return summary | {"by_problem": figures["accuracy"]}


def compare_files(*paths):
    """Print the difference of two files of responses, its 95% interval and McNemar's test."""
    solved = []  # of each file {problem: share of its responses that are correct}
    try:
        for path in paths:
            _, *rows = map(json.loads, Path(path).read_text().splitlines())
            solved.append({r["problem"]: np.mean(r["correct"]) for r in rows})
        a, b = solved
    except Exception as e:  # of many kinds, since it may be any file
        die(f"compare: two files of responses are needed; {path}: {e!r}")
    both = [(a[problem], b[problem]) for problem in sorted(a) if problem in b]
    if not both:
        die(f"compare: no problem is in both {' and '.join(paths)}")
    x, y = np.array(both).T
    gain = y - x
    low, high = bootstrap([gain])
    print0(f"{len(both)} problems in both: first {x.mean():.1%}, second {y.mean():.1%}")
    print0(f"difference {gain.mean():+.1%}, 95% {low:+.1%} to {high:+.1%} (paired bootstrap)")
    if {*x, *y} <= {0, 1}:  # one response a problem
        only = [*gain].count(-1), [*gain].count(1)
        print0(f"solved by one only {only}, McNemar's exact p = {mcnemar(*only):.3g}")


# --------------------------------------------------------------------------------------------------
# what to evaluate

def find_models(ckpt):
    """{folder: {file of weights: when it was changed}} of a part of the setting ckpt, a run's
    checkpoints oldest first, without those that are not whole; or {hub id: None}."""
    here, models = Path(ckpt).absolute(), {}
    if not here.is_dir():
        return {ckpt: None}
    folders = [here]
    if not (here / "config.json").exists():
        folders = sorted(here.glob("step_??????")) or sorted(here.glob("*/step_??????"))
    for folder in folders:
        index, files = folder / "model.safetensors.index.json", {"model.safetensors"}
        try:
            if index.exists():
                files = {*json.loads(index.read_text())["weight_map"].values()}
            for file in files:
                safe_open(folder / file, "pt")
            models[str(folder)] = {file: os.path.getmtime(folder / file) for file in files}
        except Exception as e:  # whatever is wrong with it
            print0(f"note: cannot read {folder}: {e}; left out")
    return models or die(f"ckpt: {ckpt} is neither a whole model nor a run with whole checkpoints")


def plan(model, tokenizer, room, given):
    """What to ask a model: (settings, tokenizer, problems, prompts) of every set.

    model: its own settings; room: tokens of its context; given: those of eval.py or a protocol."""
    run, path = {}, Path(model["ckpt"], "run_config.json")
    if path.exists() and not protocol:  # which asks all models alike
        run = json.loads(path.read_text())
    own = run.get("eval_dataset") or run.get("dataset", "arithmetic")
    if "data" not in given:
        run["max_problems"] = run.get("eval_problems")
    for name in given.get("data", own).split(","):
        how = {"dataset": name, "max_response_tokens": 2048} | STYLES.get(name, {}) | run
        how |= {"temperature": 0.0, "n": given.get("n_of", {}).get(name, 1)} | given
        if how["n"] > 1 and how["temperature"] == 0:
            die(f"n: {how['n']} greedy responses are all the same; give a temperature")
        problems = load_problems(name, "test", "data", how.get("data_dir"))
        problems = problems[: how.get("max_problems")]
        prompts = encode_prompts(tokenizer, problems, **settings_for(encode_prompts, how))
        longest = check_lengths(prompts, 1, room, f"data {name}") - 1
        context = min(room, longest + how["max_response_tokens"])
        how["max_response_tokens"] = context - longest
        # responses to other prompts are not these
        crc32 = zlib.crc32(json.dumps(problems).encode() + np.concatenate(prompts).tobytes())
        settings = model | settings_for(generate_all_ranks, how)
        settings |= {"data": name, "context": context, "crc32": crc32}
        yield settings, tokenizer, problems, prompts


# --------------------------------------------------------------------------------------------------
# results: files of responses, a line with the settings, then one for each problem; tables

def rows_of_rank0(path, settings):
    """kept_rows on all ranks, since other machines may not have the file."""
    found = [kept_rows(path, settings) if is_rank0() else None]
    dist.broadcast_object_list(found)
    return found[0]


def graded_row(g):
    votes = [None if cut else vote(text, g.row) for text, cut in zip(g.texts, g.truncated)]
    return g.row | {
        "response": g.texts, "vote": votes, "length": g.lengths,
        "correct": g.reward.tolist(), "truncated": g.truncated.tolist(),
    }


def percent(mean, interval):
    low, high = interval
    return f"{100 * mean:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def table(rows):
    """Markdown of rows of texts, the first one the head."""
    head, *body = [f"| {' | '.join(row)} |\n" for row in rows]
    return "".join([head, "| --- " * len(rows[0]), "|\n", *body])


def results_table(results):
    """Markdown: a row for every model and set."""
    text = ("| model | set | problems x n | T | figures (95%) | length | truncated |\n"
            "| --- | --- | --- | --- | --- | --- | --- |\n")
    for r in results:
        figures = ", ".join(f"{k} {percent(r[k], ends)}" for k, ends in r["intervals"].items())
        text += (f"| {r['model']} | {r['data']} | {len(r['by_problem'])} x {r['n']} "
                 f"| {r['temperature']:g} | {figures} | {r['length']:.1f} "
                 f"| {r['truncated']:.1%} |\n")
    return text


def protocol_table(results):
    """Markdown as in the papers: a row for every model, its accuracy on the sets and averaged."""
    columns = {}  # of a set or average: {model: of each set the accuracy of its problems}
    for r in results:
        average = "OOD Avg" if r["data"] in OUT_OF_DISTRIBUTION else "Avg"
        for name in (r["data"], average):
            columns.setdefault(name, {}).setdefault(r["model"], []).append(r["by_problem"])
    cells = [["model", *columns[r["data"]]]]
    for name in sorted(columns, key=lambda name: "Avg" in name):
        cells.append([name])
        for sets in columns[name].values():
            mean = np.mean([np.mean(x) for x in sets])
            cells[-1].append(percent(mean, bootstrap(sets)))
    return table([*zip(*cells)])


if __name__ == "__main__":
    config = configure(globals())
    if compare:
        compare_files(*compare)
        raise SystemExit
    check(
        config,
        dict(dtype=("auto", "float32", "bfloat16"), protocol=tuple(PROTOCOLS),
             temperature=(None, float)),
        not_negative="seed", count="n max_num_seqs max_response_tokens max_problems tp",
        text="data data_dir system_prompt out_dir")
    if (temperature or 0) < 0 or not 0 < top_p <= 1:
        die(f"temperature={temperature}, top_p={top_p}: need temperature >= 0 and 0 < top_p <= 1")
    given = PROTOCOLS[protocol] | {k: v for k, v in config.items() if v is not None}
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
        tokenizer, hf_config = load_tokenizer(folder, "ckpt")
        varying = dict.fromkeys(("_name_or_path", "transformers_version", "dtype"))
        kind = hf_config.to_dict() | varying
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
        stem = f"{Path(settings['data']).stem}_n{settings['n']}_t{settings['temperature']:g}"
        path = f"{home}/{settings['model']}/{stem}.jsonl"
        rows = rows_of_rank0(path, settings)
        if rows is None:
            if inside is None:
                engine = build_engine(folder, context, **settings_for(build_engine, config))
            elif folder != inside:
                load_weights(engine, folder)
            inside = folder
            groups = generate_all_ranks(engine, *questions, **sampling, progress=True)
            rows = [graded_row(g) for g in groups]
            if is_rank0():
                check_folder(os.path.dirname(path))
                write_jsonl(path, [settings, *rows])
        results.append(settings | summarize(rows))
        print0(f"{path}: accuracy {results[-1]['accuracy']:.1%}")
    if is_rank0():
        text = results_table(results)
        if protocol:
            text = f"{protocol_table(results)}\n{text}"
        write_json(f"{home}/results.json", results)
        write_whole(f"{home}/results.md", text)
        plot_steps(results, f"{home}/accuracy.png")
        print0(f"\n{text}\nalso in {home}/results.md")
    dist.barrier()
    engine = None  # last, since its shutdown ends the process group
