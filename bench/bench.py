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
trainer  Micro-batches of a model of that shape with random weights, by token budget and activation
         checkpointing: tokens a second, MFU against this card's own bf16 products (6 FLOPs a
         parameter and packed token; in brackets with those of attention), the head's share,
         memory, AdamW's step. On a GPU TORCH_COMPILE_DISABLE=1 shows what compiling gains.
profile  The ten kernels that take most of such a micro-batch of the first budget. CUDA.
rollout  sample_batch against plain LLM.generate on the same requests; streaming by oversample, and
         sampling in rounds (all missing prompts, all of their responses, again): what is in vain;
         weight push, memory, sleep at both levels and wake, and the log-probability gap after the
         first and the tenth push. Of the quickstart's model, or with --random_weights=True of one
         of that shape with the quickstart's tokenizer, where every response is of full length.

"all" is without the last three on a CPU, where two run too at a size that fits:
    --part=trainer --layers=2 --width=96 --mlp=256 --vocabulary=1000 --budgets='(512,)'
        --lengths='(20,60)'
    --part=rollout --rollout_prompts=8 --rollout_tokens=24
Memory is the peak above what was there before: torch's allocator on CUDA, resident memory sampled
every 2 ms on a CPU.
"""
import itertools
import sys
import tempfile
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rollout  # before torch, whose threads it sets

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2Model

import model_utils
from advantages import Old, influence
from configurator import check, configure
from data import Group, encode_prompts, load_problems, load_tokenizer

part = "all"                  # one of PARTS, at the end, or "all"
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
budgets = (16_384, 32_768)    # packed tokens of a micro-batch, trainer and profile parts
lengths = (500, 3_000)        # shortest and longest response there
rollout_data = "arithmetic"   # data set of the rollout part; longer answers say more on a GPU
rollout_prompts = 256         # prompts of the rollout part, group_size responses each
rollout_tokens = 512          # tokens a response there has at most
random_weights = False        # rollout part: a model of the shape above

config = configure(globals())

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
on_cuda = device.type == "cuda"
dtype = torch.bfloat16 if on_cuda else torch.float32
if on_cuda:  # as train.py
    torch.set_float32_matmul_precision("high")


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
                influence(Old(*old, head), np.concatenate(group.responses), source, vocab)
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
            logp, entropy, lse = model_utils.HeadLogprob.apply(h, frozen, y, 1.0)
        old = Old(logp, entropy, h, lse, frozen)

        def train_head():
            weight.grad = None
            states = h.clone().requires_grad_()
            model_utils.HeadLogprob.apply(states, weight, y, 1.0)[0].mean().backward()

        def train_layer():
            layer(inputs_embeds=x, use_cache=False).last_hidden_state.mean().backward()

        results = measure(
            train_head,
            lambda: influence(old, ids, source, "response"),
            lambda: influence(old, ids, source, "full"),
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


def random_model(param_dtype):
    """A model of that shape with random weights, on the device: a CPU takes long to draw them."""
    with device:
        return AutoModelForCausalLM.from_config(
            shape(), dtype=param_dtype, attn_implementation="packed")


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
                alone.append(replace(group.part(i, i + 1), prompt=prompt))

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
    line("budget", "checkpointing", "packed", "seconds", "tokens/s", "MFU", "head / all",
         "peak GiB", "AdamW s")
    for case in itertools.product(budgets, (False, True)):
        train_micro_batch(*case, ceiling)


def train_micro_batch(budget, checkpointing, ceiling):
    """A row of the trainer's table. ceiling: FLOPs a second of the card's own products."""
    policy, batch = policy_and_batch(budget, checkpointing)
    optimizer = model_utils.make_optimizer(policy, 1e-6, 0.0)
    weight = policy.model.get_output_embeddings().weight
    h = torch.randn(len(batch.targets), width, device=device, dtype=dtype, requires_grad=True)

    def forward_backward():
        policy(batch, 1.0)[0].mean().backward()

    def head_alone():
        logp, *_ = model_utils.HeadLogprob.apply(h, weight, batch.targets, 1.0)
        logp.mean().backward()

    (whole, peak), (of_head, _), (of_step, _) = measure(
        forward_backward, head_alone, lambda: model_utils.optimizer_step(policy, optimizer, 1.0))
    packed = batch.input_ids.numel()
    own, seen = batch.cu_q.diff().double(), batch.cu_k.diff().double()
    pairs = (own * (seen - own) + own * (own + 1) / 2).sum().item()  # of a query and a key
    flops = 6 * sum(p.numel() for p in policy.parameters()) * packed
    with_attention = flops + 12 * layers * width * pairs
    line(budget, checkpointing, packed, whole, f"{packed / whole:.0f}",
         f"{flops / whole / ceiling:.1%} ({with_attention / whole / ceiling:.1%})",
         f"{of_head / whole:.1%}", peak / 1024, of_step)


def policy_and_batch(budget, checkpointing=False):
    """A policy with random weights, and a micro-batch for it."""
    policy = model_utils.Policy(random_model(torch.float32).train(), dtype)
    if checkpointing:
        policy.model.gradient_checkpointing_enable(dict(use_reentrant=False))
    return policy, model_utils.pack_units(filled(budget), 10**9, device)[0].batches[0]


def profile():
    policy, batch = policy_and_batch(budgets[0])
    for _ in range(2):  # the first is the warm-up
        with torch.profiler.profile() as profiler:
            policy(batch, 1.0)[0].mean().backward()
            now()
    kernels = [e for e in profiler.key_averages() if e.self_device_time_total and not e.cpu_time]
    whole = sum(e.self_device_time_total for e in kernels)
    print(f"\nprofile of a micro-batch of {batch.input_ids.numel()} packed tokens, forward and "
          f"backward: {whole / 1e6:.3f} s of kernels, {dtype}, {device}")
    line("kernel", "calls", "ms", "share")
    for e in sorted(kernels, key=lambda e: -e.self_device_time_total)[:10]:
        line(f"`{e.key[:90]}`", e.count, e.self_device_time_total / 1e3,
             f"{e.self_device_time_total / whole:.1%}")


def rollouts():
    from vllm import SamplingParams

    model_utils.setup_distributed()
    with tempfile.TemporaryDirectory() as folder:
        path = folder if random_weights else model
        if random_weights:
            random_model(dtype).save_pretrained(folder)
            AutoTokenizer.from_pretrained(model).save_pretrained(folder)
        tokenizer, _ = load_tokenizer(path)
        problems = load_problems(rollout_data, "train", "rollout_data")[:rollout_prompts]
        asked = encode_prompts(tokenizer, problems, rollout_data)
        context = max(map(len, asked)) + rollout_tokens
        engine = rollout.build_engine(path, context, 0, "auto")
        policy = model_utils.load_policy(path, dtype, device)
    sizes = dict(temperature=1.0, max_response_tokens=rollout_tokens)

    def plain(**kw):
        engine.reset_prefix_cache()
        params = SamplingParams(n=group_size, temperature=1.0, max_tokens=rollout_tokens, seed=0,
                                logprobs=0, **kw)
        inputs = [{"prompt_token_ids": p.tolist()} for p in asked]
        outs = engine.generate(inputs, params, use_tqdm=False)
        return sum(len(o.token_ids) for out in outs for o in out.outputs)

    def sampled(count, position=0, most=len(problems), **kw):
        """sample_batch until `count` groups are accepted, or `most` prompts sampled."""
        return rollout.sample_batch(
            engine, tokenizer, problems, asked, position, seed=0, prompts_per_step=count,
            group_size=group_size, max_rounds=most / count, **sizes, **kw)

    def ours():
        made, *_ = sampled(len(problems), oversample=np.inf, dynamic_sampling=False)
        return sum(sum(g.lengths) for g in made)

    print(f"\nrollouts, {'random weights' if random_weights else model}, {len(problems)} prompts x "
          f"{group_size} responses of at most {rollout_tokens} tokens, {device}")
    ways = {"LLM.generate": plain, "sample_batch, graded": ours,
            "LLM.generate, no text": lambda: plain(detokenize=False, flat_logprobs=True)}
    rates = {way: [] for way in ways}
    for _ in range(repeat + 1):  # the first is the warm-up
        for way, function in ways.items():
            began = now()
            rates[way].append(function() / (now() - began))
    line("way", "tokens/s", "of LLM.generate")
    rates = {way: np.median(of_way[1:]) for way, of_way in rates.items()}
    for way, rate in rates.items():
        line(way, round(rate), f"{rate / rates['LLM.generate']:.1%}")
    if not random_weights:  # none of those is ever right
        stream(engine, sampled)
    push_and_sleep(engine, policy, lambda: rollout.generate_all_ranks(
        engine, tokenizer, problems[:8], asked[:8], n=group_size, **sizes))


def stream(engine, sampled):
    """A table of what is sampled until an eighth of the prompts is accepted."""
    count, tokens = max(1, rollout_prompts // 8), [0]
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    update = scheduler.update_from_output

    def counting(scheduled, output):
        tokens[0] += sum(map(len, output.sampled_token_ids))
        return update(scheduled, output)

    def in_rounds():
        made, looked = [], []
        while len(made) < count and len(looked) < rollout_prompts:
            missing = min(count - len(made), rollout_prompts - len(looked))
            new, all_new, *_ = sampled(missing, len(looked), missing)
            made, looked = made + new, looked + all_new
        return made, looked

    ways = {"rounds of all that are missing": in_rounds}
    for oversample in (1.0, 1.5, 3.0, np.inf):
        ways[f"streaming, oversample {oversample}"] = partial(sampled, count, oversample=oversample)
    line("way", "seconds", "groups accepted", "looked at", "tokens sampled", "of those looked at",
         "of those accepted")
    scheduler.update_from_output = counting
    for way, function in ways.items():
        tokens[0] = 0
        began = now()
        made, looked, *_ = function()
        line(way, now() - began, len(made), len(looked), tokens[0],
             *(sum(sum(g.lengths) for g in groups) for groups in (looked, made)))
    scheduler.update_from_output = update


@torch.no_grad()
def push_and_sleep(engine, policy, sample):
    """A table of ten pushes at each level of sleep, the policy another one each time."""
    def gap():
        batches = [b for unit in model_utils.pack_units(sample(), 8192, device)
                   for b in unit.batches]
        apart = torch.cat([(policy(b, 1.0)[0] - b.rollout_logp).abs() for b in batches])
        return [apart.mean().item(), apart.max().item()]

    def held():
        free, whole = torch.cuda.mem_get_info() if on_cuda else (np.nan, np.nan)
        return (whole - free) / 2**30

    draw = torch.Generator(device).manual_seed(0)
    line("level", "push", "sleep s", "wake and push s", "gap: mean", "gap: max",
         "GiB awake", "asleep", "awake again")
    line(0, 0, "", "", *gap(), held(), "", "")
    for level, push in itertools.product((1, 2), range(1, 11)):
        for p in policy.parameters():
            if p.dim() > 1:
                noise = torch.randn(p.shape, generator=draw, device=device)
                p.data.add_(1e-3 * p.data.std() * noise)
        before, began = held(), now()
        if on_cuda:
            engine.sleep(level)
        asleep, slept = held(), now()
        rollout.sync_weights(engine, policy.model)
        pushed, after = now(), held()
        if push in (1, 10):
            line(level, push, slept - began, pushed - slept, *gap(), before, asleep, after)


PARTS = dict(step=step, prompts=prompts, head=head, trainer=trainer, profile=profile,
             rollout=rollouts)

if __name__ == "__main__":
    check(config, dict(part=(*PARTS, "all")), {})
    for name, function in PARTS.items():
        if part == name or part == "all" and (on_cuda or name in ("step", "prompts", "head")):
            function()
