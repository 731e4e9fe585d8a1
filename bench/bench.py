"""What NTHR costs, what shared prompts save, what a GPU reaches: make bench. Asserts nothing.

    python bench/bench.py --part=head --tokens='(512, 1024)'

step     One trainer step (forward and backward, no rollout) of the quickstart's model by variant,
         in one process, the variants in turn.
head     A head of Qwen2.5-1.5B's shape (V 151,936, d 1,536, random weights) by number of tokens:
         its forward and backward pass, what influence adds in "response" and "full", and the
         straightforward form that holds tokens x V prediction errors; and the share of a whole
         step, with the body's time taken from one layer of that shape, times 28.
prompts  The same step with each group's prompt (and what all prompts begin with) computed once, and
         again for every response: a group each, its prompt's first token another, so that nothing
         is in common. For few-shot prompts with short answers and short prompts with long ones.
trainer  Micro-batches of a model of that shape with random weights, by token budget, activation
         checkpointing and compile: tokens a second, MFU against this card's own bf16 products, the
         head's share, memory, AdamW's step.
rollout  sample_batch against plain LLM.generate on the same requests, what oversample wastes,
         weight push, sleep and wake, and the log-probability gap after the first and the tenth
         push, all of the quickstart's model.

"all" is without the last two on a CPU, where they run too at a size that fits:
    --part=trainer --layers=2 --width=96 --mlp=256 --vocabulary=1000 --budgets='(512,)'
        --lengths='(20,60)'
    --part=rollout --rollout_prompts=8 --rollout_tokens=24
Memory is the peak above what was there before: torch's allocator on CUDA, resident memory sampled
every 2 ms on a CPU.
"""
import itertools
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rollout  # before torch, whose threads it sets

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2Model

import model_utils
from advantages import Old, influence
from configurator import check, configure
from data import Group, encode_prompts, load_problems, load_tokenizer

part = "all"                  # "step", "head", "prompts", "trainer", "rollout" or "all"
model = "models/SmolLM2-135M-Instruct"
groups = 12                   # groups in the step, as large as the quickstart's
group_size = 4
prompt_tokens = 97            # all but the last 12 in common
response_tokens = 19
tokens = (512, 1024, 2048)    # response tokens of one group, for the head
repeat = 3                    # runs of each; the median is printed
vocabulary = 151_936
width = 1_536
layers = 28
mlp = 8_960                   # width of the MLP
budgets = (16_384, 32_768)    # packed tokens of a micro-batch, trainer part
lengths = (500, 3_000)        # shortest and longest response there
rollout_data = "arithmetic"   # data set of the rollout part; longer answers say more on a GPU
rollout_prompts = 256         # prompts of the rollout part, group_size responses each
rollout_tokens = 512          # tokens a response there has at most

config = configure(globals())

CHUNK = 512  # rows of logits at a time
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
on_cuda = device.type == "cuda"
dtype = torch.bfloat16 if on_cuda else torch.float32


# --------------------------------------------------------------------------------------------------
# measuring

def now():
    """Seconds, when the GPU has done what it was given."""
    if on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def resident():
    """Resident memory of this process, MiB."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096 / 2**20


def watched(function):
    """(seconds, peak extra MiB) of a call."""
    before, stop = resident(), threading.Event()
    high = [before]

    def watch():
        while not stop.wait(0.002):
            high[0] = max(high[0], resident())

    thread = threading.Thread(target=watch)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        thread.start()
    began = now()
    try:
        function()
    except torch.OutOfMemoryError:  # CUDA only
        torch.cuda.empty_cache()
        return np.nan, np.nan
    seconds = now() - began
    if on_cuda:
        high[0] = torch.cuda.max_memory_allocated() / 2**20
    else:
        stop.set()
        thread.join()
    return seconds, high[0] - before


def measure(*functions):
    """[(median seconds, peak MiB)] of functions, run in turn `repeat` times after a warm-up."""
    runs = np.array([[watched(f) for f in functions] for _ in range(repeat + 1)])[1:]
    return list(zip(np.median(runs[..., 0], 0), runs[..., 1].max(0)))


def line(*cells):
    """Print a row of a Markdown table, the head's rule below it if all cells are text."""
    texts = [np.format_float_positional(cell, 3, fractional=False, trim="-")
             if isinstance(cell, float) else str(cell) for cell in cells]
    print("| " + " | ".join(texts) + " |", flush=True)
    if all(isinstance(cell, str) for cell in cells):
        print("|---" * len(cells) + "|")


def make_group(prompt, lengths, rng, size=49152):
    """A group of random tokens: responses of `lengths` tokens to a prompt."""
    n = len(lengths)
    no = np.zeros(n, dtype=bool)
    return Group(
        row={}, prompt=prompt, texts=[""] * n, truncated=no, is_anchor=no,
        responses=[rng.integers(3, size, k).astype(np.int32) for k in lengths],
        rollout_logp=[np.zeros(k, dtype=np.float32) for k in lengths],
        reward=np.zeros(n, dtype=np.float32), score=np.zeros(n, dtype=np.float32))


def make_groups(count, responses, common, own, response):
    """Groups whose prompts have `common` tokens, the same for all, and `own`."""
    rng = np.random.default_rng(0)
    head = rng.integers(3, 49152, common)
    prompts = [np.concatenate([head, rng.integers(3, 49152, own)]) for _ in range(count)]
    return [make_group(p.astype(np.int32), [response] * responses, rng) for p in prompts]


# --------------------------------------------------------------------------------------------------
# parts

def step():
    made = make_groups(groups, group_size, prompt_tokens - 12, 12, response_tokens)
    policy = model_utils.load_policy(model, dtype, device)
    head = policy.model.get_output_embeddings().weight.detach()
    batch = model_utils.pack_units(made, 10**9, device)[0].batches[0]
    size = group_size * response_tokens
    source = np.arange(size) < size // 2
    scoring = {None: [], "response": [], "full": []}

    def run(vocab):
        policy.zero_grad(set_to_none=True)
        logp, *others = policy(batch, 1.0)
        began = now()
        if vocab:
            for group, *old in zip(made, *(x.detach().split(size) for x in (logp, *others))):
                influence(Old(*old, head), np.concatenate(group.responses), source, vocab, CHUNK)
        scoring[vocab].append(now() - began)
        logp.mean().backward()

    print(f"\ntrainer step, {model}: {groups} groups of {group_size} x {response_tokens} response "
          f"tokens, {batch.input_ids.numel()} packed tokens, {dtype}, {device}")
    line("variant", "seconds", "of it scores", "peak MiB")
    results = measure(*(lambda v=v: run(v) for v in scoring))
    for (vocab, spent), (seconds, peak) in zip(scoring.items(), results):
        line(f"nthr {vocab}" if vocab else "grpo", seconds, np.median(spent[1:]), peak)


def naive(h, targets, head, source):
    """Eq. 7 with the prediction errors of all tokens over the whole vocabulary in one piece."""
    onehot = torch.nn.functional.one_hot(targets, len(head)).to(h.dtype)
    u = onehot - (h @ head.T).softmax(-1)  # (n, V)
    return ((u @ u[source].T) * (h @ h[source].T)).sum(1)


def head():
    names = ("head", "response", "full", "naive")
    draw = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=draw)

    weight = (random(vocabulary, width) * 0.02).to(device).requires_grad_()
    frozen = weight.detach().to(dtype)
    layer = Qwen2Model(shape(num_hidden_layers=1, vocab_size=8)).to(device, dtype)
    print(f"\nhead V {vocabulary}, d {width}, {dtype}, {device}; a step: {layers} layers, the head")
    line("tokens", *(f"{name} s" for name in names), "response / step", "full / step",
         *(f"{name} MiB" for name in names))
    times = []
    for n in tokens:
        h = random(n, width).to(device, dtype)
        x = random(n // 8, width).to(device, dtype).repeat(8, 1, 1).requires_grad_()
        # a group repeats its tokens
        kinds = min(vocabulary, max(64, n // 4))
        y = torch.randint(kinds, (n,), generator=draw)
        ids, source, y = y.numpy(), np.arange(n) < n // 2, y.to(device)
        with torch.no_grad():
            logp, entropy, lse = model_utils.HeadLogprob.apply(h, frozen, y, 1.0, CHUNK)
        old = Old(logp, entropy, h, lse, frozen)

        def train_head():
            weight.grad = None
            states = h.clone().requires_grad_()
            model_utils.HeadLogprob.apply(states, weight, y, 1.0, CHUNK)[0].mean().backward()

        def train_layer():
            layer(inputs_embeds=x, use_cache=False).last_hidden_state.mean().backward()

        results = measure(
            train_head,
            lambda: influence(old, ids, source, "response", CHUNK),
            lambda: influence(old, ids, source, "full", CHUNK),
            lambda: naive(h.float(), y, frozen.float(), torch.from_numpy(source).to(device)),
            train_layer)
        (*seconds, of_layer), (*peaks, _) = zip(*results)
        times.append(seconds)
        whole = seconds[0] + layers * of_layer
        line(n, *seconds, seconds[1] / whole, seconds[2] / whole, *peaks)
    if len(tokens) > 1:
        slopes = np.polyfit(np.log(tokens), np.log(times), 1)[0]
        print("time ~ tokens^x:", ", ".join(f"{k} {x:.2f}" for k, x in zip(names, slopes)))


def shape(**others):
    """The Qwen2 config of the parts with random weights."""
    given = dict(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True,
        max_position_embeddings=32_768)
    return Qwen2Config(**given | others)


def prompts():
    policy = model_utils.load_policy(model, dtype, device)
    print(f"\nprompts computed once or again for every response, {model}, forward and backward, "
          f"{dtype}, {device}")
    line("groups", "responses", "prompt", "response", "packed: once", "again", "seconds: once",
         "again", "gain")
    for sizes in ((groups, group_size, prompt_tokens - 12, 12, response_tokens),
                  (1, 8, 0, 100, 100)):
        made, alone = make_groups(*sizes), []
        for group in made:
            for i in range(len(group.responses)):
                first = np.array([len(alone)], dtype=np.int32)  # of the prompt: like no other's
                prompt = np.concatenate([first, group.prompt[1:]])
                alone.append(replace(model_utils.part_of(group, i, i + 1), prompt=prompt))

        def run(units):
            policy.zero_grad(set_to_none=True)
            for unit in units:
                policy(unit.batches[0], 1.0)[0].mean().backward()

        both = [model_utils.pack_units(form, 4096, device) for form in (made, alone)]
        (once, _), (again, _) = measure(*(lambda units=units: run(units) for units in both))
        packed = [sum(u.batches[0].input_ids.numel() for u in units) for units in both]
        count, responses, common, own, response = sizes
        line(count, responses, common + own, response, *packed, once, again, again / once)


def filled(budget):
    """Groups of up to 8 random responses, prompts of 100 tokens, `budget` tokens in all."""
    rng, made, room = np.random.default_rng(0), [], budget
    while room > 200 + lengths[0]:
        sizes = rng.integers(lengths[0], lengths[1] + 1, 8).clip(max=room - 100)
        fitting = int((sizes.cumsum() <= room - 100).sum())
        prompt = rng.integers(0, vocabulary, 100).astype(np.int32)
        made.append(make_group(prompt, sizes[:fitting], rng, vocabulary))
        room -= 100 + sum(made[-1].lengths)
    return made


def trainer():
    side = 8192 if on_cuda else 1024
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in "ab")
    (seconds, _), = measure(lambda: [a @ b for _ in range(10)])
    ceiling = 10 * 2 * side**3 / seconds
    print(f"\ntrainer, {layers} layers, d {width}, MLP {mlp}, V {vocabulary}, random weights, "
          f"responses of {lengths[0]} to {lengths[1]}, {dtype}, {device}; products of {side} x "
          f"{side}: {ceiling / 1e12:.1f} TFLOP/s")
    line("budget", "checkpointing", "compile", "packed", "seconds", "tokens/s", "MFU",
         "head / all", "peak GiB", "AdamW s")
    compiling = (False, True) if on_cuda else (False,)
    for case in itertools.product(budgets, (False, True), compiling):
        train_micro_batch(*case, ceiling)


def train_micro_batch(budget, checkpointing, compiled, ceiling):
    """A row of the trainer's table. ceiling: FLOPs a second of the card's own products."""
    policy = model_utils.load_policy(shape(), dtype, device, checkpointing)
    for layer in policy.model.base_model.layers if compiled else ():
        layer.compile(dynamic=True)
    optimizer = model_utils.make_optimizer(policy, 1e-6, 0.0)
    batch = model_utils.pack_units(filled(budget), 10**9, device)[0].batches[0]
    weight = policy.model.get_output_embeddings().weight
    h = torch.randn(len(batch.targets), width, device=device, dtype=dtype, requires_grad=True)

    def forward_backward():
        policy(batch, 1.0)[0].mean().backward()

    def head_alone():
        logp, *_ = model_utils.HeadLogprob.apply(h, weight, batch.targets, 1.0, CHUNK)
        logp.mean().backward()

    (whole, peak), (of_head, _), (of_step, _) = measure(
        forward_backward, head_alone, lambda: model_utils.optimizer_step(policy, optimizer, 1.0))
    packed = batch.input_ids.numel()
    mfu = 6 * sum(p.numel() for p in policy.parameters()) * packed / whole / ceiling
    line(budget, checkpointing, compiled, packed, whole, packed / whole, mfu, of_head / whole,
         peak / 1024, of_step)


def rollouts():
    from vllm import SamplingParams

    model_utils.setup_distributed()
    tokenizer, _ = load_tokenizer(model)
    problems = load_problems(rollout_data, "train", "rollout_data")[:rollout_prompts]
    asked = encode_prompts(tokenizer, problems, rollout_data)
    engine = rollout.build_engine(model, max(map(len, asked)) + rollout_tokens, 0, "auto")
    policy = model_utils.load_policy(model, dtype, device)
    sizes = dict(temperature=1.0, max_response_tokens=rollout_tokens)

    def plain():
        engine.reset_prefix_cache()
        params = SamplingParams(n=group_size, temperature=1.0, max_tokens=rollout_tokens, seed=0,
                                logprobs=0)
        inputs = [{"prompt_token_ids": p.tolist()} for p in asked]
        outs = engine.generate(inputs, params, use_tqdm=False)
        return sum(len(o.token_ids) for out in outs for o in out.outputs)

    def sampled(count, **kw):
        """sample_batch until `count` groups are accepted, or all problems looked at."""
        return rollout.sample_batch(
            engine, tokenizer, problems, asked, 0, seed=0, prompts_per_step=count,
            group_size=group_size, max_rounds=len(problems) / count, **sizes, **kw)

    def ours():
        made, *_ = sampled(len(problems), oversample=np.inf, dynamic_sampling=False)
        return sum(sum(g.lengths) for g in made)

    print(f"\nrollouts, {model}, {len(problems)} prompts x {group_size} responses of at most "
          f"{rollout_tokens} tokens, {device}")
    rates = {plain: [], ours: []}
    for _ in range(repeat + 1):  # the first is the warm-up
        for function, of_function in rates.items():
            began = now()
            of_function.append(function() / (now() - began))
    theirs, our = (np.median(of_function[1:]) for of_function in rates.values())
    print(f"LLM.generate {theirs:.0f} tokens/s; sample_batch, graded, {our:.0f} "
          f"({our / theirs:.1%})")
    line("oversample", "seconds", "groups accepted", "looked at", "tokens", "prompts in vain")
    for oversample in (1.0, 1.5, 3.0):
        began = now()
        made, looked, _, wasted = sampled(max(1, len(problems) // 8), oversample=oversample)
        used = sum(sum(g.lengths) for g in looked)
        line(oversample, now() - began, len(made), len(looked), used, wasted)

    @torch.no_grad()
    def gap():
        made = rollout.generate_all_ranks(
            engine, tokenizer, problems[:8], asked[:8], n=group_size, **sizes)
        units = model_utils.pack_units(made, 8192, device)
        batches = [batch for unit in units for batch in unit.batches]
        apart = torch.cat([(policy(b, 1.0)[0] - b.rollout_logp).abs() for b in batches])
        return apart.mean().item(), apart.max().item()

    draw = torch.Generator(device).manual_seed(0)
    line("push", "sleep s", "wake and push s", "gap: mean", "gap: max")
    for push in range(1, 11):
        for p in policy.parameters():  # another policy each time
            if p.dim() > 1:
                noise = torch.randn(p.shape, generator=draw, device=device)
                p.data.add_(1e-3 * p.data.std() * noise)
        began = now()
        rollout.sleep_engine(engine)
        slept = now()
        rollout.sync_weights(engine, policy.model)
        pushed = now()
        if push in (1, 10):
            line(push, slept - began, pushed - slept, *gap())


PARTS = dict(step=step, prompts=prompts, head=head, trainer=trainer, rollout=rollouts)

if __name__ == "__main__":
    check(config, dict(part=(*PARTS, "all")))
    for name, function in PARTS.items():
        if part == name or part == "all" and (on_cuda or name not in ("trainer", "rollout")):
            function()
