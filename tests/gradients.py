"""The gradient of one update on fixed groups, through the same functions as train.py's loop; run by test_train.py."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import configure, print0

parallel = "ddp"
micro = 60  # tokens a micro-batch

configure(globals())

import rollout  # noqa: F401  sets torch's threads, so before torch

import torch
import torch.distributed as dist
from test_model_utils import random_groups

from model_utils import balance, full, load_policy, pack_all, parallelize, plan_micro_batches, setup_distributed

device = setup_distributed()
groups = random_groups(49152, [(5, [3, 1, 7, 2]), (12, [4, 9, 4, 1]), (3, [20, 2, 1, 6]), (9, [2, 2, 2, 2]), (30, [40, 3])])
total = sum(len(r) for g in groups for r in g["responses"])
shares = balance(groups, dist.get_world_size())
plans = [plan_micro_batches([groups[i] for i in s], micro) for s in shares]
mine = [groups[i] for i in shares[dist.get_rank()]]
signs = torch.cat([torch.full((len(r),), (-1.0) ** (len(r) + i)) for g in mine for i, r in enumerate(g["responses"])]).to(device)
policy = load_policy("models/SmolLM2-135M-Instruct", torch.float32, device)
net = parallelize(policy, parallel, device)
for batch in pack_all(mine, plans[dist.get_rank()], device, at_least=max(map(len, plans))):
    logp, _ = net(batch, 1.0)
    n = batch.span.stop - batch.span.start
    ((logp[:n] * signs[batch.span]).sum() / total * dist.get_world_size()).backward()
grads = {name.removeprefix("module."): full(p.grad) for name, p in policy.named_parameters()}
probes = [grads[f"model.model.layers.{i}.mlp.down_proj.weight"][3, 5] for i in (0, 13, 29)]
norms = [g.norm() for g in grads.values()]
print0("GRADIENTS", *(f"{float(x):.6e}" for x in [torch.stack(norms).norm(), norms[0], *probes]))
dist.destroy_process_group()
