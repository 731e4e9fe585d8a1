"""What bfloat16 leaves of LoRA's change on its way to vLLM, which gets W + B A: docs/GPU.md

    python bench/lora.py

AdamW raises the likelihood of one text; the base is rounded to bfloat16 and products are float32,
so that nothing but the rounding of the sum is seen.
"""
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rollout  # noqa: F401  before torch, whose threads it sets

import torch

from configurator import configure
from data import chat, encode_chats, load_tokenizer
from eval import table
from model_utils import load_policy, make_optimizer, pack, plain_weights
from tests.test_model_utils import make_group

model = "models/SmolLM2-135M-Instruct"
rank = 16
cases = ((1e-6, 4), (1e-6, 40), (1e-5, 4), (1e-5, 40), (1e-4, 4))  # learning rate, updates
text = "57 + 38 = 95 \\boxed{95}"

configure(globals())
tokenizer, _ = load_tokenizer(model)
[prompt] = encode_chats(tokenizer, [chat("57 + 38")])
batch = pack([make_group(prompt, [tokenizer(text)["input_ids"]])])
torch.manual_seed(0)
policy, plain = (load_policy(model, torch.float32, "cpu", lora_rank=r) for r in (rank, 0))
for name, p in [*policy.named_parameters(), *plain.named_parameters()]:
    if ".lora_" not in name:
        p.data = p.data.bfloat16().float()
start = copy.deepcopy(policy.state_dict())
before = policy(batch, 1.0)[0].detach()
rows = [["learning rate", "updates", "change of logp, nats", "share that the sum shows",
         "gap/mean, nats"]]
for rate, updates in cases:
    policy.load_state_dict(start)
    optimizer = make_optimizer(policy, rate)
    for _ in range(updates):
        (-policy(batch, 1.0)[0].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = policy(batch, 1.0)[0]
        rounded = {f"model.{name}": w.bfloat16().float() for name, w in plain_weights(policy.model)}
        shown = torch.func.functional_call(plain, rounded, (batch, 1.0))[0]
    change = after - before
    rows.append([f"{rate:g}", str(updates), f"{change.abs().mean():.4f}",
                 f"{(shown - before) @ change / (change @ change):.0%}",
                 f"{(after - shown).abs().mean():.4f}"])
print(table(rows))
