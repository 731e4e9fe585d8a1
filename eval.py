"""Accuracy of models on the papers' benchmarks or your own problems, through vLLM, with intervals and paired comparisons.

    python eval.py --ckpt=out/quickstart                              a run: its checkpoints, on its own held-out problems
    python eval.py --ckpt=Qwen/Qwen2.5-Math-1.5B --protocol=nthr      a row of the NTHR paper's Table 2
    python eval.py --ckpt=out/ --data=math500,mine.jsonl --n=8 --temperature=1.0     every checkpoint of every run in out/
    torchrun --nproc_per_node=8 eval.py --ckpt=DIR --protocol=dagrpo --tp=2    four engines on two GPUs each
    torchrun --nproc_per_node=8 -- eval.py --n=8 ...                  with `--`: torchrun takes `--n` for one of its own
    python eval.py --compare a.jsonl b.jsonl                          two models' responses to the same problems

Everything is under the run's eval/ (other models: out/eval/): every response with its grade, written as it comes, so that an
interrupted evaluation goes on where it stopped; results.json and results.md; accuracy.png over a run's steps.
A checkpoint of train.py is asked the way it was trained: prompt and length come from its run_config.json.
"""
import hashlib
import json
import math
import os
import shutil
import sys

import numpy as np

from configurator import check, check_folder, check_tp, configure, die, is_rank0, print0
from grader import vote
from rollout import build_engine, generate_all_ranks, load_weights  # before torch: it sets its threads
from data import STYLES, check_lengths, encode_prompts, load_problems, load_tokenizer
from runs import check_checkpoint, checkpoints, free_name, save_figure, write_json, write_jsonl, write_whole

ckpt = "out/quickstart"       # a run's folder, a folder of runs, a step_* folder, any Hugging Face folder, or a hub id;
                              # several, of one kind of model, separated by commas
protocol = None               # "nthr" or "dagrpo": the paper's sets, samples and temperature, see PROTOCOLS
data = None                   # sets, separated by commas: names (data.SETS) and JSON Lines files; None: the protocol's,
                              # else the held-out problems of the run, else arithmetic
data_dir = None               # folder of JSON Lines files, where names are looked for before the Hugging Face hub
n = None                      # responses a problem; None: the protocol's, else 1
temperature = None            # None: the protocol's, else 0, greedy
top_p = 1.0
max_response_tokens = None    # tokens; None: as in training, else the protocol's or the set's own, else 2048
max_problems = None           # the first so many of each set; None: all, or as many as in training of a run's own set
system_prompt = None          # None: as in training, else the set's own
few_shot = None               # likewise
seed = 0                      # of sampling; a problem's responses depend on it alone, not on ranks or interruptions
out_dir = None                # None: eval/ in the run's folder, out/eval for other models
save_every = 256              # responses an engine makes between two writes; an interruption loses at most these
compare = ()                  # two files of responses: compare them and do nothing else
dtype = "auto"                # of vLLM; "auto": bfloat16 on CUDA, float32 on a CPU
tp = 1                        # GPUs an engine is spread over; the ranks make nproc / this engines
gpu_memory_utilization = 0.9  # share of each GPU that vLLM takes (CUDA)
max_num_seqs = None           # sequences a vLLM engine runs at once; None: vLLM's own choice

# [NTHR] sec. 5: greedy, five sets. [DaGRPO]: temperature 0.6, avg@32 on the small sets, one sample on the others; then three
# sets out of distribution, averaged by themselves. Response lengths: the longest that the papers trained with.
PROTOCOLS = {
    "nthr": dict(temperature=0.0, max_response_tokens=4000, averages={"Avg": dict(
        aime24=1, amc23=1, math500=1, minerva_math=1, olympiadbench=1)}),
    "dagrpo": dict(temperature=0.6, max_response_tokens=8192, averages={
        "Avg": dict(aime24=32, aime25=32, amc83=32, math500=1, minerva_math=1, olympiadbench=1),
        "OOD Avg": dict(arc_c=1, gpqa_diamond=1, mmlu_pro=1)}),
}

# ---------------------------------------------------------------------------------------------------------------------
# statistics


def pass_at_k(n, correct, k):
    """Unbiased probability that one of k responses, drawn from n of which `correct` are, is correct (arXiv 2107.03374)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def maj_at_k(answers, correct, k, seed=0, draws=100):
    """Probability that the most frequent answer of k responses is correct.

    answers: n hashables, None for no answer, which never wins; correct: n bools. Ties share the vote. k = n: exactly;
    k < n: the mean over `draws` subsets of k, seeded.
    """
    rng, n = np.random.default_rng(seed), len(answers)
    subsets = [range(n)] if k == n else [rng.choice(n, k, replace=False) for _ in range(draws)]
    won = 0.0
    for subset in subsets:
        votes = {}
        for i in subset:
            if answers[i] is not None:
                votes.setdefault(answers[i], []).append(correct[i])
        most = max(map(len, votes.values()), default=0)
        tied = [np.mean(v) for v in votes.values() if len(v) == most]
        won += float(np.mean(tied)) if tied else 0.0
    return won / len(subsets)


def bootstrap(sets, seed=0, draws=10_000):
    """95% interval of the mean over sets of each set's mean. sets: [values of the problems (P,), ...], problems drawn anew."""
    rng, means = np.random.default_rng(seed), np.zeros(draws)
    for values in map(np.asarray, sets):
        for a in range(0, draws, 500):  # 500 x P numbers at a time
            means[a:a + 500] += values[rng.integers(0, len(values), (min(500, draws - a), len(values)))].mean(1) / len(sets)
    return tuple(float(x) for x in np.quantile(means, (0.025, 0.975)))


def mcnemar(only_a, only_b):
    """Exact two-sided p-value that two models differ, from the problems that only one of them solved."""
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def summarize(rows, n, seed=0):
    """A set's figures from its rows (problem i's n responses at i n to i n + n), with 95% intervals over problems."""
    correct = np.array([r["correct"] for r in rows], dtype=float).reshape(-1, n)                # (P, n)
    by_problem = {"accuracy": correct.mean(1)}                                                  # name: (P,)
    for k in [2**i for i in range(1, n.bit_length()) if 2**i <= n] + ([n] if n & (n - 1) else []):
        by_problem[f"pass@{k}"] = [pass_at_k(n, int(c), k) for c in correct.sum(1)]
        by_problem[f"maj@{k}"] = [maj_at_k([r["vote"] for r in rows[i * n:i * n + n]], correct[i], k, seed)
                                  for i in range(len(correct))]
    return dict({name: float(np.mean(x)) for name, x in by_problem.items()},
                intervals={name: bootstrap([x], seed) for name, x in by_problem.items()},
                problems=len(correct), responses=len(rows), mean_length=float(np.mean([r["tokens"] for r in rows])),
                truncated=float(np.mean([r["truncated"] for r in rows])), by_problem=correct.mean(1).tolist())


# ---------------------------------------------------------------------------------------------------------------------
# files of responses

def read_responses(path):
    """(settings, rows) of a file of responses; a row cut off in the middle is left out. Raises ValueError, OSError."""
    lines = []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                lines.append(json.loads(line))
            except ValueError:
                if line.endswith("\n"):
                    raise ValueError(f"{path}, line {number}: not JSON") from None
    if not lines or not isinstance(lines[0], dict) or "n" not in lines[0]:
        raise ValueError(f"{path}, line 1: not the settings that eval.py writes there")
    for number, row in enumerate(lines[1:], 2):
        if not isinstance(row, dict) or not {"problem", "correct"} <= row.keys():
            raise ValueError(f"{path}, line {number}: 'problem' or 'correct' is missing")
    return lines[0], lines[1:]


def compare_files(a, b):
    """Print a paired comparison of two files of responses: difference, its 95% bootstrap interval, McNemar's test."""
    solved = []
    for path in (a, b):
        try:
            _, rows = read_responses(path)
        except (OSError, ValueError) as e:
            die(f"compare: {getattr(e, 'strerror', None) and f'{path}: {e.strerror}' or e}")
        problems = {}
        for row in rows:  # a problem that stands twice in a set counts once
            problems.setdefault(row["problem"], []).append(float(row["correct"]))
        solved.append(problems)
    both = [p for p in solved[0] if p in solved[1]]
    if not both:
        die(f"compare: {a} and {b} have no problem in common")
    for path, problems in zip((a, b), solved):
        if len(problems) > len(both):
            print0(f"note: {len(problems) - len(both)} problems are in {path} only and left out")
    x, y = (np.array([np.mean(problems[p]) for p in both]) for problems in solved)
    low, high = bootstrap([y - x])
    print0(f"{len(both)} problems: {a} {x.mean():.1%}, {b} {y.mean():.1%}\n"
           f"difference {100 * (y - x).mean():+.1f} points, 95% interval [{100 * low:+.1f}, {100 * high:+.1f}] (paired bootstrap)")
    if set(np.unique([x, y])) <= {0.0, 1.0}:
        only_a, only_b = int(((x == 1) & (y == 0)).sum()), int(((x == 0) & (y == 1)).sum())
        print0(f"solved by the first only {only_a}, by the second only {only_b}: McNemar's exact p = {mcnemar(only_a, only_b):.3g}")
    else:
        print0("McNemar's test is for one response a problem; these have several")


def weights_of(folder):
    """What tells these weights from others under the same name, or None for a hub id."""
    if not os.path.isdir(folder):
        return None
    return [[name, os.path.getsize(p), os.stat(p).st_mtime_ns] for name in sorted(os.listdir(folder))
            if name.endswith(".safetensors") for p in [os.path.join(folder, name)]]


def finished(path, settings, problems):
    """Rows of whole problems from an earlier evaluation with these settings, of any number of problems: {index: [n rows]}."""
    try:
        saved, rows = read_responses(path)
    except (OSError, ValueError):
        return {}
    groups = {}
    for row in rows if saved == json.loads(json.dumps(settings)) else ():
        groups.setdefault(row["index"], []).append(row)
    return {i: g for i, g in groups.items() if len(g) == settings["n"] and i < len(problems)
            and all((r["problem"], r["answer"]) == (problems[i]["problem"], problems[i]["answer"]) for r in g)}


def start_file(path, settings, done):
    """Begin or go on with a file of responses. If it holds others (of other settings, or to a problem that has changed since),
    it is kept as it was, as NAME.old_1.jsonl."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.exists(path):
        with open(path, "rb") as f:
            others = sum(line.endswith(b"\n") for line in f) - 1 - sum(map(len, done.values()))
        if others >= settings["n"]:  # less is a problem whose responses were cut off, and come again
            shutil.copy(path, free_name(path.removesuffix("jsonl") + "old_", ".jsonl"))
    write_jsonl(path, [settings] + [row for group in done.values() for row in group])


# ---------------------------------------------------------------------------------------------------------------------
# what to evaluate

def check_weights(folder):
    """Raise unless a Hugging Face folder has all of its .safetensors files and they can be opened."""
    from safetensors import safe_open

    names = {f for f, *_ in weights_of(folder)}
    if os.path.isfile(index := os.path.join(folder, "model.safetensors.index.json")):
        with open(index) as f:
            names |= set(json.load(f)["weight_map"].values())
    if not names:
        raise ValueError("no .safetensors file")
    for name in names:
        with safe_open(os.path.join(folder, name), "pt") as f:
            f.keys()


def find_models(ckpt):
    """[(label, folder or hub id, folder of its results), ...] for one of the settings' ckpt, a run's checkpoints oldest first.

    Ends the program if there is nothing whole.
    """
    home = os.path.join(ckpt, "eval")
    if not os.path.isdir(ckpt) or os.path.isfile(os.path.join(ckpt, "config.json")):
        found = [(os.path.basename(ckpt.rstrip("/")), ckpt)]
        of_run = os.path.isfile(os.path.join(ckpt, "run_config.json"))
        home = os.path.join(os.path.dirname(os.path.normpath(ckpt)) if of_run else "out", "eval")
    else:
        found = [(os.path.basename(f), f) for f in reversed(checkpoints(ckpt))]
        for e in sorted(os.scandir(ckpt), key=lambda e: e.name) if not found else ():
            if e.is_dir() and not e.name.startswith("old_"):
                here = [e.path] if os.path.isfile(os.path.join(e.path, "config.json")) else reversed(checkpoints(e.path))
                found += [(os.path.relpath(f, ckpt), f) for f in here]
    whole = []
    for label, folder in found:
        try:
            if os.path.isfile(os.path.join(folder, "trainer_state.json")):
                check_checkpoint(folder)
            elif os.path.isdir(folder):
                check_weights(folder)
        except Exception as e:  # whatever is wrong with it
            if len(found) == 1:
                die(f"ckpt: cannot read {folder}: {e}")
            print0(f"warning: {folder} is not a whole checkpoint ({e}); left out")
            continue
        whole.append((label, folder, out_dir or home))
    if not whole:
        die(f"ckpt: {ckpt} is neither a Hugging Face folder (no config.json) nor a run with a whole checkpoint (step_*)")
    return whole


def plan(models):
    """Every evaluation to do, a dict each, with problems, prompts, settings and file; ends the program on bad input."""
    spec = PROTOCOLS.get(protocol, {})
    counts = {name: k for sets in spec.get("averages", {}).values() for name, k in sets.items()}
    loaded, shapes, jobs = {}, set(), []
    for label, folder, home in models:
        run = {}
        if os.path.isfile(os.path.join(folder, "run_config.json")):
            with open(os.path.join(folder, "run_config.json")) as f:
                run = json.load(f)
        own = run.get("eval_dataset") or run.get("dataset", "arithmetic")
        asked = {} if protocol else run  # a protocol asks every model in the same way
        tokenizer, hf_config = load_tokenizer(folder, "ckpt")
        if hf_config.num_attention_heads % tp:
            die(f"tp: {tp} does not divide the {hf_config.num_attention_heads} attention heads of {folder}")
        for name in (data.split(",") if data else list(counts) or [own]):
            limit = max_problems or (run["eval_problems"] if run and not data and not protocol else None)
            if name not in loaded:
                loaded[name] = load_problems(name, "test", "data", data_dir or run.get("data_dir"))
            problems = loaded[name][:limit]
            style = name if any("n_choices" in row for row in problems) else asked.get("dataset", name)
            prompts = encode_prompts(tokenizer, problems, style, asked.get("system_prompt") if system_prompt is None else
                                     system_prompt, asked.get("few_shot") if few_shot is None else few_shot)
            k = n or counts.get(name, 1)
            heat = spec.get("temperature", 0.0) if temperature is None else temperature
            if k > 1 and heat == 0:
                die(f"n: {k} greedy responses are all the same; give a temperature")
            room = hf_config.max_position_embeddings
            length = max_response_tokens or asked.get("max_response_tokens") or spec.get("max_response_tokens") \
                or STYLES.get(name, {}).get("max_response_tokens", 2048)
            if not max_response_tokens and 0 < (fits := room - max(map(len, prompts))) < length:
                print0(f"note: {name}: responses of {fits} tokens at most, the rest of the model's context of {room}")
                length = fits
            context = check_lengths(prompts, length, room, f"data {name}")
            stem = os.path.basename(name).removesuffix(".jsonl")
            settings = dict(ckpt=os.path.abspath(folder) if os.path.isdir(folder) else folder, weights=weights_of(folder),
                            data=name, n=k, temperature=heat, top_p=top_p, max_response_tokens=length, seed=seed,
                            prompt=hashlib.sha256(prompts[0].tobytes()).hexdigest()[:16])  # of the first problem
            path = os.path.join(home, label, f"{stem}_n{k}_t{heat:g}.jsonl")
            if any(j["path"] == path for j in jobs):
                die(f"data: responses to two sets would go to {path}; rename one")
            jobs.append(dict(label=label, folder=folder, name=name, home=home, problems=problems, prompts=prompts, n=k,
                             temperature=heat, length=length, context=context, path=path, settings=settings,
                             tokenizer=tokenizer, done=finished(path, settings, loaded[name])))
        shapes.add(json.dumps({k: v for k, v in sorted(hf_config.to_dict().items()) if k not in (
            "_name_or_path", "transformers_version", "dtype", "torch_dtype")}, default=str))
    if len(shapes) > 1:
        die(f"ckpt: {ckpt} holds {len(shapes)} kinds of models (config.json), which cannot share an engine: "
            f"{', '.join(folder for _, folder, _ in models)}; evaluate them one by one")
    return jobs


def run_job(engine, job):
    """Generate and grade what is missing of a job, file by file; returns its rows in the problems' order."""
    from tqdm import tqdm

    todo = [i for i in range(len(job["problems"])) if i not in job["done"]]
    if is_rank0() and (todo or not os.path.exists(job["path"])):
        start_file(job["path"], job["settings"], job["done"])
    engines = int(os.environ["WORLD_SIZE"]) // tp
    chunk = max(1, save_every * engines // job["n"])
    bar = tqdm(total=len(job["problems"]) * job["n"], initial=(len(job["problems"]) - len(todo)) * job["n"], unit="response",
               desc=f"{job['label']} {os.path.basename(job['name'])}", disable=not is_rank0())
    for a in range(0, len(todo), chunk):
        some = todo[a:a + chunk]
        groups = generate_all_ranks(
            engine, job["tokenizer"], [job["problems"][i] for i in some], [job["prompts"][i] for i in some],
            tensor_parallel=tp, n=job["n"], temperature=job["temperature"], top_p=top_p,
            max_response_tokens=job["length"], progress=True,
            seeds=[(seed * 1_000_003 + i) % 2**47 * 2**16 for i in some])  # apart: a prompt's n responses count on from its own
        rows = [[dict(index=i, sample=k, problem=g["problem"], answer=g["answer"], response=g["texts"][k],
                      vote=None if g["truncated"][k] else vote(g["texts"][k], job["problems"][i]), tokens=len(g["responses"][k]),
                      correct=bool(g["rewards"][k]), truncated=bool(g["truncated"][k]))
                 for k in range(job["n"])] for i, g in zip(some, groups)]
        if is_rank0():
            with open(job["path"], "a", encoding="utf-8") as f:
                f.writelines(json.dumps(row) + "\n" for group in rows for row in group)
        job["done"] |= zip(some, rows)
        bar.update(len(some) * job["n"])
    bar.close()
    return [row for i in range(len(job["problems"])) for row in job["done"][i]]


# ---------------------------------------------------------------------------------------------------------------------
# what it came to

def tables(results):
    """Markdown of results [{"model", "data", figures...}, ...]: a line a model and set; for protocols a row a model."""
    lines = ["| model | set | problems x n | T | accuracy (95%) | pass@k, maj@k (95%) | length | truncated |", "|---|" + "---|" * 7]

    def cell(r, name):
        return f"{100 * r[name]:.1f} ({100 * r['intervals'][name][0]:.1f} to {100 * r['intervals'][name][1]:.1f})"

    for r in results:
        more = ", ".join(f"{k} {cell(r, k)}" for k in r["intervals"] if "@" in k)
        lines.append(f"| {r['model']} | {r['data']} | {r['problems']} x {r['n']} | {r['temperature']:g} | {cell(r, 'accuracy')} | "
                     f"{more} | {r['mean_length']:.1f} | {100 * r['truncated']:.1f}% |")
    for name, spec in PROTOCOLS.items():
        mine = {(r["model"], r["data"]): r for r in results if r["protocol"] == name}
        if mine:
            columns = [c for average, sets in spec["averages"].items() for c in (*sets, average)]
            lines += ["", f"| {name} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
        for model in dict.fromkeys(model for model, _ in mine):
            cells = []
            for sets in spec["averages"].values():
                rows = [mine.get((model, s)) for s in sets]
                cells += [f"{100 * r['accuracy']:.2f}" if r else "-" for r in rows] + ["-"]
                if all(rows):
                    low, high = bootstrap([r["by_problem"] for r in rows])
                    cells[-1] = f"{100 * np.mean([r['accuracy'] for r in rows]):.2f} ({100 * low:.2f} to {100 * high:.2f})"
            lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot_steps(results, path):
    """Accuracy over steps, a line a run and set, with its interval; no file if no run has two checkpoints."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = {}
    for r in results:
        run, _, step = r["model"].rpartition("step_")
        if step.isdigit():
            lines.setdefault((run.rstrip("/"), r["data"], r["n"], r["temperature"]), []).append((int(step), r))
    if not any(len(points) > 1 for points in lines.values()):
        return
    fig, ax = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    for (run, name, k, heat), points in lines.items():
        steps, rows = zip(*sorted(points, key=lambda p: p[0]))
        ax.plot(steps, [r["accuracy"] for r in rows], marker="o", label=f"{run} {name}, n {k}, T {heat:g}".strip())
        ax.fill_between(steps, *zip(*(r["intervals"]["accuracy"] for r in rows)), alpha=0.15)
    ax.set_xlabel("step")
    ax.set_ylabel("accuracy, 95% interval")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    save_figure(fig, path)


def report(results, home):
    """results.json (with what earlier evaluations left there), results.md and accuracy.png in the folder `home`."""
    path, key = os.path.join(home, "results.json"), lambda r: [r[k] for k in ("model", "data", "protocol", "n", "temperature")]
    try:
        with open(path) as f:
            earlier = [r for r in json.load(f) if key(r) not in list(map(key, results))]
    except (OSError, ValueError, KeyError):
        earlier = []
    everything = earlier + results
    write_json(path, everything)
    write_whole(os.path.join(home, "results.md"), tables(everything))
    plot_steps(everything, os.path.join(home, "accuracy.png"))


if __name__ == "__main__":
    config = configure(globals())
    if compare:
        if len(compare) != 2:
            die(f"compare: two files are needed, got {len(compare)}")
        compare_files(*compare)
        sys.exit()
    if temperature is not None and (isinstance(temperature, (bool, str)) or temperature < 0) or not 0 < top_p <= 1:
        die(f"temperature={temperature}, top_p={top_p}: need temperature >= 0 and 0 < top_p <= 1")
    check(config, dict(dtype=("auto", "float32", "bfloat16"), protocol=(None, *PROTOCOLS)), not_negative=("seed",),
          whole=("n", "max_num_seqs", "max_response_tokens", "max_problems", "save_every", "tp"),
          text=("ckpt",), text_or_none=("data", "data_dir", "system_prompt", "out_dir"))
    check_tp(tp)
    jobs = plan([model for part in ckpt.split(",") for model in find_models(part)])
    for home in {job["home"] for job in jobs}:
        check_folder(home)

    import torch.distributed as dist

    from model_utils import setup_distributed

    setup_distributed()
    found = [[job["done"] for job in jobs]]
    dist.broadcast_object_list(found)  # what rank 0 has read: all ranks must agree on what is left to do
    for job, job["done"] in zip(jobs, found[0]):
        pass
    engine, inside, results = None, None, []  # inside: the folder whose weights the engine has
    for job in jobs:
        if any(i not in job["done"] for i in range(len(job["problems"]))):
            if engine is None:
                engine = build_engine(job["folder"], max(j["context"] for j in jobs), seed, dtype, gpu_memory_utilization,
                                      max_num_seqs, tp)
            elif job["folder"] != inside:
                load_weights(engine, job["folder"])
            inside = job["folder"]
        rows = run_job(engine, job)
        if is_rank0():
            r = dict(model=job["label"], data=job["name"], protocol=protocol, n=job["n"], temperature=job["temperature"],
                     **summarize(rows, job["n"], seed), settings=job["settings"])
            results.append(r)
            report([r for r, j in zip(results, jobs) if j["home"] == job["home"]], job["home"])
            print0(f"{job['folder']} on {job['name']}: accuracy {r['accuracy']:.1%} ({r['problems']} problems x {r['n']}, "
                   f"{'greedy' if not job['temperature'] else 'temperature %g' % job['temperature']}); responses in {job['path']}")
    if is_rank0():
        print0("\n" + tables(results) + "\nalso in " + ", ".join(dict.fromkeys(
            os.path.join(j["home"], "results.md") for j in jobs)))
    dist.barrier()
    del engine  # last: its shutdown ends the process group
