"""What NTHR costs, what shared prompts save, and on a GPU what trainer and rollouts reach: make bench, or
python tests/bench.py --part=head --tokens='(512, 1024)'. Prints tables; asserts nothing.

Part "step": one trainer step (forward and backward, no rollout) of the quickstart model by variant, in one process, the
variants in turn. Part "head": a Qwen2.5-1.5B-shaped head (V 151,936, d 1,536, random weights) by number of tokens: its
forward and backward pass, what influence adds in "response" and "full", and the straightforward form that holds tokens x
V prediction errors; and the share of a whole step, with the body's time taken from one layer of that shape, times 28.
Part "prompts": the same step with each group's prompt (and what all prompts begin with) computed once, and with every
response's prompt computed again, for few-shot prompts with short answers and for short prompts with long ones.
Part "trainer": micro-batches of a model of that shape with random weights, by token budget, activation checkpointing and
compile: tokens a second, MFU against this card's own bf16 matrix products, the head's share, memory, AdamW's step.
Part "rollout": sample_batch against plain LLM.generate on the same requests, streaming against rounds, weight push, sleep and
wake, and the log-probability gap after the first and the tenth push, all of the quickstart model. Of these two "all" is
without on a CPU, where they run too, at a size that fits: --part=trainer --layers=2 --width=96 --mlp=256 --vocabulary=1000
--budgets='(512,)' --lengths='(20,60)'; --part=rollout --rollout_prompts=8 --rollout_tokens=24.
Memory is the peak above what was there before: torch's allocator on CUDA, resident memory sampled every 2 ms on a CPU.
"""
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import configure

part = "all"                  # "step", "head", "prompts", "trainer", "rollout" or "all"
model = "models/SmolLM2-135M-Instruct"
groups = 12                   # groups in the step, as large as the quickstart's
group_size = 4
prompt_tokens = 97            # all but the last 12 in common
response_tokens = 19
tokens = (512, 1024, 2048)    # response tokens of one group, for the head
repeat = 3                    # runs of each; the median is printed
chunk = 512                   # rows of logits at a time
vocabulary = 151_936
width = 1_536
layers = 28
mlp = 8_960                   # width of the trainer part's MLP
budgets = (16_384, 32_768)    # packed tokens of a micro-batch, trainer part
lengths = (500, 3_000)        # shortest and longest response there
rollout_data = "arithmetic"   # data set of the rollout part; on a GPU longer answers say more: --rollout_data=some.jsonl
rollout_prompts = 256         # prompts of the rollout part, group_size responses each
rollout_tokens = 512          # tokens a response there has at most

configure(globals())

import rollout  # before torch: it sets its threads

import numpy as np
import torch

import model_utils
from advantages import influence
from data import encode_prompts, load_problems, load_tokenizer

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
dtype = torch.bfloat16 if device.type == "cuda" else torch.float32


def now():
    """Seconds, when the GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def resident():
    """Resident memory of this process, MiB."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096 / 2**20


def measure(*functions):
    """[(median seconds, peak extra MiB)] of each function, run in turn `repeat` times after one warm-up."""
    seconds, peaks = [[] for _ in functions], [0.0] * len(functions)
    for round in range(repeat + 1):
        for i, function in enumerate(functions):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            else:
                before, high, stop = resident(), [0.0], threading.Event()

                def watch():
                    while not stop.wait(0.002):
                        high[0] = max(high[0], resident())
                thread = threading.Thread(target=watch)
                thread.start()
            began = now()
            try:
                function()
            except torch.OutOfMemoryError:  # CUDA only
                seconds[i] = [float("nan")] * (repeat + 1)
                torch.cuda.empty_cache()
                continue
            took = now() - began
            if device.type == "cuda":
                peak = (torch.cuda.max_memory_allocated() - before) / 2**20
            else:
                stop.set()
                thread.join()
                peak = high[0] - before
            if round:
                seconds[i].append(took)
                peaks[i] = max(peaks[i], peak)
    return [(sorted(s)[len(s) // 2], p) for s, p in zip(seconds, peaks)]


def naive(h, targets, head, source):
    """Eq. 7 with the prediction errors of all tokens over the whole vocabulary in one piece."""
    u = torch.nn.functional.one_hot(targets, len(head)).to(h.dtype) - (h @ head.T).softmax(-1)  # (N, V)
    return ((u @ u[source].T) * (h @ h[source].T)).sum(1)


def make_groups(groups, size, common, own, response):
    """Groups of random tokens: prompts of `common` tokens, the same for all, and `own`; responses of `response` tokens."""
    rng = np.random.default_rng(0)
    head_of = rng.integers(3, 49152, common)
    return [dict(prompt=np.concatenate([head_of, rng.integers(3, 49152, own)]).astype(np.int32),
                 responses=[rng.integers(3, 49152, response).astype(np.int32) for _ in range(size)]) for _ in range(groups)]


def prompts():
    policy = model_utils.load_policy(model, dtype, device)
    print(f"\nprompts computed once or with every response, {model}, forward and backward pass, {dtype}, {device}")
    print(f"{'groups':>6} {'responses':>9} {'prompt':>6} {'response':>8} | {'packed tokens':>15} | {'seconds':>13} | {'gain':>5}")
    for shape in ((groups, group_size, prompt_tokens - 12, 12, response_tokens), (1, 8, 0, 100, 100)):
        made = make_groups(*shape)

        def packed(share):
            plan = model_utils.plan_micro_batches(made, 4096, share)
            return model_utils.pack_all(made, plan, device, share_prompts=share)

        def run(batches):
            policy.zero_grad(set_to_none=True)
            for batch in batches:
                policy(batch, 1.0)[0].mean().backward()

        both = [packed(True), packed(False)]
        (once, _), (again, _) = measure(*(lambda b=b: run(b) for b in both))
        sizes = "{:>6} / {:>6}".format(*(sum(b.input_ids.numel() for b in batches) for batches in both))
        print(f"{shape[0]:6d} {shape[1]:9d} {shape[2] + shape[3]:6d} {shape[4]:8d} | {sizes} | {once:5.2f} / {again:5.2f} | "
              f"{again / once:4.1f}x", flush=True)


def step():
    batch_groups = make_groups(groups, group_size, prompt_tokens - 12, 12, response_tokens)
    policy = model_utils.load_policy(model, dtype, device)
    weight = policy.model.get_output_embeddings().weight
    plan = model_utils.plan_micro_batches(batch_groups, 10**9)
    batch, = model_utils.pack_all(batch_groups, plan, device)
    per_group = group_size * response_tokens
    source = torch.arange(per_group, device=device) < per_group // 2

    def run(vocab):
        policy.zero_grad(set_to_none=True)
        logp, _, h, lse = policy(batch, 1.0, states=True)
        began = now()
        for g in range(groups if vocab else 0):
            span = slice(g * per_group, (g + 1) * per_group)
            influence(h[span], batch.targets[span], lse[span], weight.detach(), source, 1.0, vocab, chunk)
        extra[vocab].append(now() - began)
        logp.mean().backward()

    extra = {None: [], "response": [], "full": []}
    print(f"\ntrainer step, {model}: {groups} groups of {group_size} x {response_tokens} response tokens, {batch.input_ids.numel()} "
          f"packed tokens, {dtype}, {device}")
    print(f"{'variant':12} {'seconds':>8} {'of it scores':>13} {'peak MiB':>9}")
    names = {None: "grpo", "response": "nthr response", "full": "nthr full"}
    results = measure(*(lambda v=v: run(v) for v in names))
    for (vocab, name), (seconds, peak) in zip(names.items(), results):
        scores = sorted(extra[vocab][1:])[repeat // 2]
        print(f"{name:13} {seconds:7.2f} {scores:8.3f} {scores / seconds:6.1%} {peak:8.0f}", flush=True)


def head():
    from transformers import Qwen2Config, Qwen2Model
    g = torch.Generator().manual_seed(0)
    weight = (torch.randn(vocabulary, width, generator=g) * 0.02).to(device).requires_grad_()
    frozen = weight.detach().to(dtype)
    config = Qwen2Config(hidden_size=width, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2,
                         num_hidden_layers=1, vocab_size=8)
    layer = Qwen2Model(config).to(device=device, dtype=dtype)
    print(f"\nhead V {vocabulary}, d {width}, {dtype}, {device}, chunk {chunk}; step = {layers} x one layer + head")
    print(f"{'tokens':>6} | {'head':>7} {'response':>9} {'full':>7} {'naive':>7} s | response/step full/step | "
          f"{'head':>6} {'response':>8} {'full':>6} {'naive':>6} MiB")
    times = []
    for n in tokens:
        h = torch.randn(n, width, generator=g).to(device=device, dtype=dtype)
        y = torch.randint(min(vocabulary, max(64, n // 4)), (n,), generator=g).to(device)  # a group repeats its tokens
        source = torch.arange(n, device=device) < n // 2
        x = torch.randn(n // 8, width, generator=g).to(device=device, dtype=dtype).expand(8, -1, -1).contiguous()
        with torch.no_grad():
            lse = model_utils.HeadLogprob.apply(h, frozen, y, 1.0, chunk, dtype)[2]

        def train_head():
            weight.grad = None
            states = h.clone().requires_grad_()
            model_utils.HeadLogprob.apply(states, weight, y, 1.0, chunk, dtype)[0].mean().backward()

        def train_layer():
            layer(inputs_embeds=x.requires_grad_(), use_cache=False).last_hidden_state.mean().backward()

        results = measure(train_head, lambda: influence(h, y, lse, frozen, source, 1.0, "response", chunk),
                          lambda: influence(h, y, lse, frozen, source, 1.0, "full", chunk),
                          lambda: naive(h.float(), y, frozen.float(), source), train_layer)
        (t_head, m_head), (t_resp, m_resp), (t_full, m_full), (t_naive, m_naive), (t_layer, _) = results
        whole = t_head + layers * t_layer
        times.append([t_head, t_resp, t_full, t_naive])
        print(f"{n:6d} | {t_head:7.2f} {t_resp:9.3f} {t_full:7.2f} {t_naive:7.2f}   | {t_resp / whole:13.2%} "
              f"{t_full / whole:9.2%} | {m_head:6.0f} {m_resp:8.0f} {m_full:6.0f} {m_naive:6.0f}", flush=True)
    slopes = np.polyfit(np.log(tokens), np.log(np.array(times)), 1)[0]
    print("time ~ tokens^x: " + ", ".join(f"{k} {x:.2f}" for k, x in zip(("head", "response", "full", "naive"), slopes)))


def trainer():
    from transformers import Qwen2Config
    config = Qwen2Config(vocab_size=vocabulary, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
                         num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32_768)
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in "ab")
    (seconds, _), = measure(lambda: [a @ b for _ in range(10)])
    ceiling = 10 * 2 * side**3 / seconds
    print(f"\ntrainer, {layers} layers, d {width}, MLP {mlp}, V {vocabulary}, random weights, responses of {lengths[0]} to {lengths[1]}, "
          f"{dtype}, {device}; products of {side} x {side}: {ceiling / 1e12:.1f} TFLOP/s")
    print(f"{'budget':>6} {'ckpt':>5} {'compile':>7} | {'packed':>6} {'seconds':>8} {'tok/s':>8} {'MFU':>6} {'head':>6} | "
          f"{'peak GiB':>8} {'AdamW s':>8}")
    for budget in budgets:
        rng, made, room = np.random.default_rng(0), [], budget
        while room > 200 + lengths[0]:
            sizes = rng.integers(lengths[0], lengths[1] + 1, 8)
            sizes = sizes[:max(1, int((sizes.cumsum() <= room - 100).sum()))]
            made.append(dict(prompt=rng.integers(0, vocabulary, 100).astype(np.int32),
                             responses=[rng.integers(0, vocabulary, min(n, room - 100)).astype(np.int32) for n in sizes]))
            room -= 100 + sum(map(len, made[-1]["responses"]))
        for checkpointing in (False, True):
            for compiled in (False, True) if device.type == "cuda" else (False,):
                policy = model_utils.load_policy(config, dtype, device, checkpointing, compile=compiled)
                optimizer = model_utils.make_optimizer(policy, "adamw", 1e-6, (0.9, 0.999), 0.0)
                batch, = model_utils.pack_all(made, model_utils.plan_micro_batches(made, 10**9), device)
                h = torch.randn(len(batch.targets), width, device=device, dtype=dtype, requires_grad=True)
                weight = policy.model.get_output_embeddings().weight

                def forward_backward():
                    policy(batch, 1.0)[0].mean().backward()

                def head_alone():
                    model_utils.HeadLogprob.apply(h, weight, batch.targets, 1.0, chunk, dtype)[0].mean().backward()

                (whole, peak), (of_head, _), (step_s, _) = measure(
                    forward_backward, head_alone, lambda: model_utils.optimizer_step(policy, optimizer, 1.0))
                packed = batch.input_ids.numel()
                used = 6 * sum(p.numel() for p in policy.parameters()) * packed / whole / ceiling
                print(f"{budget:6d} {checkpointing!s:>5} {compiled!s:>7} | {packed:6d} {whole:8.3f} {packed / whole:8.0f} {used:6.1%} "
                      f"{of_head / whole:6.1%} | {peak / 1024:8.1f} {step_s:8.3f}", flush=True)
                del policy, optimizer, h, weight


def rollouts():
    from vllm import SamplingParams
    model_utils.setup_distributed()
    tokenizer, _ = load_tokenizer(model)
    problems = load_problems(rollout_data, "train", "rollout_data")[:rollout_prompts]
    asked = encode_prompts(tokenizer, problems, rollout_data)
    engine = rollout.build_engine(model, max(map(len, asked)) + rollout_tokens, 0, "auto")
    policy = model_utils.load_policy(model, dtype, device)
    size = dict(n=group_size, temperature=1.0, max_response_tokens=rollout_tokens)
    figures = {"plain": [], "ours": []}

    def free():
        """GiB of the GPU that nobody has, after what torch can give back."""
        if device.type != "cuda":
            return float("nan")
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0] / 2**30

    def plain():
        engine.reset_prefix_cache()
        params = SamplingParams(n=group_size, temperature=1.0, max_tokens=rollout_tokens, seed=0, logprobs=0)
        outs = engine.generate([{"prompt_token_ids": p.tolist()} for p in asked], params, use_tqdm=False)
        return sum(len(o.token_ids) for out in outs for o in out.outputs)

    def sampled(want, **kw):
        return rollout.sample_batch(engine, tokenizer, problems, asked, 0, 0, prompts_per_step=want, max_prompts=len(problems),
                                    seeded=True, **size, **kw)

    def ours():
        groups, *_ = sampled(len(problems), oversample=np.inf, keep_all=True)
        return sum(len(r) for g in groups for r in g["responses"])

    print(f"\nrollouts, {model}, {len(problems)} prompts x {group_size} responses of at most {rollout_tokens} tokens, {device}")
    for _ in range(repeat + 1):  # the first is the warm-up
        for name, function in (("plain", plain), ("ours", ours)):
            began = now()
            count = function()
            figures[name].append(count / (now() - began))
    plain_rate, our_rate = (sorted(x[1:])[len(x[1:]) // 2] for x in figures.values())
    print(f"LLM.generate {plain_rate:.0f} tokens/s; sample_batch, graded, {our_rate:.0f} ({our_rate / plain_rate:.1%})")
    for streaming in (True, False):
        for oversample in (1.0, 1.5, 3.0):
            began = now()
            groups, looked, _, wasted = sampled(max(1, len(problems) // 8), oversample=oversample, keep_all=False, streaming=streaming)
            used = sum(len(r) for g in looked for r in g["responses"])
            print(f"{'streaming' if streaming else 'rounds':9} oversample {oversample}: {now() - began:6.2f} s, {len(groups)} groups accepted of "
                  f"{len(looked)}, tokens {used}, wasted {wasted} ({wasted / (used + wasted):.1%})")

    def gap():
        groups = rollout.generate(engine, tokenizer, problems[:8], asked[:8], **size)
        with torch.no_grad():
            logp = torch.cat([policy(b, 1.0)[0] for b in model_utils.pack_all(groups, model_utils.plan_micro_batches(groups, 8192), device)])
        d = (logp.cpu() - torch.from_numpy(np.concatenate([l for g in groups for l in g["logprobs"]]))).abs()
        return f"mean {d.mean():.2e}, max {d.max():.2e}"

    g = torch.Generator(device).manual_seed(0)
    for push in range(1, 11):
        with torch.no_grad():  # another policy each time
            for p in policy.parameters():
                p.add_(1e-3 * p.std() * torch.randn(p.shape, generator=g, device=device) if p.dim() > 1 else 0)
        awake, began = free(), now()
        rollout.sleep_engine(engine, 1)
        slept, asleep, pushing = now() - began, free(), now()
        rollout.sync_weights(engine, policy.model, 1)
        pushed = now() - pushing
        if push in (1, 10):
            print(f"push {push}: sleep {slept:.3f} s, wake and push {pushed:.3f} s; free GiB before, asleep, after: {awake:.1f}, {asleep:.1f}, "
                  f"{free():.1f}; gap {gap()}")
    del engine


for name, function in (("step", step), ("prompts", prompts), ("head", head), ("trainer", trainer), ("rollout", rollouts)):
    if part == name or part == "all" and (device.type == "cuda" or name not in ("trainer", "rollout")):
        function()
