"""What NTHR costs, and what shared prompts save: make bench, or python tests/bench.py --part=head --tokens='(512, 1024)'.
Prints tables; asserts nothing.

Part "step": one trainer step (forward and backward, no rollout) of the quickstart model by variant, in one process, the
variants in turn. Part "head": a Qwen2.5-1.5B-shaped head (V 151,936, d 1,536, random weights) by number of tokens: its
forward and backward pass, what influence adds in "response" and "full", and the straightforward form that holds tokens x
V prediction errors; and the share of a whole step, with the body's time taken from one layer of that shape, times 28.
Part "prompts": the same step with each group's prompt (and what all prompts begin with) computed once, and with every
response's prompt computed again, for few-shot prompts with short answers and for short prompts with long ones.
Memory is the peak above what was there before: torch's allocator on CUDA, resident memory sampled every 2 ms on a CPU.
"""
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import configure

part = "all"                  # "step", "head", "prompts" or "all"
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

configure(globals())

import rollout  # noqa: F401  sets torch's threads, so before torch

import numpy as np
import torch

import model_utils
from advantages import influence

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
            function()
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


for name, function in (("step", step), ("prompts", prompts), ("head", head)):
    if part in (name, "all"):
        function()
