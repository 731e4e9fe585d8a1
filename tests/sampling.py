"""What streaming dynamic sampling accepts when every response has its own seed; test_rollout.py runs it on two ranks."""
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rollout  # before torch
from data import encode_prompts, load_tokenizer

import torch.distributed as dist

from configurator import print0
from model_utils import setup_distributed

MODEL = "models/SmolLM2-135M-Instruct"


def sample(engine, tokenizer):
    """(groups accepted, position, hash of all responses looked at), the same on all ranks."""
    pairs = ((12, 11), (7, 5), (31, 20), (10, 14), (21, 8), (40, 30), (5, 3))
    rows = [dict(problem=f"{a} + {b}", answer=str(a + b)) for a, b in pairs]
    groups, sampled, position, wasted = rollout.sample_batch(
        engine, tokenizer, rows, encode_prompts(tokenizer, rows, "arithmetic"), 3, 0, prompts_per_step=3, oversample=2.0,
        max_prompts=20, keep_all=False, n=4, temperature=1.0, max_response_tokens=24, seeded=True)
    text = repr([(g["problem"], [r.tolist() for r in g["responses"]], g["rewards"].tolist()) for g in sampled])
    mine = len(groups), position, hashlib.sha256(text.encode()).hexdigest()
    seen = [None] * dist.get_world_size()
    dist.all_gather_object(seen, (*mine, wasted, [g["problem"] for g in groups]))
    assert all(x == seen[0] for x in seen), seen
    return mine


if __name__ == "__main__":
    setup_distributed()
    engine = rollout.build_engine(MODEL, 160, 0, "float32")
    print0("SAMPLED", *sample(engine, load_tokenizer(MODEL)[0]))
    del engine
