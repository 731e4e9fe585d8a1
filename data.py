"""Data sets, demonstrations and prompts: what there is before anything is sampled.

    problems = load_problems("arithmetic", "train")             # [{"problem", "answer"}, ...]
    prompts  = encode_prompts(tokenizer, problems, ...)         # [int32 array (P,), ...]
"""
import difflib
import json
import os
import random

import numpy as np

from configurator import die, is_rank0, print0
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
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            where = f"{key}: {path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as e:
                die(f"{where}: not {'UTF-8' if isinstance(e, UnicodeDecodeError) else 'JSON'} ({e})")
            if not isinstance(row, dict):
                die(f"{where}: expected an object with 'problem' and {second!r}, got {type(row).__name__}")
            for field in ("problem", second):
                value = row.get(field)
                if isinstance(value, (int, float)) and not isinstance(value, bool) and field == "answer":
                    value = row[field] = repr(value)
                if not isinstance(value, str) or not value.strip():
                    die(f"{where}: {field!r} is " + ("missing" if field not in row else f"{value!r}, not a text"))
                try:
                    value.encode()
                except UnicodeEncodeError:  # half of a surrogate pair, which no tokenizer takes
                    die(f"{where}: {field!r} is {value!r}, not Unicode")
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


_order = (None, None)  # (key, permutation) of the epoch in use


def data_index(position, size, seed):
    """The row at `position` of an endless sequence of shuffled epochs over `size` rows."""
    global _order
    key = (position // size, size, seed)
    if _order[0] != key:
        _order = (key, np.random.default_rng([seed, position // size]).permutation(size))
    return int(_order[1][position % size])


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
    Ends the program if none is right. Returns and prints counts, a dict of ints: demonstrations read and wrong,
    problems_without a right one or with none but too_long ones.
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
    print0(f"{counts['read']} demonstrations, {counts['wrong']} of them wrong and dropped; {counts['problems_without']} of "
           f"{len(problems)} problems have none, {counts['too_long']} only ones too long to be anchors")
    if counts["problems_without"] == len(problems):
        die(f"demos: all {counts['read']} demonstrations are wrong: their last \\boxed{{}} is not the answer")
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
    if few_shot is not None and not (isinstance(few_shot, (tuple, list)) and all(
            isinstance(x, (tuple, list)) and len(x) == 2 and all(isinstance(y, str) for y in x) for x in few_shot)):
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
    local = model.startswith((".", "/", "~")) or model.count("/") != 1 or os.path.isdir(model.split("/")[0])
    if local and not os.path.isfile(os.path.join(model, "config.json")):
        die(f"{key}: {model} " + ("has no config.json" if os.path.isdir(model) else "is not a folder"))
    from transformers import AutoConfig, AutoTokenizer

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
