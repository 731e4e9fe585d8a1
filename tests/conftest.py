import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.update(HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1")  # GiB of an engine's cache
import rollout  # noqa: E402  sets torch's threads, so before any test imports torch

from model_utils import setup_distributed  # noqa: E402


@pytest.fixture(autouse=True)
def process():
    """A process group of one rank. Scripts that tests run in it leave Ctrl-C as theirs."""
    setup_distributed()
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def model_dir():
    model = ROOT / "models" / "SmolLM2-135M-Instruct"
    assert (model / "config.json").exists(), "run `make test`: it sets the model up"
    return str(model)


@pytest.fixture(scope="session")
def small(model_dir, tmp_path_factory):
    """The model's first layers, where what is tested does not depend on their number."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    path = tmp_path_factory.mktemp("small")
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        auto.from_pretrained(model_dir, num_hidden_layers=4).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def run():
    """run("train.py", "--x=1", ranks=2): the script as a user starts it, from the root. nodes:
    lists of further flags, one a machine: a launcher and a rank for each, over the loopback."""
    def run(script, *args, ranks=0, check=True, nodes=(), cwd=ROOT):
        import torch
        if torch.cuda.is_available() and max(ranks, len(nodes)) > torch.cuda.device_count():
            pytest.skip("needs a GPU a rank")  # on a CPU all ranks find room
        torchrun = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "OMP_NUM_THREADS")
        env = {k: v for k, v in os.environ.items() if not k.startswith(torchrun)}
        words, launcher = [script, *map(str, args)], [sys.executable]
        if ranks or nodes:
            launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks or 1}"]
        if not nodes:
            command = launcher + ["--standalone"] * bool(ranks) + words
            done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
            assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
            return done
        port = 20_000 + os.getpid() % 10_000
        launcher += [f"--nnodes={len(nodes)}", "--master_addr=127.0.0.1", f"--master_port={port}"]
        started = [subprocess.Popen([*launcher, f"--node_rank={i}", *words, *own], cwd=ROOT,
                                    env=dict(env, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=str(i)))
                   for i, own in enumerate(nodes)]
        assert [p.wait() for p in started] == [0] * len(nodes)
    return run


@pytest.fixture
def on_ranks(monkeypatch):
    """on_ranks(f, g): what f() and g() return, each on a rank of its own; each gathers once."""
    def on_ranks(*functions):
        said = {}

        def gather(out, mine):
            said[rank] = mine
            out[:] = [said.get(r, mine) for r in range(len(functions))]

        for name, function in dict(get_world_size=lambda: len(functions), get_rank=lambda: rank,
                                   all_gather_object=gather).items():
            monkeypatch.setattr(f"torch.distributed.{name}", function)
        for _ in range(2):  # the first time they say what they have
            returned = []
            for rank, function in enumerate(functions):
                returned.append(function())
        return returned
    return on_ranks


@pytest.fixture
def dies(capsys):
    """dies(words, function, ...): the line, with these words, with which it ends the program."""
    def dies(words, function, *args, **kwargs):
        with pytest.raises(SystemExit, match="2"):
            function(*args, **kwargs)
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and words in err
        return err
    return dies


@pytest.fixture
def refused(capsys, monkeypatch):
    """refused("train.py", "--x=1"): the line with which the script ends, run in this process."""
    def refused(script, *args):
        monkeypatch.setattr("sys.argv", [script, *args])
        monkeypatch.setattr(rollout, "build_engine", None)
        with pytest.raises(SystemExit, match="2"):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        err = capsys.readouterr().err
        assert err.count("error: ") == 1, err
        return err
    return refused
