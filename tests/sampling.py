"""What streaming dynamic sampling accepts, every response with its own seed; run by test_train.py on one rank and on two."""
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import print0

import rollout  # before torch
from data import encode_prompts, load_tokenizer

import torch.distributed as dist

from model_utils import setup_distributed

MODEL = "models/SmolLM2-135M-Instruct"
setup_distributed()
tokenizer, _ = load_tokenizer(MODEL)
rows = [dict(problem=f"{a} + {b}", answer=str(a + b)) for a, b in ((12, 11), (7, 5), (31, 20), (10, 14), (21, 8), (40, 30), (5, 3))]
engine = rollout.build_engine(MODEL, 160, 0, "float32")
groups, sampled, position, wasted = rollout.sample_batch(
    engine, tokenizer, rows, encode_prompts(tokenizer, rows, "arithmetic"), 3, 0, prompts_per_step=3, oversample=2.0,
    max_prompts=20, keep_all=False, n=4, temperature=1.0, max_response_tokens=24, seeded=True)
digest = hashlib.sha256(repr([(g["problem"], [r.tolist() for r in g["responses"]], g["rewards"].tolist()) for g in sampled]).encode())
seen = [None] * dist.get_world_size()
dist.all_gather_object(seen, (digest.hexdigest(), position, wasted, [g["problem"] for g in groups]))
assert all(x == seen[0] for x in seen), seen  # every rank has the same
print0("SAMPLED", len(groups), position, seen[0][0])
del engine
