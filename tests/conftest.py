import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
sys.path.insert(0, str(ROOT))

os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB an engine, of which two ranks and this process have one each
import rollout  # noqa: E402, F401  sets torch's threads, so before any test imports torch


# A chat template for judges (judge.PROMPT ends with "Score <mark>: N"): the question, then turns in which scores have been
# given already. A model as small as ours needs them to write a line of that form
TURN = "<|im_start|>user\nGrade it.<|im_end|>\n<|im_start|>assistant\n"
SCORED_TURNS = ("{% for m in messages %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endfor %}"
                + "".join(TURN + "Score {{ messages[0].content[-9:-3] }}: " + f"{n}<|im_end|>\n" for n in (8, 3, 6, 2)) + TURN)


@pytest.fixture(scope="session")
def model_dir():
    """The real pretrained model that the Makefile converts; there is no stand-in for it."""
    assert (MODEL / "config.json").exists(), "run `make test`: it sets the model up"
    return str(MODEL)


@pytest.fixture(scope="session")
def run():
    """run("train.py", "--x=1", ranks=2): the script as a user starts it, from the repository's root. nodes: lists of further
    flags, one a machine: a launcher with a rank for each, joined over the loopback; what the first one printed comes back."""
    def run(script, *args, ranks=0, check=True, nodes=(), **env):
        import torch
        if torch.cuda.is_available() and max(ranks, len(nodes)) > torch.cuda.device_count():
            pytest.skip("needs a GPU a rank")  # on a CPU all ranks find room
        launcher = [sys.executable]
        if ranks:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS",
                                                                  "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")}
        if nodes:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = s.getsockname()[1]
        logs = [tempfile.TemporaryFile("w+") for _ in nodes]  # a pipe that nobody empties would stop both
        others = [subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(nodes)}", f"--node_rank={i}", "--nproc_per_node=1",
             "--master_addr=127.0.0.1", f"--master_port={port}", script, *map(str, args), *map(str, own)],
            cwd=ROOT, env=clean | env | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": str(i)}, text=True, stdout=logs[i], stderr=subprocess.STDOUT)
            for i, own in enumerate(nodes)]
        if nodes:
            codes = [p.wait() for p in others]
            outputs = [log.seek(0) or log.read() for log in logs]
            assert codes == [0] * len(nodes), "".join(out[-4000:] for out in outputs)
            return outputs
        done = subprocess.run(launcher + [script, *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                              env=clean | env)
        if check:
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return done
    return run
