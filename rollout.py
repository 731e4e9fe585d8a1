"""From problems to groups of graded responses: data sets, prompts, and everything that touches vLLM.

    problems = load_problems("arithmetic", "train")             # [{"problem", "answer"}, ...]
    prompts  = encode_prompts(tokenizer, problems, ...)         # [int32 array (P,), ...]
    engine   = build_engine(model_dir, ...)                     # one vLLM engine a rank, on a GPU or a CPU
    groups   = generate(engine, tokenizer, problems, prompts, n=8, ...)   # a group a prompt, graded: see `generate`
    sync_weights(engine, hf_model)                              # the trainer's weights, before the next rollout

Token ids come out of vLLM and go into the trainer as they are: nothing here or there tokenises a response again.
"""
import difflib
import json
import math
import os
import random
from functools import partial

# Read by torch when it is imported, so scripts import this module first. Threads on a CPU: this rank's share of the cores,
# where torchrun would give every rank one; and none that spins for long, since torch and vLLM take turns.
_ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
if "OMP_NUM_THREADS" not in os.environ or (os.environ["OMP_NUM_THREADS"] == "1" and _ranks_here > 1):
    os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // _ranks_here))
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

# Read by vLLM when it is imported. In one process, so that the engine shares torchrun's process group and its weights
# can be written from here; on a CPU, threads are the ones OMP_NUM_THREADS gives this rank, not bound to cores.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
from tqdm import tqdm

from configurator import die, is_rank0, print0, write_whole
from grader import grade_all

# ---------------------------------------------------------------------------------------------------------------------
# problems

def arithmetic_problems(split):
    """Two-digit sums and differences (never negative) in a fixed order; 128 of them held out, also with a and b swapped."""
    pairs = [(a, op, b) for op in "+-" for a in range(10, 100) for b in range(10, a + 1)]
    random.Random(0).shuffle(pairs)
    pairs = pairs[:128] if split == "test" else pairs[128:]
    flip = random.Random(1)
    rows = []
    for a, op, b in pairs:
        answer = a + b if op == "+" else a - b
        if op == "+" and flip.random() < 0.5:
            a, b = b, a
        rows.append({"problem": f"{a} {op} {b}", "answer": str(answer)})
    return rows


def sum_problems(split):
    """Sums of three two-digit numbers, worked in two steps, in a fixed order; 128 of 4,096 held out."""
    draw = random.Random(0)
    triples = sorted({tuple(draw.randint(10, 99) for _ in range(3)) for _ in range(5000)})
    draw.shuffle(triples)
    rows, seen = [], set()
    for a, b, c in triples:
        if tuple(sorted((a, b, c))) in seen:  # the same sum in another order
            continue
        seen.add(tuple(sorted((a, b, c))))
        rows.append({"problem": f"{a} + {b} + {c}", "answer": str(a + b + c),
                     "solution": f"{a} + {b} = {a + b}, {a + b} + {c} = {a + b + c} \\boxed{{{a + b + c}}}"})
    return rows[:128] if split == "test" else rows[128:4096]


def _choices(question, options):
    """A lettered multiple-choice problem as one text."""
    return question.strip() + "\n\n" + "\n".join(f"{chr(65 + i)}) {x}" for i, x in enumerate(options))


def _arc(r, i):
    letter = chr(65 + r["choices"]["label"].index(r["answerKey"]))  # a few rows number their choices
    return {"problem": _choices(r["question"], r["choices"]["text"]), "answer": letter, "n_choices": len(r["choices"]["text"])}


def _gpqa(r, i):
    options = [r["Correct Answer"].strip()] + [r[f"Incorrect Answer {k}"].strip() for k in (1, 2, 3)]
    order = random.Random(i).sample(range(4), 4)  # the same in every run
    return {"problem": _choices(r["Question"], [options[k] for k in order]), "answer": chr(65 + order.index(0)), "n_choices": 4}


def _columns(problem, answer, text=str, also=()):
    return lambda r, i: {"problem": r[problem], "answer": text(r[answer])} | {k: r[k] for k in also}


def _level_3_to_5(r, i):
    row = {k: r[k] for k in ("problem", "answer", "solution") if k in r}
    return row if int(str(r["level"]).split()[-1]) >= 3 else None


def _openr1(r, i):
    return {"problem": next(m["content"] for m in r["prompt"] if m["role"] == "user"),
            "answer": str(r["reward_model"]["ground_truth"]), "solution": r["target"][0]["content"]}


# The known sets. Per split ("train" or "test"): the file in data_dir without .jsonl (beside one called as the set itself),
# then the hub's id, configuration and split, and what makes one of our rows (or None: left out) of row i there.
SETS = {
    "aime24": {"test": ("aime24", "HuggingFaceH4/aime_2024", None, "train", _columns("problem", "answer", lambda a: str(int(a))))},
    "aime25": {"test": ("aime25", "math-ai/aime25", None, "test", _columns("problem", "answer"))},
    "amc23": {"test": ("amc23", "math-ai/amc23", None, "test", _columns("question", "answer"))},
    "amc83": {"test": ("amc83", "AI-MO/aimo-validation-amc", None, "train", _columns("problem", "answer", lambda a: f"{a:g}"))},
    "math500": {"test": ("math500", "HuggingFaceH4/MATH-500", None, "test", _columns("problem", "answer"))},
    "minerva_math": {"test": ("minerva_math", "math-ai/minervamath", None, "test", _columns("question", "answer"))},
    "olympiadbench": {"test": ("olympiadbench", "Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train",
                               _columns("question", "final_answer", ",".join))},
    "gsm8k": {split: (f"gsm8k_{split}", "openai/gsm8k", "main", split,
                      _columns("question", "answer", lambda a: a.split("####")[-1].strip())) for split in ("train", "test")},
    "arc_c": {"test": ("arc_c", "allenai/ai2_arc", "ARC-Challenge", "test", _arc)},
    "gpqa_diamond": {"test": ("gpqa_diamond", "Idavidrein/gpqa", "gpqa_diamond", "train", _gpqa)},
    "mmlu_pro": {"test": ("mmlu_pro_500", "TIGER-Lab/MMLU-Pro", None, "test",
                          lambda r, i: {"problem": _choices(r["question"], r["options"]), "answer": r["answer"],
                                        "n_choices": len(r["options"])})},
    "math": {"train": ("math_lvl3to5_12k_split", "nlile/hendrycks-MATH-benchmark", None, "train", _level_3_to_5)},
    "deepscaler": {"train": ("deepscaler_sub", "agentica-org/DeepScaleR-Preview-Dataset", None, "train",
                             _columns("problem", "answer", also=("solution",)))},
    "openr1-math-46k-8192": {"train": ("openr1-math-46k-8192", "Elliott/Openr1-Math-46k-8192", None, "train", _openr1)},
}

# How a set's problems are put to a model, if not as BOXED: few_shot are questions and answers as earlier turns of the chat,
# max_response_tokens what an answer needs.
BOXED = dict(system_prompt="Please reason step by step, and put your final answer within \\boxed{}.", few_shot=())
CHOICE = dict(system_prompt="Please reason step by step, and put the letter of your choice within \\boxed{}.", few_shot=())
STYLES = {
    "arithmetic": dict(
        system_prompt="Work out the answer, in a box.",  # 97 tokens in all: three blocks of 32 that vLLM caches, and one
        few_shot=tuple((q, f"{q} = {a} \\boxed{{{a}}}") for q, a in (("57 + 38", 95), ("64 - 23", 41))),
        max_response_tokens=28,
    ),
    "sums": dict(
        system_prompt="Work out the answer, in a box.",
        few_shot=(("57 + 38 + 46", "57 + 38 = 95, 95 + 46 = 141 \\boxed{141}"),
                  ("64 + 23 + 85", "64 + 23 = 87, 87 + 85 = 172 \\boxed{172}")),
        max_response_tokens=48,
    ),
    "arc_c": CHOICE, "gpqa_diamond": CHOICE, "mmlu_pro": CHOICE,
}


MADE = {"arithmetic": arithmetic_problems, "sums": sum_problems}  # sets that are made here, nothing is read


def splits(name):
    """The splits of a set by its name, () for what is no name."""
    return ("train", "test") if name in MADE else tuple(SETS.get(name, ()))


def load_problems(name, split, key="dataset", data_dir=None):
    """Rows {"problem": str, "answer": str} of a set: a name of MADE or SETS, or a JSON Lines file.

    Rows may have "solution" (a worked demonstration), "n_choices" (multiple choice, the answer a letter) and more. A name of
    SETS is looked for in the folder data_dir, then on the Hugging Face hub. split: "train" or "test", for names. key: the
    setting that named it, for the error. A missing or empty set or a malformed row ends the program.
    """
    if name in MADE:
        return MADE[name](split)
    if os.path.isfile(name):
        return _read_problems(name, key)
    if name not in SETS:
        known = difflib.get_close_matches(name, [*MADE, *SETS], n=1)
        die(f"{key}: {name!r} is neither a file nor one of the known sets" + (f", did you mean {known[0]!r}?" if known else "")
            + f" ({', '.join([*MADE, *SETS])})")
    if split not in SETS[name]:
        die(f"{key}: {name} has no {split} split; sets that have one: {', '.join(n for n in SETS if split in SETS[n])}")
    if data_dir is not None and not os.path.isdir(data_dir):
        die(f"data_dir: {data_dir} is not a folder")
    path = _local_file(name, split, data_dir)
    if path:
        return _read_problems(path, key)
    try:
        return _hub_problems(name, split)
    except Exception as e:  # no network, no access, no such version: the library raises many kinds
        die(f"{key}: {name} is not in data_dir={data_dir} ({SETS[name][split][0]}.jsonl) and cannot be had from the hub "
            f"({SETS[name][split][1]}): {type(e).__name__}: {e}")


def _local_file(name, split, data_dir):
    """The set's file in data_dir, None if there is none."""
    paths = [os.path.join(data_dir or "", stem + ".jsonl") for stem in (SETS[name][split][0], name)]
    return next(filter(os.path.isfile, paths), None) if data_dir else None


def _hub_problems(name, split):
    from datasets import load_dataset

    _, hub_id, config, hub_split, make = SETS[name][split]
    rows = (make(r, i) for i, r in enumerate(load_dataset(hub_id, config, split=hub_split)))
    return [row for row in rows if row is not None]


def _read_problems(path, key, second="answer"):
    """Rows of a JSON Lines file, which have two texts: `problem` and `second`."""
    rows = []
    with open(path, encoding="utf-8", errors="replace") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            where = f"{key}: {path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as e:
                die(f"{where}: not JSON ({e})")
            if not isinstance(row, dict):
                die(f"{where}: expected an object with 'problem' and {second!r}, got {type(row).__name__}")
            for field in ("problem", second):
                value = row.get(field)
                if isinstance(value, (int, float)) and not isinstance(value, bool) and field == "answer":
                    value = row[field] = repr(value)
                if not isinstance(value, str) or not value.strip():
                    die(f"{where}: {field!r} is " + ("missing" if field not in row else f"{value!r}, not a text"))
            rows.append(row)
    if not rows:
        die(f"{key}: {path} has no rows")
    return rows


def drop_evaluated(problems, dataset, data_dir, evaluated):
    """Training problems whose text is in no evaluation set, and how many were: (problems, int).

    Evaluation sets: the rows `evaluated`, and every test set of SETS that is in data_dir or, if `dataset` is from the hub,
    there. Text is compared without spaces and case.
    """
    rows = list(evaluated)
    for name in (n for n in SETS if "test" in SETS[n]):
        try:
            if path := _local_file(name, "test", data_dir):
                rows += _read_problems(path, "data_dir")
            elif not data_dir and dataset in SETS:
                rows += _hub_problems(name, "test")
        except Exception as e:  # gated, or gone: the others can still be looked at
            print0(f"note: {name} cannot be had from the hub ({type(e).__name__}); training problems may be in it")

    seen = set(map(_text, rows))
    kept = [row for row in problems if _text(row) not in seen]
    return kept, len(problems) - len(kept)


def _text(row):
    """A problem's text without spaces and case, by which rows of different files are the same problem."""
    return "".join(row["problem"].lower().split())


# ---------------------------------------------------------------------------------------------------------------------
# demonstrations

def load_demos(problems, dataset, path=None):
    """Demonstrations of every problem, a list of lists of texts: its own "solution", or those of the JSON Lines file
    `path` (`problem`, `solution`) with the same problem. Ends the program if there is none at all."""
    if path is None:
        demos = [[row["solution"]] if isinstance(row.get("solution"), str) else [] for row in problems]
        if not any(demos):
            die(f"demos: the rows of dataset {dataset} have no 'solution', and no file of demonstrations is given")
        return demos
    if not os.path.isfile(path):
        die(f"demos: {path} is not a file")
    of_problem = {}
    rows = _read_problems(path, "demos", "solution")
    for row in rows:
        of_problem.setdefault(_text(row), []).append(row["solution"])
    demos = [of_problem.get(_text(row), []) for row in problems]
    if not any(demos):
        die(f"demos: {path}: none of its {len(rows)} demonstrations is of a problem in dataset {dataset}")
    if unknown := len(of_problem.keys() - set(map(_text, problems))):
        print0(f"demos: {path}: {unknown} of its {len(of_problem)} problems are not in dataset {dataset}")
    return demos


def verify_demos(tokenizer, problems, prompts, demos, max_response_tokens, end):
    """Grade the demonstrations and give each problem one: the first right one short enough to be trained on, end token
    (`end_token`) included, else the first right one. All ranks call together, each grades a share.

    Sets row["solution"] (str; None without a right one) and row["anchor"], whether it is short enough; it is never cut.
    Returns counts, a dict of ints: demonstrations read and wrong, problems_without a right one or with none but too_long ones.
    """
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    mine = range(rank, len(problems), world)
    verdicts = iter(grade_all([(text, problems[i]) for i in mine for text in demos[i]], progress=is_rank0()))
    share = []
    for i in mine:
        right = [k for k, verdict in [(k, next(verdicts)) for k in range(len(demos[i]))] if verdict]
        short = [k for k in right if len(encode_anchor(tokenizer, prompts[i], demos[i][k], end)) <= max_response_tokens]
        share.append((i, len(right), (short + right + [None])[0], bool(short)))
    shares = [None] * world
    dist.all_gather_object(shares, share)
    counts = dict(read=sum(map(len, demos)), wrong=sum(map(len, demos)), too_long=0, problems_without=0)
    for i, n, k, fits in (row for share in shares for row in share):
        problems[i] = dict(problems[i], solution=None if k is None else demos[i][k], anchor=fits)
        counts["wrong"] -= n
        counts["too_long"] += k is not None and not fits
        counts["problems_without"] += k is None
    return counts


def end_token(tokenizer, model):
    """The token that ends a response: what the chat template writes after an assistant's turn, if vLLM stops there, else
    end-of-sequence. model: folder or hub id, for its generation config."""
    from transformers import GenerationConfig

    try:
        stops = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # has none
        stops = None
    stops = {tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])}
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        after = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("!")[2]
        for token in tokenizer(after, add_special_tokens=False)["input_ids"]:
            if token in stops:
                return token
    return tokenizer.eos_token_id


def encode_anchor(tokenizer, prompt, text, end):
    """Token ids of a demonstration as the response to a prompt, int32 (R,), the end token included."""
    if tokenizer.decode(prompt[-8:]).rstrip().endswith("<think>"):  # the template has opened it already
        text = text.lstrip().removeprefix("<think>").lstrip()
    if not tokenizer.chat_template:
        text = " " + text.lstrip()  # after "Answer:"
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"] + [end], dtype=np.int32)


def with_anchor(group, ids, replace):
    """The group with its demonstration (ids, of the text group["solution"]) as its last response, correct and not
    sampled: in place of the last rollout, or as one more."""
    kept = len(group["responses"]) - bool(replace)
    return dict(group, responses=group["responses"][:kept] + [ids],
                logprobs=group["logprobs"][:kept] + [np.zeros(len(ids), dtype=np.float32)],  # nobody reads them
                texts=group["texts"][:kept] + [group["solution"]], truncated=np.append(group["truncated"][:kept], False),
                rewards=np.append(group["rewards"][:kept], np.float32(1)), anchor=np.append(group["anchor"][:kept], True))


# ---------------------------------------------------------------------------------------------------------------------
# prompts

def encode_prompts(tokenizer, problems, dataset, system_prompt=None, few_shot=None):
    """Prompt token ids of every problem, a list of int32 arrays (P,).

    system_prompt: str, "" for an empty one, None for the data set's own (a file: the boxed instruction); few_shot:
    ((question, answer), ...) as earlier turns of the chat, None for the data set's own.
    """
    if few_shot is not None and not all(isinstance(x, (tuple, list)) and len(x) == 2 and all(isinstance(y, str) for y in x)
                                        for x in few_shot):
        die(f"few_shot: {few_shot!r} is not ((question, answer), ...)")
    defaults = STYLES.get(dataset, CHOICE if problems and all(row.get("n_choices") for row in problems) else BOXED)
    system_prompt = defaults["system_prompt"] if system_prompt is None else system_prompt
    few_shot = defaults["few_shot"] if few_shot is None else few_shot
    head = [{"role": "system", "content": system_prompt}]
    for question, answer in few_shot:
        head += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if tokenizer.chat_template:
        def render(problem):
            chat = head + [{"role": "user", "content": problem}]
            return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    else:
        print0("note: the tokenizer has no chat template; prompts are plain 'Question: ... Answer:' text")
        names = {"system": "", "user": "Question: ", "assistant": "Answer: "}
        shots = "".join(names[m["role"]] + m["content"] + "\n\n" for m in head if m["content"])

        def render(problem):
            return f"{shots}Question: {problem}\n\nAnswer:"
    if not problems:
        return []
    plain = not tokenizer.chat_template  # a chat template writes its own begin-of-sequence token
    ids = tokenizer([render(row["problem"]) for row in problems], add_special_tokens=plain)["input_ids"]
    return [np.asarray(i, dtype=np.int32) for i in ids]


def load_tokenizer(model, key="model"):
    """(tokenizer, Hugging Face config) of a folder or hub id; ends the program if there is no such model.

    key: the setting that named it, for the error.
    """
    from transformers import AutoConfig, AutoTokenizer

    local = model.startswith((".", "/", "~")) or model.count("/") != 1 or os.path.isdir(model.split("/")[0])
    if local and not os.path.isfile(os.path.join(model, "config.json")):
        die(f"{key}: {model} " + ("has no config.json" if os.path.isdir(model) else "is not a folder"))
    try:
        return AutoTokenizer.from_pretrained(model), AutoConfig.from_pretrained(model)
    except Exception as e:  # the libraries raise OSError, ValueError, KeyError and their own, for files and for hubs
        die(f"{key}: cannot read {model}: {e}")


def check_lengths(prompts, max_response_tokens, context, name):
    """Tokens that the longest prompt and a response need; ends the program if a prompt leaves no room for a response."""
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    need = len(prompts[longest]) + max_response_tokens
    if need > context:
        die(f"{name}, problem {longest + 1}: a prompt of {len(prompts[longest])} tokens and max_response_tokens="
            f"{max_response_tokens} make {need}, more than the model's context of {context}")
    return need


# ---------------------------------------------------------------------------------------------------------------------
# the engine

def build_engine(model, context, seed, dtype, gpu_memory_utilization=0.5, max_num_seqs=256, tensor_parallel=1):
    """A vLLM engine in this process, one per rank (data parallel), inside torchrun's process group.

    model: Hugging Face folder or hub id; context: prompt and response tokens of the longest sequence; tensor_parallel:
    neighbouring ranks that share an engine. All ranks must call it together, before the trainer takes its memory;
    building it reseeds torch's global generator.
    """
    import torch
    import warnings
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    from vllm import LLM

    if torch.cuda.is_available():
        device_args = dict(gpu_memory_utilization=gpu_memory_utilization, enable_sleep_mode=True)
    else:  # no compiler needed; 32 is the smallest block, so the most of a shared prompt that the prefix cache can hold
        device_args = dict(enforce_eager=True, block_size=32)
        torch._dynamo.config.disable = True  # vLLM's sampler has a compiled function; a bare machine has no compiler
    return LLM(
        model,
        dtype=dtype,
        max_model_len=context,
        max_num_seqs=max_num_seqs,
        seed=seed,
        tensor_parallel_size=tensor_parallel,
        distributed_executor_backend="external_launcher",
        logprobs_mode="processed_logprobs",  # of the distribution sampled from: after temperature
        enable_prefix_caching=True,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **device_args,
    )


RAW = dict(logprobs=0, flat_logprobs=True, detokenize=False)  # the sampled token's log-probability and id, no text


def generate(engine, tokenizer, problems, prompts, n, temperature, max_response_tokens, top_p=1.0, progress=False,
             seeds=None):
    """n graded responses (or n[i]) to every prompt: one group, a dict, per problem.

    seeds: int per prompt, whose responses then depend on nothing else; None: sampling follows torch's generator.

        problem, answer   str
        solution          str or None, the demonstration
        prompt            int32 (P,)
        responses         n int32 arrays (R_i,), end-of-sequence token included
        logprobs          n float32 arrays (R_i,), vLLM's log-probability of each sampled token at `temperature`
        texts             n str, special tokens left out
        truncated         bool (n,): hit max_response_tokens, so incorrect
        rewards           float32 (n,): 1 correct, 0 incorrect
        anchor            bool (n,), all False: none is a demonstration, see with_anchor
    """
    from vllm import SamplingParams

    counts = n if isinstance(n, list) else [n] * len(prompts)
    params = [SamplingParams(n=n, temperature=temperature, top_p=top_p, max_tokens=max_response_tokens, seed=s, **RAW)
              for n, s in zip(counts, seeds or [None] * len(prompts))]
    engine.reset_prefix_cache()  # never another policy's keys and values; the same numbers whatever ran before
    requests = [{"prompt_token_ids": p.tolist()} for p in prompts]
    results = engine.generate(requests, params, use_tqdm=partial(tqdm, leave=False) if progress and is_rank0() else False)
    return make_groups(tokenizer, problems, prompts, [sorted(r.outputs, key=lambda o: o.index) for r in results],
                       progress and is_rank0())


def make_groups(tokenizer, problems, prompts, outputs, progress=False):
    """Graded groups (see `generate`) of vLLM's finished outputs, a list of CompletionOutput per problem."""
    texts = [tokenizer.batch_decode([list(o.token_ids) for o in outs], skip_special_tokens=True) for outs in outputs]
    truncated = [np.array([o.finish_reason != "stop" for o in outs]) for outs in outputs]
    verdicts = iter(grade_all([("" if cut else text, problem) for problem, ts, cuts in zip(problems, texts, truncated)
                               for text, cut in zip(ts, cuts)], progress))
    return [dict(
        problem=problem["problem"], answer=problem["answer"], solution=problem.get("solution"), prompt=prompt,
        responses=[np.asarray(o.token_ids, dtype=np.int32) for o in outs],
        logprobs=[np.asarray(o.logprobs.logprobs, dtype=np.float32) for o in outs],
        texts=texts[i], truncated=truncated[i], rewards=np.array([next(verdicts) for _ in outs], dtype=np.float32),
        anchor=np.zeros(len(outs), dtype=bool),
    ) for i, (problem, prompt, outs) in enumerate(zip(problems, prompts, outputs))]


def generate_all_ranks(engine, tokenizer, problems, prompts, n, tensor_parallel=1, seeds=None, **kwargs):
    """`generate` with the problems dealt over the engines. Every rank gets all groups, in the order of `problems`."""
    import torch.distributed as dist

    engines = dist.get_world_size() // tensor_parallel
    mine = slice(dist.get_rank() // tensor_parallel, None, engines)  # engine e has the problems e, e + engines, ...
    groups = generate(engine, tokenizer, problems[mine], prompts[mine], n=n[mine] if isinstance(n, list) else n,
                      seeds=seeds and seeds[mine], **kwargs) if problems[mine] else []
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, groups)
    return [shares[i % engines * tensor_parallel][i // engines] for i in range(len(problems))]


LOOK_EVERY = 8  # engine steps between two looks at what has finished, on all ranks at once


def sample_batch(engine, tokenizer, problems, prompts, position, seed, *, prompts_per_step, oversample, max_prompts,
                 keep_all, n, temperature, max_response_tokens, streaming=True, tensor_parallel=1, seeded=False,
                 anchors="none", hard_only=False, end=None):
    """Dynamic sampling (DAPO): groups of n responses until `prompts_per_step` of them have both outcomes.

    Prompts come in the data order, a fresh shuffle an epoch, along which `position` (prompts, all ranks) counts. In work at
    once are `oversample` times the missing ones (inf: as many as fill the engines): streaming, new ones are issued as others
    finish; else when all have. Accepted are the first in the order of issue, whichever finished first, so that short
    responses are not favoured: once enough are accepted and nothing before them is open, the rest is aborted. The position
    stops behind the last one accepted; prompts beyond it, sampled in vain, are met again. After `max_prompts` prompts: what
    there is. keep_all: every group is accepted.

    anchors: "replace" or "add": a demonstration joins every group whose problem has one (row["anchor"], see verify_demos),
    in place of a rollout or as one more response, before the group is accepted or not; hard_only: only groups without a
    correct rollout. end: end_token. seeded: every response has its own seed, so that it depends on nothing sampled beside it
    (slower on a GPU). All ranks call together and get the same: (accepted groups, the groups looked at, new position,
    tokens sampled in vain, all ranks).
    """
    import torch
    import torch.distributed as dist
    from concurrent.futures import ThreadPoolExecutor
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    core = engine.llm_engine
    engines, mine = dist.get_world_size() // tensor_parallel, dist.get_rank() // tensor_parallel
    room = engines * (core.vllm_config.scheduler_config.max_num_seqs // n + 1)  # prompts that fill them; one waits at each
    order = [data_index(position + i, len(problems), seed) for i in range(max_prompts)]
    joins = [anchors != "none" and problems[p]["anchor"] for p in order]
    fewer = anchors == "replace" and not hard_only  # then the rollout that is replaced need not be sampled
    owner = []                                            # engine of every prompt issued, in order
    state = torch.zeros(max_prompts, dtype=torch.int8)    # of every prompt, on all ranks: 0 open, 1 dropped, 2 accepted
    outputs, groups, grading = {}, {}, None               # of this engine's prompts: {response: output}; graded groups

    def issue(i):
        outputs[i] = {}
        for k in range(n - (fewer and joins[i])):
            core.add_request(f"{i}/{k}", {"type": "token", "prompt_token_ids": prompts[order[i]].tolist()}, SamplingParams(
                temperature=temperature, max_tokens=max_response_tokens, output_kind=RequestOutputKind.FINAL_ONLY,
                seed=hash((seed, position + i, k)) % 2**31 if seeded else None, **RAW))

    def grade(finished):
        made = make_groups(tokenizer, [problems[order[i]] for i in finished], [prompts[order[i]] for i in finished],
                           [[outputs[i][k] for k in sorted(outputs[i])] for i in finished])
        return {i: with_anchor(g, encode_anchor(tokenizer, g["prompt"], g["solution"], end), anchors == "replace" and hard_only)
                if joins[i] and not (hard_only and g["rewards"].any()) else g for i, g in zip(finished, made)}

    def look():
        """Take in what the grader has been given; only here, so that every run sees it at the same point."""
        for i, g in grading.result().items() if grading else ():
            groups[i] = g
            state[i] = 2 if keep_all or 0 < g["rewards"].mean() < 1 else 1

    engine.reset_prefix_cache()  # never another policy's keys and values
    with ThreadPoolExecutor(1) as grader:  # while the engine goes on; what it finds is known at the next look
        while True:
            opened = np.flatnonzero(state[:len(owner)].numpy() == 0)
            closed = opened[0] if len(opened) else len(owner)  # prompts before which nothing is open
            missing = prompts_per_step - int((state == 2).sum())
            if int((state[:closed] == 2).sum()) >= prompts_per_step or not len(opened) and len(owner) == max_prompts:
                break
            if missing > 0 and (streaming or not len(opened)):
                work = oversample * missing if not streaming else min(oversample * missing, room)
                load = np.bincount([owner[i] for i in opened], minlength=engines)
                for i in range(len(owner), min(max_prompts, len(owner) + math.ceil(work) - len(opened))):
                    owner.append(int(load.argmin()))
                    load[owner[i]] += 1
                    if owner[i] == mine:
                        issue(i)
            finished = []
            for _ in range(LOOK_EVERY):
                for out in core.step() if core.has_unfinished_requests() else ():
                    i, k = map(int, out.request_id.split("/"))
                    outputs[i][k] = out.outputs[0]
                    if len(outputs[i]) == n - (fewer and joins[i]):
                        finished.append(i)
            look()
            grading = grader.submit(grade, finished)
            if not core.has_unfinished_requests():
                look()  # nothing to do beside it
            dist.all_reduce(state, dist.ReduceOp.MAX)

    accepted = np.flatnonzero(state[:closed].numpy() == 2)[:prompts_per_step]
    looked_at = accepted[-1] + 1 if len(accepted) == prompts_per_step else closed
    vain = sum(len(out.token_ids) for i, outs in outputs.items() if i >= looked_at for out in outs.values())
    vain += sum(request.detokenizer.num_output_tokens() for request in core.output_processor.request_states.values())
    core.abort_request([f"{i}/{k}" for i, outs in outputs.items() if i >= looked_at for k in range(n) if k not in outs])
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, (vain, {i: g for i, g in groups.items() if i < looked_at}))
    shares = shares[::tensor_parallel]  # ranks of one engine have the same
    sampled = [shares[owner[i]][1][i] for i in range(looked_at)]
    return [sampled[i] for i in accepted], sampled, position + int(looked_at), sum(vain for vain, _ in shares)


_order = (None, None)  # (key, permutation) of the epoch in use


def data_index(position, size, seed):
    """The row at `position` of an endless sequence of shuffled epochs over `size` rows."""
    global _order
    key = (position // size, size, seed)
    if _order[0] != key:
        _order = (key, np.random.default_rng([seed, position // size]).permutation(size))
    return int(_order[1][position % size])


def sleep_engine(engine, level):
    """Give the GPU to the trainer: the KV cache is dropped, the weights go to host memory (1) or too (2). CUDA only."""
    import torch

    if torch.cuda.is_available() and level:
        engine.sleep(level)


def sync_weights(engine, model, sleep_level=0):
    """Push the trainer's weights into this rank's engine; all ranks call it together (FSDP gathers each tensor in turn).

    model: the Hugging Face model, its parameters plain or DTensor; sleep_level: how the engine was put to sleep.
    """
    def weights():
        for name, p in model.named_parameters():
            p = p.detach()
            yield name, p.full_tensor() if hasattr(p, "full_tensor") else p

    push_weights(engine, weights(), model.config.tie_word_embeddings, sleep_level)


def load_weights(engine, folder):
    """Put the weights of another checkpoint of the same model, a Hugging Face folder, into the engine."""
    from safetensors import safe_open

    def weights():
        for file in sorted(f for f in os.listdir(folder) if f.endswith(".safetensors")):
            with safe_open(os.path.join(folder, file), "pt") as f:
                yield from ((name, f.get_tensor(name)) for name in f.keys())

    with open(os.path.join(folder, "config.json")) as f:
        push_weights(engine, weights(), json.load(f).get("tie_word_embeddings", False))


def push_weights(engine, weights, tied, sleep_level=0):
    """Write (Hugging Face name, tensor) pairs into the engine's model in place. tied: the head is the embedding."""
    import torch

    if torch.cuda.is_available():
        if sleep_level:  # the weights first: the KV cache comes back when theirs is the only other memory in use
            torch.cuda.empty_cache()  # vLLM maps its memory anew, past torch's allocator, which keeps the trainer's
            engine.wake_up(["weights"])
        engine.apply_model(lambda m: m.load_weights(weights) and None)
        if sleep_level:
            engine.wake_up(["kv_cache"])
    else:  # the CPU engine has packed its linears: this path unpacks, loads and packs again
        engine.collective_rpc("reload_weights", kwargs=dict(weights_iterator=weights))
        if tied:  # reload_weights leaves a tied head as it was
            engine.apply_model(lambda m: m.lm_head.quant_method.process_weights_after_loading(m.lm_head))
    engine.reset_prefix_cache()


# ---------------------------------------------------------------------------------------------------------------------
# evaluation

def accuracy(groups):
    """Mean over groups of the mean reward of their rollouts; demonstrations do not count."""
    return float(np.mean([g["rewards"][~g["anchor"]].mean() for g in groups]))


def write_jsonl(path, rows):
    """Write rows as JSON Lines, whole or not at all."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
