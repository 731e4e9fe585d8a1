"""What is sampled on any number of ranks: test_rollout.py here, and on two as a program."""
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rollout  # before torch, whose threads it sets

import torch.distributed as dist

from configurator import print0
from data import encode_prompts, load_tokenizer
from model_utils import setup_distributed

MODEL = "models/SmolLM2-135M-Instruct"
PAIRS = ((12, 11), (7, 5), (31, 20), (10, 14), (21, 8), (40, 30), (5, 3))
ROWS = [{"problem": f"{a} + {b}", "answer": str(a + b)} for a, b in PAIRS]
HOW = {"seed": 7, "temperature": 1.0, "max_response_tokens": 24}


def content(groups):
    """A hash of the groups' problems, responses and rewards."""
    rows = [(g.row["problem"], list(map(list, g.responses)), list(g.reward)) for g in groups]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def sample(engine, tokenizer):
    """(groups accepted, position, hashes of all groups looked at and of generate_all_ranks')."""
    questions = tokenizer, ROWS, encode_prompts(tokenizer, ROWS, "arithmetic")
    groups, sampled, position, wasted = rollout.sample_batch(
        engine, *questions, 3, prompts_per_step=3, group_size=4, oversample=2.0, **HOW)
    answers = rollout.generate_all_ranks(engine, *questions, n=2, **HOW)
    mine = len(groups), position, content(sampled), content(answers)
    seen = [None] * dist.get_world_size()
    dist.all_gather_object(seen, (*mine, wasted, content(groups)))
    assert all(x == seen[0] for x in seen), seen
    return mine


if __name__ == "__main__":
    setup_distributed()
    engine = rollout.build_engine(MODEL, 160, 0, "float32")
    print0(" ".join(map(str, sample(engine, load_tokenizer(MODEL)[0]))))
    del engine  # its shutdown ends the process group
