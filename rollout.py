"""From problems to groups of graded responses: data, prompts, the grader, and everything that touches vLLM.

    problems = load_problems("arithmetic", "train")             # [{"problem", "answer"}, ...]
    prompts  = encode_prompts(tokenizer, problems, ...)         # [int32 array (P,), ...]
    engine   = build_engine(model_dir, ...)                     # one vLLM engine a rank, on a GPU or a CPU
    groups   = generate(engine, tokenizer, problems, prompts, n=8, ...)   # a group a prompt, see `generate`
    sync_weights(engine, hf_model)                              # the trainer's weights, before the next rollout

Token ids come out of vLLM and go into the trainer as they are: nothing here or there tokenises a response again.
"""
import json
import math
import os
import random
import re
from fractions import Fraction

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

from configurator import die, is_rank0, print0

# ---------------------------------------------------------------------------------------------------------------------
# problems

BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


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


# Built-in sets: how to make the rows of a split ("train" or "test"), the prompt that goes with them (few_shot: questions
# and answers as earlier turns of the chat), and the tokens an answer needs.
DATASETS = {
    "arithmetic": dict(
        load=arithmetic_problems,
        system_prompt="Work out the answer, in a box.",  # 97 tokens in all: three blocks of 32 that vLLM caches, and one
        few_shot=tuple((q, f"{q} = {a} \\boxed{{{a}}}") for q, a in (("57 + 38", 95), ("64 - 23", 41))),
        max_response_tokens=28,
    ),
}


def load_problems(name, split, key="dataset"):
    """Rows {"problem": str, "answer": str} of a built-in set or a JSON Lines file (`split` is for built-in sets).

    key: the setting that named it, for the error. A missing or empty file or a malformed row ends the program.
    """
    if name in DATASETS:
        return DATASETS[name]["load"](split)
    if not os.path.isfile(name):
        die(f"{key}: {name!r} is neither a file nor one of the built-in sets ({', '.join(DATASETS)})")
    rows = []
    with open(name, encoding="utf-8", errors="replace") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            where = f"{key}: {name}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as e:
                die(f"{where}: not JSON ({e})")
            if not isinstance(row, dict):
                die(f"{where}: expected an object with 'problem' and 'answer', got {type(row).__name__}")
            for field in ("problem", "answer"):
                value = row.get(field)
                if isinstance(value, (int, float)) and not isinstance(value, bool) and field == "answer":
                    value = row[field] = repr(value)
                if not isinstance(value, str) or not value.strip():
                    die(f"{where}: {field!r} is " + ("missing" if field not in row else f"{value!r}, not a text"))
            rows.append(row)
    if not rows:
        die(f"{key}: {name} has no rows")
    return rows


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
    defaults = DATASETS.get(dataset, dict(system_prompt=BOXED_INSTRUCTION, few_shot=()))
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
# grading

def last_boxed(text):
    r"""The content of the last `\boxed{...}` with balanced braces, or None. A box that never closes is no answer."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for i in range(start + len("\\boxed"), len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + len("\\boxed{"):i]
    return None


def _normal(answer):
    """One spelling for answers that differ only in LaTeX dressing; numbers become exact fractions."""
    text = answer.strip().strip("$").replace("\\!", "").replace("\\,", "").replace("\\ ", "")
    text = text.replace("\\left", "").replace("\\right", "").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"\s+", "", text).rstrip(".")
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    if re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)", text) and len(text) < 100:
        return Fraction(text)
    fraction = re.fullmatch(r"([+-]?)(?:\\frac\{(\d{1,50})\}\{(\d{1,50})\}|(\d{1,50})/(\d{1,50}))", text)
    if fraction and int(fraction[3] or fraction[5]):
        value = Fraction(int(fraction[2] or fraction[4]), int(fraction[3] or fraction[5]))
        return -value if fraction[1] == "-" else value
    return text


def grade(text, answer):
    r"""1.0 if the last `\boxed{}` of a finished response is the reference answer, else 0.0."""
    boxed = last_boxed(text)
    return float(boxed is not None and _normal(boxed) == _normal(answer))


# ---------------------------------------------------------------------------------------------------------------------
# the engine

def build_engine(model, context, seed, dtype, gpu_memory_utilization=0.5, max_num_seqs=256):
    """A vLLM engine in this process, one per rank (data parallel), inside torchrun's process group.

    model: Hugging Face folder or hub id; context: prompt and response tokens of the longest sequence. All ranks must
    call it together, before the trainer takes its memory; building it reseeds torch's global generator.
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
        distributed_executor_backend="external_launcher",
        logprobs_mode="processed_logprobs",  # of the distribution sampled from: after temperature
        enable_prefix_caching=True,
        disable_log_stats=True,
        use_tqdm_on_load=False,
        **device_args,
    )


def generate(engine, tokenizer, problems, prompts, n, temperature, max_response_tokens, top_p=1.0, progress=False):
    """n graded responses to every prompt: one group, a dict, per problem.

        problem, answer   str
        prompt            int32 (P,)
        responses         n int32 arrays (R_i,), end-of-sequence token included
        logprobs          n float32 arrays (R_i,), vLLM's log-probability of each sampled token at `temperature`
        texts             n str, special tokens left out
        truncated         bool (n,): hit max_response_tokens, so incorrect
        rewards           float32 (n,): 1 correct, 0 incorrect
    """
    from vllm import SamplingParams

    params = SamplingParams(n=n, temperature=temperature, top_p=top_p, max_tokens=max_response_tokens,
                            logprobs=0, flat_logprobs=True, detokenize=False)
    engine.reset_prefix_cache()  # never another policy's keys and values; the same numbers whatever ran before
    requests = [{"prompt_token_ids": p.tolist()} for p in prompts]
    results = engine.generate(requests, params, use_tqdm=progress and is_rank0())
    groups = []
    for problem, prompt, result in zip(problems, prompts, results):
        outputs = sorted(result.outputs, key=lambda o: o.index)
        texts = tokenizer.batch_decode([list(o.token_ids) for o in outputs], skip_special_tokens=True)
        truncated = np.array([o.finish_reason != "stop" for o in outputs])
        rewards = [0.0 if cut else grade(text, problem["answer"]) for text, cut in zip(texts, truncated)]
        groups.append(dict(
            problem=problem["problem"], answer=problem["answer"], prompt=prompt,
            responses=[np.asarray(o.token_ids, dtype=np.int32) for o in outputs],
            logprobs=[np.asarray(o.logprobs.logprobs, dtype=np.float32) for o in outputs],
            texts=texts, truncated=truncated, rewards=np.array(rewards, dtype=np.float32),
        ))
    return groups


def gather_in_order(mine, total):
    """All ranks' items in issue order, on every rank, where rank r holds the items r, r + world, r + 2 world, ..."""
    import torch.distributed as dist

    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    return [shares[i % len(shares)][i // len(shares)] for i in range(total)]


def generate_all_ranks(engine, tokenizer, problems, prompts, **kwargs):
    """`generate` with the problems dealt over the ranks. Every rank gets all groups, in the order of `problems`."""
    import torch.distributed as dist

    mine = slice(dist.get_rank(), None, dist.get_world_size())
    groups = generate(engine, tokenizer, problems[mine], prompts[mine], **kwargs) if problems[mine] else []
    return gather_in_order(groups, len(problems))


def sample_batch(engine, tokenizer, problems, prompts, position, seed, *, prompts_per_step, oversample, max_rounds,
                 keep_all, **kwargs):
    """Dynamic sampling (DAPO): rounds of groups until `prompts_per_step` of them have both outcomes.

    The data order is a fresh shuffle an epoch; `position` (prompts, all ranks) counts along it. A round asks for
    `oversample` times the missing prompts; groups are accepted in the order they were issued, and the position stops
    behind the last one looked at, so prompts sampled in vain are met again. After `max_rounds` rounds: what there is.
    Returns (accepted groups, all groups looked at or not, new position).
    """
    accepted, sampled = [], []
    for _ in range(max_rounds):
        missing = prompts_per_step - len(accepted)
        size = missing if keep_all else math.ceil(missing * oversample)
        order = [data_index(position + i, len(problems), seed) for i in range(size)]
        groups = generate_all_ranks(engine, tokenizer, [problems[i] for i in order], [prompts[i] for i in order], **kwargs)
        sampled += groups
        for group in groups:
            position += 1
            if keep_all or 0 < group["rewards"].mean() < 1:
                accepted.append(group)
            if len(accepted) == prompts_per_step:
                return accepted, sampled, position
    return accepted, sampled, position


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
    import torch

    def weights():
        for name, p in model.named_parameters():
            p = p.detach()
            yield name, p.full_tensor() if hasattr(p, "full_tensor") else p

    if torch.cuda.is_available():
        if sleep_level:  # the weights first: the KV cache comes back when theirs is the only other memory in use
            engine.wake_up(["weights"])
        engine.apply_model(lambda m: m.load_weights(weights()) and None)
        if sleep_level:
            engine.wake_up(["kv_cache"])
    else:  # the CPU engine has packed its linears: this path unpacks, loads and packs again
        engine.collective_rpc("reload_weights", kwargs=dict(weights_iterator=weights()))
        if model.config.tie_word_embeddings:  # reload_weights leaves a tied head as it was
            engine.apply_model(lambda m: m.lm_head.quant_method.process_weights_after_loading(m.lm_head))
    engine.reset_prefix_cache()


# ---------------------------------------------------------------------------------------------------------------------
# evaluation

def accuracy(groups):
    """Mean reward over all responses."""
    return float(np.mean([g["rewards"].mean() for g in groups]))


def write_jsonl(path, rows):
    """Write rows as JSON Lines, whole or not at all."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(path + ".tmp", path)
