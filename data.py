"""Data sets, demonstrations and prompts, and the Group of responses to a prompt."""
import contextlib
import json
import os
import random
import re
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import compress
from pathlib import Path

import numpy as np
import torch.distributed as dist
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from config.sets import BOXED, CHOICE, MADE, SETS, STYLES
from configurator import blame, die, load_function, print0
from grader import grade_all


@dataclass
class Group:
    """The G responses to one prompt, R_i tokens each."""
    row: dict                  # the problem: "problem", "answer", maybe "solution" and more
    prompt: np.ndarray         # (P,) int32, token ids
    responses: list            # G arrays (R_i,) int32, token ids, end-of-sequence included
    rollout_logp: list         # G arrays (R_i,) float32, vLLM's, of each sampled token
    texts: list                # G str, special tokens left out
    reward: np.ndarray         # (G,) float32, 1 correct, 0 incorrect, or in between
    truncated: np.ndarray = None  # (G,) bool, cut off at max_response_tokens, so incorrect
    is_anchor: np.ndarray = None  # (G,) bool, a demonstration that the policy did not sample
    score: np.ndarray = None   # (G,) float, the judge's, in [1, 10]; nan: not judged
    weight: np.ndarray = None  # (G,) float, of each response's tokens in the loss: set_weights
    seed: int = 0              # of whatever is drawn for this group
    update_tokens: int = 0     # response tokens of its update, on all ranks
    of_tokens: object = None   # (3, n) logp, entropy, advantage, on the rank that trains on it

    def __post_init__(self):
        for name, value in dict(truncated=False, is_anchor=False, score=np.nan, weight=0.0).items():
            if getattr(self, name) is None:
                setattr(self, name, np.full(len(self.responses), value))

    @property
    def lengths(self):
        return [len(r) for r in self.responses]

    @property
    def correct(self):
        """(G,) bool, responses that are right."""
        return self.reward > RIGHT

    @property
    def right(self):
        """(G,) bool, rollouts that are right; demonstrations are none."""
        return self.correct & ~self.is_anchor

    def part(self, first, stop):
        """The responses first to stop - 1, as a group."""
        return replace(self, **{name: getattr(self, name)[first:stop] for name in PER_RESPONSE})


def mixed(group):
    """Are some responses right and some wrong? Else they tell nothing apart within the group."""
    return group.correct.min() < group.correct.max()


def accuracy(groups, of="correct"):
    """Mean over groups of their rollouts' mean "correct" (a share) or "reward"."""
    shares = [getattr(g, of)[~g.is_anchor].mean() for g in groups]
    return float(np.mean(shares))


def of_ranks(value):
    """The values of all ranks, which call together, a list."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def share_out(function, items):
    """List of function(items), as many results, dealt over the ranks, which call together."""
    rank, world = dist.get_rank(), dist.get_world_size()
    shares = of_ranks(list(function(items[rank::world])))
    return [shares[i % world][i // world] for i in range(len(items))]


PER_RESPONSE = ("responses", "rollout_logp", "texts", "truncated", "reward", "is_anchor", "score",
                "weight")
RIGHT = 0.5  # a response of more reward is right, where rewards are fractions


# ---- problems ------------------------------------------------------------------------------------

def load_problems(name, split, key="dataset", data_dir="data"):
    """Rows {"problem": str, "answer": str} of a set: a name of MADE or SETS, a JSON Lines file, or
    a function of the split, "FILE.py:NAME". Rows may have "solution" (a demonstration), "n_choices"
    (the answer is a letter) and more. key: the setting that named the set."""
    if name in MADE:
        return MADE[name](split)
    if ".py:" in name:
        function = load_function(name, key)
        with blame(f"{key}: {name}", name.rpartition(":")[0]):
            lines = [*map(json.dumps, function(split))]
        return _read_problems(name, key, lines=lines)
    file = SETS.get((name, split))
    path = f"{data_dir}/{file}.jsonl" if file else name
    if os.path.isfile(path):
        return _read_problems(path, key)
    die(f"{key}: there is no file {path}; {split} sets are {[*MADE]} and, after bench/get_data.py, "
        f"{[n for n, s in SETS if s == split]}")


def _read_problems(path, key, second="answer", lines=None):
    """Rows of a JSON Lines file, or lines, which have two texts: `problem` and `second`."""
    rows = []
    if lines is None:
        with blame(f"{key}: cannot read {path}"):
            lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{key}: {path}, line {number}"
        with blame(f"{where}: not a JSON object in UTF-8"):
            row = dict(json.loads(line))
        if type(row.get("answer")) in (int, float):
            row["answer"] = str(row["answer"])
        for field in ("problem", second):
            text = row.get(field)
            if not isinstance(text, str) or not text.strip():
                die(f"{where}: {field!r} is missing or not a text")
        if re.search("[\ud800-\udfff]", "".join(map(str, row.values()))):
            die(f"{where}: half of a surrogate pair, which no tokenizer takes")
        rows.append(row)
    return rows or die(f"{key}: {path} has no rows")


def drop_evaluated(problems, dataset, data_dir, evaluated):
    """Problems in neither `evaluated` nor a test set of data_dir; ends the program without any."""
    rows = list(evaluated)
    for (_, split), file in SETS.items():
        path = f"{data_dir}/{file}.jsonl"
        if split == "test" and os.path.isfile(path):
            rows += _read_problems(path, "data_dir")
    seen = set(map(_text, rows))
    kept = [row for row in problems if _text(row) not in seen]
    if len(kept) < len(problems):
        print0(f"{dataset}: {len(kept)} of {len(problems)} problems are in no evaluation set")
    return kept or die(f"dataset: all problems of {dataset} are in an evaluation set")


def _text(row):
    """A problem's text without spaces and case, the same in every file."""
    return "".join(row["problem"].lower().split())


def data_order(position, count, size, seed):
    """`count` rows from `position` on of an endless sequence of shuffled epochs of `size` rows."""
    epochs = range(position // size, (position + count) // size + 1)
    order = np.concatenate([np.random.default_rng([seed, e]).permutation(size) for e in epochs])
    return order[position % size:][:count]


# ---- demonstrations ------------------------------------------------------------------------------

def load_demos(problems, dataset, path=None):
    """Demonstrations of every problem, a list of lists of texts: its own "solution", or those of
    the JSON Lines file `path` with the same `problem`, each once."""
    of_problem = {}
    for row in _read_problems(path, "demos", "solution") if path else problems:
        if isinstance(row.get("solution"), str):
            of_problem.setdefault(_text(row), {})[row["solution"]] = None
    demos = [[*of_problem.get(_text(row), ())] for row in problems]
    return demos if any(demos) else die(f"demos: no problem of {dataset} has a solution")


def verify_demos(tokenizer, problems, prompts, demos, max_response_tokens, end, *of_grader):
    """Set row["solution"] to the first right demonstration that is short enough to be trained on,
    else the first right one, or None. Returns the short, {problem: {text: nan}}. All ranks call."""
    def choose(share):
        items = [(text, row) for row, _, texts in share for text in texts]
        verdicts = iter(grade_all(items, *of_grader))
        for row, prompt, texts in share:
            right = [text for text in texts if next(verdicts) > RIGHT]
            short = [text for text in right
                     if len(encode_anchor(tokenizer, prompt, text, end)) <= max_response_tokens]
            yield dict(row, solution=(short + right + [None])[0]), dict.fromkeys(short, np.nan)

    problems[:], short = zip(*share_out(choose, list(zip(problems, prompts, demos))))
    right = sum(row["solution"] is not None for row in problems)
    anchors = {row["problem"]: texts for row, texts in zip(problems, short) if texts}
    print0(f"demonstrations: {right} of {len(problems)} problems have a right one, "
           f"{sum(map(bool, short))} one that is short enough to be an anchor")
    if not right:
        die(f"demos: all {sum(map(len, demos))} demonstrations are wrong, their last box is not "
            "the answer")
    return anchors


def right_answers(groups, step, most):
    """Rows of a step's right rollouts, `most` of a group: those that demos="self" remembers."""
    return [{"problem": g.row["problem"], "solution": text, "step": step} for g in groups
            for text in [*compress(g.texts, g.right)][:most]]


def remember(anchor_texts, rows, most):
    """Put right answers (rows of `right_answers`) before those of the same problem in anchor_texts,
    {problem: {text: the step that it is of}}, and leave the `most` newest. Returns anchor_texts."""
    for row in rows:
        known = anchor_texts.get(row["problem"], {})
        known.pop(row["solution"], None)
        newest = [(row["solution"], row["step"]), *known.items()]
        anchor_texts[row["problem"]] = dict(newest[:most])
    return anchor_texts


def choose_anchors(problem, anchor_texts, anchors, anchor_share, seed):
    """At most `anchors` demonstrations of a problem, a list of texts. A hash leaves problems out:
    about the share anchor_share of them has any. anchor_texts: see `remember`."""
    if not anchors or random.Random(f"{seed} {problem}").random() >= anchor_share:
        return []
    return [*anchor_texts.get(problem, ())][:anchors]


def end_token(tokenizer, model):
    """The token that ends a response: the last one in a chat at which vLLM stops, which the chat
    template writes after an assistant's turn, else end-of-sequence."""
    stops = {tokenizer.eos_token_id}
    with contextlib.suppress(OSError):  # has no such config
        stops.update(np.ravel(GenerationConfig.from_pretrained(model).eos_token_id))
    tokens, = encode_chats(tokenizer, [chat("?", "!")])
    return next((token for token in reversed(tokens) if token in stops), tokenizer.eos_token_id)


def encode_anchor(tokenizer, prompt, text, end):
    """Token ids of a demonstration as the response to a prompt, int32 (R,), end token included."""
    if tokenizer.decode(prompt[-8:]).rstrip().endswith("<think>"):  # opened by the template already
        text = text.lstrip().removeprefix("<think>").lstrip()
    ids = tokenizer(apart(tokenizer)(text), add_special_tokens=False)["input_ids"]
    return np.array(ids + [end], np.int32)


def with_anchors(tokenizer, group, texts, most, end):
    """The group with demonstrations, texts, as its last responses, correct and not sampled, in
    place of the rollouts that would make it larger than `most`. end: see `end_token`."""
    k, ids = len(texts), [encode_anchor(tokenizer, group.prompt, text, end) for text in texts]
    added = Group(group.row, group.prompt, ids, [np.zeros_like(x, np.float32) for x in ids], texts,
                  np.ones(k, np.float32), is_anchor=np.full(k, True))
    both = {}
    for name in PER_RESPONSE:
        old, new = getattr(group, name)[:most - k], getattr(added, name)
        both[name] = old + new if isinstance(old, list) else np.concatenate([old, new])
    return replace(group, **both)


# ---- prompts -------------------------------------------------------------------------------------

def chat(*texts):
    """A chat of the user's and the assistant's texts by turns: a list of {"role", "content"}."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


@lru_cache(maxsize=2)
def apart(tokenizer):
    """Function that takes special tokens in a text apart: a problem's `<|im_end|>` ends no turn."""
    special = [re.escape(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special]
    found = re.compile("|".join(special) or "$^")
    return partial(found.sub, lambda token: f"{token[0][0]} {token[0][1:]}")


def encode_chats(tokenizer, chats):
    """Token ids of chats, lists of {"role", "content"}, up to the answer that is asked for."""
    chats = [[dict(turn, content=apart(tokenizer)(turn["content"])) for turn in x] for x in chats]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)


def encode_prompts(tokenizer, problems, dataset, system_prompt=None, prompt=None, room=np.inf,
                   key="dataset"):
    """Prompt token ids of every problem, a list of int32 arrays (P,). system_prompt None: the set's
    own, BOXED for a file. prompt: "FILE.py:NAME", a function of a row to the whole chat. A prompt
    of more than `room` tokens ends the program; `key` is the setting that named the problems."""
    if not problems:
        return []
    lettered = all(row.get("n_choices") for row in problems)
    style = STYLES.get(dataset, CHOICE if lettered else BOXED)
    system_prompt = style["system_prompt"] if system_prompt is None else system_prompt
    head = [{"role": "system", "content": system_prompt}]
    chats = [head + chat(*style["few_shot"], row["problem"]) for row in problems]
    if prompt:
        chats = map(load_function(prompt, "prompt"), problems)
    with blame(f"prompt: {prompt or 'the chat template'}", (prompt or "").rpartition(":")[0]):
        prompts = [np.array(ids, np.int32) for ids in encode_chats(tokenizer, chats)]
    lengths = list(map(len, prompts))
    if max(lengths) > room:
        i = lengths.index(max(lengths))
        die(f"{key}: problem {i + 1}, {problems[i]['problem'][:40]!r}: its prompt has {lengths[i]} "
            f"tokens; beside a response the model's context has room for {room}")
    return prompts


def load_tokenizer(model, tp=1, key="model"):
    """(tokenizer, Hugging Face config) of a folder or hub id, which the setting `key` named; ends
    the program if tp ranks cannot share its attention heads."""
    with blame(f"{key}: cannot read {model}"):
        tokenizer, config = AutoTokenizer.from_pretrained(model), AutoConfig.from_pretrained(model)
        heads = config.num_attention_heads  # not there in models of text and images
    if not tokenizer.chat_template:
        die(f"{key}: {model}: its tokenizer has no chat template")
    if heads % tp:
        die(f"tp: {tp} does not divide the model's {heads} attention heads")
    return tokenizer, config
