"""Data sets, demonstrations and prompts.

    problems = load_problems("arithmetic", "train")             # [{"problem", "answer"}, ...]
    prompts  = encode_prompts(tokenizer, problems, ...)         # [int32 array (P,), ...]
"""
import contextlib
import dataclasses
import json
import os
import random
import re
from functools import lru_cache, partial

import numpy as np
import torch.distributed as dist

from configurator import die, is_rank0, print0
from grader import grade_all


@dataclasses.dataclass
class Group:
    """The G responses to one prompt, R_i tokens each."""
    row: dict                  # the problem: "problem", "answer", maybe "solution" and more
    prompt: np.ndarray         # (P,) int32, token ids
    responses: list            # G arrays (R_i,) int32, token ids, end-of-sequence included
    rollout_logp: list         # G arrays (R_i,) float32, vLLM's, of each sampled token
    texts: list                # G str, special tokens left out
    truncated: np.ndarray      # (G,) bool, cut off at max_response_tokens, so incorrect
    reward: np.ndarray         # (G,) float32, 1 correct, 0 incorrect
    is_anchor: np.ndarray      # (G,) bool, a demonstration that the policy did not sample
    score: np.ndarray          # (G,) float32, the judge's, in [1, 10]; nan: not judged
    seed: int = 0              # of whatever is drawn for this group
    weight: np.ndarray = None  # (G,) of each response's tokens in the loss: losses.token_weights
    update_tokens: int = 0     # response tokens of its update, on all ranks

    @property
    def lengths(self):
        return [len(r) for r in self.responses]


# --------------------------------------------------------------------------------------------------
# sets that are made here: split ("train" or "test") -> rows

def arithmetic_problems(split, operators="+-", held_out=128):
    """Two-digit sums and differences (never negative) in a fixed order, some of them held out."""
    pairs = [(a, op, b) for op in operators for a in range(10, 100) for b in range(10, a + 1)]
    random.Random(0).shuffle(pairs)
    flip = random.Random(1)
    rows = []
    for a, op, b in pairs[:held_out] if split == "test" else pairs[held_out:]:
        answer = a + b if op == "+" else a - b
        if op == "+" and flip.random() < 0.5:
            a, b = b, a
        rows.append({"problem": f"{a} {op} {b}", "answer": str(answer)})
    return rows


def sum_problems(split):
    """Sums of three two-digit numbers, worked in two steps; 128 of 4,096 are held out."""
    draw = random.Random(0)
    triples = sorted({tuple(draw.randint(10, 99) for _ in range(3)) for _ in range(5000)})
    draw.shuffle(triples)
    rows = {}
    for a, b, c in triples:
        two, answer = a + b, a + b + c
        solution = f"{a} + {b} = {two}, {two} + {c} = {answer} \\boxed{{{answer}}}"
        row = {"problem": f"{a} + {b} + {c}", "answer": str(answer), "solution": solution}
        rows.setdefault(tuple(sorted((a, b, c))), row)  # not the same sum in another order
    rows = list(rows.values())
    return rows[:128] if split == "test" else rows[128:4096]


MADE = {"arithmetic": arithmetic_problems, "sums": sum_problems}
MADE["addition"] = partial(arithmetic_problems, operators="+", held_out=512)


# --------------------------------------------------------------------------------------------------
# known sets: name, split, file in data_dir without .jsonl, id[:configuration] and split on the hub

TABLE = """
aime24               test  aime24                 HuggingFaceH4/aime_2024                  train
aime25               test  aime25                 math-ai/aime25                           test
amc23                test  amc23                  math-ai/amc23                            test
amc83                test  amc83                  AI-MO/aimo-validation-amc                train
math500              test  math500                HuggingFaceH4/MATH-500                   test
minerva_math         test  minerva_math           math-ai/minervamath                      test
olympiadbench        test  olympiadbench          Hothan/OlympiadBench:OE_TO_maths_en_COMP train
gsm8k                train gsm8k_train            openai/gsm8k:main                        train
gsm8k                test  gsm8k_test             openai/gsm8k:main                        test
arc_c                test  arc_c                  allenai/ai2_arc:ARC-Challenge            test
gpqa_diamond         test  gpqa_diamond           Idavidrein/gpqa:gpqa_diamond             train
mmlu_pro             test  mmlu_pro_500           TIGER-Lab/MMLU-Pro                       test
math                 train math_lvl3to5_12k_split nlile/hendrycks-MATH-benchmark           train
deepscaler           train deepscaler_sub         agentica-org/DeepScaleR-Preview-Dataset  train
openr1-math-46k-8192 train openr1-math-46k-8192   Elliott/Openr1-Math-46k-8192             train
"""
SETS = {}  # {name: {split: [file, hub id, hub split]}}
for name, split, *source in map(str.split, TABLE.strip().splitlines()):
    SETS.setdefault(name, {})[split] = source
LETTERS = "ABCDEFGHIJ"


def _choices(question, options, right):
    """A row of lettered multiple choice. right: the index of the right option."""
    lettered = [f"{letter}) {option}" for letter, option in zip(LETTERS, options)]
    problem = "\n".join([question.strip(), "", *lettered])
    return {"problem": problem, "answer": LETTERS[right], "n_choices": len(options)}


def _row(name, r):
    """Our row of the hub's row r of a set; None: left out."""
    if name == "arc_c":
        right = r["choices"]["label"].index(r["answerKey"])  # a few rows number their choices
        return _choices(r["question"], r["choices"]["text"], right)
    if name == "gpqa_diamond":
        wrong = [r[f"Incorrect Answer {k}"] for k in (1, 2, 3)]
        options = [text.strip() for text in (r["Correct Answer"], *wrong)]
        right = options[0]
        random.Random(right).shuffle(options)  # the same in every run
        return _choices(r["Question"], options, options.index(right))
    if name == "mmlu_pro":
        return _choices(r["question"], r["options"], LETTERS.index(r["answer"]))
    if name == "openr1-math-46k-8192":
        solution, answer = r["target"][0]["content"], str(r["reward_model"]["ground_truth"])
        return {"problem": r["prompt"][-1]["content"], "answer": answer, "solution": solution}
    if name == "math" and str(r["level"])[-1] not in "345":
        return None
    # OlympiadBench has a list of answers; GSM8K's comes after its derivation
    answer = ",".join(r["final_answer"]) if "final_answer" in r else str(r["answer"])
    answer = answer.split("####")[-1].strip()
    problem = r.get("problem") or r["question"]
    return {"problem": problem, "answer": answer, "solution": r.get("solution")}


def _known_problems(name, split, data_dir, hub=True):
    """Rows of one of SETS: from its file in data_dir, else from the hub if that may be asked."""
    file, hub_id, hub_split = SETS[name][split]
    path = f"{data_dir}/{file}.jsonl"
    if data_dir and os.path.isfile(path):
        return _read_problems(path, "data_dir")
    if not hub:
        return []
    from datasets import load_dataset

    rows = load_dataset(*hub_id.split(":"), split=hub_split)
    return [row for row in map(partial(_row, name), rows) if row]


def splits(name):
    """The splits of a set by its name, () for what is no name."""
    return ("train", "test") if name in MADE else tuple(SETS.get(name, ()))


def load_problems(name, split, key="dataset", data_dir=None):
    """Rows {"problem": str, "answer": str} of a set: a name of MADE or SETS, or a JSON Lines file.
    Rows may have "solution" (a demonstration), "n_choices" (the answer is a letter) and more. SETS
    are looked for in data_dir, then on the Hugging Face hub. key: the setting that named the set.
    """
    if name in MADE:
        return MADE[name](split)
    if os.path.isfile(name):
        return _read_problems(name, key)
    if name not in SETS:
        die(f"{key}: {name!r} is neither a file nor one of the known sets, {[*MADE, *SETS]}")
    if split not in SETS[name]:
        die(f"{key}: {name} has no {split} split")
    try:
        return _known_problems(name, split, data_dir)
    except Exception as e:  # no network, no access, no such version: the library raises many kinds
        file, hub_id, _ = SETS[name][split]
        die(f"{key}: no {file}.jsonl in data_dir={data_dir}, and no {hub_id} on the hub: {e!r}")


def _read_problems(path, key, second="answer"):
    """Rows of a JSON Lines file, which have two texts: `problem` and `second`."""
    rows = []
    for number, line in enumerate(open(path, "rb"), 1):
        if not line.strip():
            continue
        where = f"{key}: {path}, line {number}"
        try:
            row = dict(json.loads(line.decode("utf-8-sig")))
        except (TypeError, ValueError) as e:
            die(f"{where}: not a JSON object in UTF-8 ({e})")
        if type(row.get("answer")) in (int, float):
            row["answer"] = str(row["answer"])
        for field in ("problem", second):
            text = row.get(field)
            # no tokenizer takes half of a surrogate pair
            if not isinstance(text, str) or not text.strip() or re.search("[\ud800-\udfff]", text):
                die(f"{where}: {field!r} is missing or not a text")
        rows.append(row)
    return rows or die(f"{key}: {path} has no rows")


def drop_evaluated(problems, dataset, data_dir, evaluated):
    """Training problems that are not evaluated, and how many are: (problems, int). Evaluated: those
    of `evaluated`, and of SETS in data_dir or, if `dataset` is from the hub, there."""
    rows = list(evaluated)
    hub = dataset in SETS and not data_dir
    for name in SETS:
        try:
            if "test" in SETS[name]:
                rows += _known_problems(name, "test", data_dir, hub)
        except Exception as e:  # gated, or gone: the others can still be looked at
            print0(f"note: no {name} on the hub, training problems may be in it: {e!r}")
    seen = set(map(_text, rows))
    kept = [row for row in problems if _text(row) not in seen]
    return kept, len(problems) - len(kept)


def _text(row):
    """A problem's text without spaces and case, the same in every file."""
    return "".join(row["problem"].lower().split())


def data_index(position, size, seed):
    """The row at `position` of an endless sequence of shuffled epochs over `size` rows."""
    epoch, place = divmod(position, size)
    return int(epoch_order(size, seed, epoch)[place])


@lru_cache(maxsize=2)
def epoch_order(size, seed, epoch):
    """A shuffle of `size` rows, (size,), the same in every process."""
    return np.random.default_rng([seed, epoch]).permutation(size)


# --------------------------------------------------------------------------------------------------

def load_demos(problems, dataset, path=None):
    """Demonstrations of every problem, a list of lists of texts: its own "solution", or those of
    the JSON Lines file `path` with the same `problem`."""
    if path is None:
        rows = [row for row in problems if isinstance(row.get("solution"), str)]
    elif os.path.isfile(path):
        rows = _read_problems(path, "demos", "solution")
    else:
        die(f"demos: {path} is not a file")
    of_problem = {}
    for row in rows:
        of_problem.setdefault(_text(row), []).append(row["solution"])
    demos = [of_problem.get(_text(row), []) for row in problems]
    return demos if any(demos) else die(f"demos: no problem of {dataset} has a solution")


def share_out(function, items):
    """function(items), a list of as many results, dealt over the ranks, which call together."""
    rank, world = dist.get_rank(), dist.get_world_size()
    shares = [None] * world
    dist.all_gather_object(shares, function(items[rank::world]))
    return [shares[i % world][i // world] for i in range(len(items))]


def verify_demos(tokenizer, problems, prompts, demos, max_response_tokens, end):
    """Grade the demonstrations; a problem gets the first right one that is short enough to be
    trained on, token `end` included, else the first right one. All ranks call together. Sets
    row["solution"] (None without a right one) and row["anchor"], whether it is short enough."""
    def grade_share(pairs):  # 0: wrong, 1: right, 2: right and short enough
        verdicts = grade_all([(text, problems[i]) for i, text in pairs], progress=is_rank0())
        lengths = [len(encode_anchor(tokenizer, prompts[i], text, end)) for i, text in pairs]
        return [right + (right and n <= max_response_tokens) for right, n in zip(verdicts, lengths)]

    pairs = [(i, text) for i, texts in enumerate(demos) for text in texts]
    best = [(0, None)] * len(problems)
    for (i, text), grade in zip(pairs, share_out(grade_share, pairs)):
        if grade > best[i][0]:
            best[i] = grade, text
    for i, (grade, text) in enumerate(best):
        problems[i] = dict(problems[i], solution=text, anchor=grade == 2)
    found = [grade for grade, _ in best]
    print0(f"demonstrations: {found.count(0)} of {len(found)} problems have no right one, "
           f"{found.count(1)} only ones too long to be anchors")
    if not any(found):
        die(f"demos: all {len(pairs)} demonstrations are wrong, their last box is not the answer")


def end_token(tokenizer, model):
    """The token that ends a response: what the chat template writes after an assistant's turn, if
    vLLM stops there, else end-of-sequence."""
    from transformers import GenerationConfig

    stops = {tokenizer.eos_token_id}
    with contextlib.suppress(OSError):  # has no such config
        stops.update(np.ravel(GenerationConfig.from_pretrained(model).eos_token_id))
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    plain = None if tokenizer.chat_template else PLAIN
    text = tokenizer.apply_chat_template(chat, chat_template=plain, tokenize=False)
    after = tokenizer(text.rpartition("!")[2], add_special_tokens=False)["input_ids"]
    return next((token for token in after if token in stops), tokenizer.eos_token_id)


def encode_anchor(tokenizer, prompt, text, end):
    """Token ids of a demonstration as the response to a prompt, int32 (R,), end token included."""
    if tokenizer.decode(prompt[-8:]).rstrip().endswith("<think>"):  # opened by the template already
        text = text.lstrip().removeprefix("<think>").lstrip()
    if not tokenizer.chat_template:
        text = " " + text.lstrip()  # after "Answer:"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return np.array(ids + [end], dtype=np.int32)


def with_anchor(group, ids, replace):
    """The group with its demonstration (ids, of row["solution"]) as its last response, correct and
    not sampled, in place of the last rollout or as one more."""
    anchor = dict(
        responses=ids, rollout_logp=np.zeros(len(ids), np.float32), texts=group.row["solution"],
        truncated=False, reward=1, is_anchor=True, score=np.nan)
    for field, value in anchor.items():
        old = getattr(group, field)[:len(group.responses) - replace]
        is_list = isinstance(old, list)
        anchor[field] = old + [value] if is_list else np.append(old, old.dtype.type(value))
    return dataclasses.replace(group, **anchor)


# --------------------------------------------------------------------------------------------------
# How a set's problems are put to a model, if not as BOXED; few_shot: earlier turns of the chat

INSTRUCTION = "Please reason step by step, and put {} within \\boxed{{}}."
BOXED = dict(system_prompt=INSTRUCTION.format("your final answer"), few_shot=())
CHOICE = dict(system_prompt=INSTRUCTION.format("the letter of your choice"), few_shot=())
ARITHMETIC = dict(
    # with a problem 97 tokens: three blocks of 32, which vLLM caches, and one
    system_prompt="Work out the answer, in a box.",
    few_shot=(("57 + 38", "57 + 38 = 95 \\boxed{95}"), ("64 - 23", "64 - 23 = 41 \\boxed{41}")),
    max_response_tokens=28)
SUMS = dict(
    ARITHMETIC,
    few_shot=(("57 + 38 + 46", "57 + 38 = 95, 95 + 46 = 141 \\boxed{141}"),
              ("64 + 23 + 85", "64 + 23 = 87, 87 + 85 = 172 \\boxed{172}")),
    max_response_tokens=48)
STYLES = {"arithmetic": ARITHMETIC, "addition": ARITHMETIC, "sums": SUMS}

PLAIN = """\
{% set names = {"system": "", "user": "Question: ", "assistant": "Answer: "} %}
{% for message in messages if message.content %}
{{ names[message.role] + message.content }}

{% endfor %}
Answer:"""  # the chat template of a tokenizer that has none


def encode_chats(tokenizer, chats):
    """Token ids of chats, lists of {"role", "content"}, up to the answer that is asked for."""
    plain = not tokenizer.chat_template
    texts = tokenizer.apply_chat_template(
        chats, chat_template=PLAIN if plain else None, add_generation_prompt=True, tokenize=False)
    # a chat template writes its own begin-of-sequence token
    return tokenizer(texts, add_special_tokens=plain)["input_ids"]


def encode_prompts(tokenizer, problems, dataset, system_prompt=None, few_shot=None):
    """Prompt token ids of every problem, a list of int32 arrays (P,). few_shot: ((question,
    answer), ...) as earlier turns of the chat. None: the data set's own, BOXED for a file."""
    if not problems:
        return []
    lettered = all(row.get("n_choices") for row in problems)
    style = STYLES.get(dataset, CHOICE if lettered else BOXED)
    turns = [("system", style["system_prompt"] if system_prompt is None else system_prompt)]
    try:
        for question, answer in style["few_shot"] if few_shot is None else few_shot:
            turns += [("user", question + ""), ("assistant", answer + "")]
    except (TypeError, ValueError):
        die(f"few_shot: {few_shot!r} is not ((question, answer), ...)")
    head = [{"role": role, "content": text} for role, text in turns]
    chats = [head + [{"role": "user", "content": row["problem"]}] for row in problems]
    return [np.array(ids, dtype=np.int32) for ids in encode_chats(tokenizer, chats)]


def load_tokenizer(model, key="model"):
    """(tokenizer, Hugging Face config) of a folder or hub id, which the setting `key` named."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model), AutoConfig.from_pretrained(model)
    except Exception as e:  # OSError, ValueError, KeyError and the libraries' own
        die(f"{key}: cannot read {model}: {e}")


def check_lengths(prompts, max_response_tokens, context, name):
    """Tokens of the longest prompt and a response; ends the program if they do not fit."""
    place = int(np.argmax([len(prompt) for prompt in prompts]))
    need = len(prompts[place]) + max_response_tokens
    if need > context:
        die(f"{name}, problem {place + 1}: {need} tokens, {max_response_tokens=}, over {context=}")
    return need
