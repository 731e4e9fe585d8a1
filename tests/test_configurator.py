"""Settings from config files and flags, what is refused, and the configs that are there."""
import math
import re
from pathlib import Path

import configs
import pytest

from configurator import check, configure, load_function, settings_for

CONFIGS = sorted(p.name for p in (Path(__file__).parent.parent / "config").glob("*.py")
                 if p.name != "sets.py")


def script():
    return dict(steps=10, rate=1e-3, name="x", flag=False, on=True, betas=(0.9, 0.95), limit=None,
                files=(), _private=1, CONSTANT=1, __doc__="a script")


@pytest.mark.parametrize("flags, key, value", [
    ("--rate=1", "rate", 1.0), ("--rate -2e-5", "rate", -2e-5), ("--rate=-inf", "rate", -math.inf),
    ("--steps=1 --steps=-2", "steps", -2), ("--name=a=b", "name", "a=b"), ("--name=", "name", ""),
    ("--name=20", "name", "20"), ("--name=None", "name", "None"),
    ("--name true", "name", "true"), ("--flag --flag", "flag", True), ("--on False", "on", False),
    ("--betas=[1,2,3]", "betas", (1, 2, 3)), ("--limit=7", "limit", 7), ("--limit=t", "limit", "t"),
    ("--limit=None", "limit", None), ("--limit={[]}", "limit", "{[]}"),
    ("--files a b --on", "files", ("a", "b"))])  # all words
def test_flags(flags, key, value):
    settings = script()
    got = configure(settings, flags.split())
    assert got[key] == value and type(got[key]) is type(value)
    assert settings == script() | {key: value} == settings | got  # in place


def test_files_apply_in_order_and_flags_last(tmp_path):
    a, b = str(tmp_path / "a.py"), str(tmp_path / "b.py")
    Path(a).write_text("import math\nsteps = 5\nrate = 1\nbetas = [1, 2]\nlimit = int(math.pi)\n")
    Path(b).write_text("_half = steps // 2\ndef helper():\n    pass\nsteps = steps + _half\n")
    got = configure(script(), [a, b, "--rate=0.5"])
    assert (got["steps"], got["rate"], got["betas"], got["limit"]) == (7, 0.5, (1, 2), 3)
    assert configure(script(), ["--steps=1", a])["steps"] == 1  # a flag wins wherever it stands


@pytest.mark.parametrize("text, words", [
    ("--stepz=3", "unknown key 'stepz', did you mean 'steps'?"), ("--steps", "needs a value"),
    ("--CONSTANT=2", "unknown key"),
    ("--steps=1.5", "steps must be int, got 1.5"), ("--steps=True", "must be int, got True"),
    ("name = None\n", "name must be str, got None"), ("--flag=1", "flag must be bool"),
    ("--rate=fast", "rate must be float, got 'fast'"),
    ("nowhere.py", "config file nowhere.py: "), ("steps = (\n", "(bad.py, line 1)"),
    ("steps = 3\nlearning = 1\n", "line 2: unknown key 'learning'"),
    ("\nsteps = 'many'\n", "line 2: steps must be int"), ("\n\nx = 1 / 0\n", "line 3: ZeroDiv"),
    ("\nraise SystemExit\n", "line 2: SystemExit"), ("def name():\n  pass\n", "name must be str"),
    ("mine.jsonl", "neither a --flag nor a config")])
def test_refusals(dies, tmp_path, text, words):
    (tmp_path / "bad.py").write_text(text)
    dies(words, configure, script(), [str(tmp_path / "bad.py") if "\n" in text else text])


def test_only_the_first_rank_of_a_machine_prints(dies, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    configure(script(), ["--steps=3"])
    with pytest.raises(SystemExit):
        configure(script(), ["--stepz=3"])
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("LOCAL_RANK", "0")  # of another machine: it may lack what the first one has
    dies("'stepz'", configure, script(), ["--stepz=3"])


def test_help_and_settings_for_a_function(capsys):
    with pytest.raises(SystemExit, match="0"):
        configure(script(), ["--help"])
    assert "--rate=0.001" in capsys.readouterr().out
    assert settings_for(lambda a, b=1, *, c: 0, dict(c=3, d=4, a=5)) == dict(a=5, c=3)


GOOD = dict(rate=0.1, bound=math.inf, steps=0, seed=0, eta=3, kinds=("a",), name="x", other=None,
            count=None, tp=1)
ARGS = dict(
    known=dict(eta=(None, "p", float), kinds=["a", "b"], elsewhere=(1,)), infinite="bound",
    ranges={"> 0": "rate count", ">= 0": "steps", "<= 2": "rate"},
    optional={str: "other", int: "count"})


@pytest.mark.parametrize("key, value, words", [
    ("rate", math.nan, "rate: nan"), ("rate", math.inf, "rate: inf"), ("rate", 0.0, "not > 0"),
    ("bound", math.nan, "bound: nan"), ("steps", -1, "-1 is not >= 0"), ("tp", 3, "tp: 3"),
    ("tp", 0, "tp: 0"), ("rate", 2.1, "not <= 2"), ("seed", -1, "seed: -1"),
    ("seed", 2**32, "seed: 4294967296"), ("eta", "q", "eta: 'q' is none of None, p, float"),
    ("eta", True, "eta: True"), ("eta", (0.5,), "eta: (0.5,)"), ("eta", math.nan, "eta: nan"),
    ("count", 0, "count: 0"), ("count", "x", "count: 'x'"), ("count", 1.5, "count: 1.5"),
    ("kinds", ("a", "c"), "'c' is none of a, b"), ("other", 3, "other: 3 is none of None, str")])
def test_check(dies, key, value, words):
    check(GOOD, **ARGS)
    dies(words, check, GOOD | {key: value}, **ARGS)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_is_one_its_script_takes(refused, config):
    """Refused for the data set alone, which is looked at after the settings."""
    script = "lld.py" if config.startswith("lld") else "train.py"
    flag = "--dataset=nowhere"
    if config.startswith("eval"):
        script, flag = "eval.py", "--ckpt=nowhere/x/y"
    assert "nowhere" in refused(script, f"config/{config}", flag)


def test_configs_hold_what_the_papers_state():
    for name, wrong, memory, cards, _ in configs.check():
        assert not wrong, (name, wrong)
        assert cards["80 GB"] and memory["held"] < memory["peak"]
    others = {*CONFIGS} ^ {f"{name}.py" for name in configs.PAPER}
    assert all(re.search("quickstart|lld|eval|study|countdown", name) for name in others)


def test_a_function_is_a_setting(dies, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def prompt(x):\n    return 2 * x\ndef f(x):\n    return 1\nreward = f\n")
    got = configure(script() | dict(prompt=None, reward=None), [str(path)])
    assert (got["prompt"], got["reward"]) == (f"{path}:prompt", f"{path}:f")
    assert load_function(got["prompt"], "prompt")(4) == 8
    dies("reward: ", check, GOOD | dict(reward=f"{path}:f"), **ARGS)  # which takes no row
    for wrong in (f"{path}:nothing", "nowhere.py:name", "name"):
        dies(f"reward: it takes FILE.py:NAME; {wrong}: ", load_function, wrong, "reward")
    dies("reward: ", check, GOOD | dict(reward="nowhere.py:x"), **ARGS)
