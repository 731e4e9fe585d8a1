import math
from pathlib import Path

import pytest

from configurator import check, check_folder, configure

ROOT = Path(__file__).resolve().parent.parent


def settings():
    return dict(steps=10, rate=1e-3, name="x", flag=False, on=True, betas=(0.9, 0.95), limit=None, _private=1,
                __doc__="a script")


def conf(*argv):
    return configure(settings(), argv)


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as e:
        conf(*argv)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize("argv, key, value", [
    (["--rate=1"], "rate", 1.0),
    (["--rate", "-2e-5"], "rate", -2e-5),
    (["--rate=-inf"], "rate", float("-inf")),
    (["--steps=-3"], "steps", -3),
    (["--steps", "-3"], "steps", -3),
    (["--name=a=b=c"], "name", "a=b=c"),
    (["--name=2024"], "name", "2024"),
    (["--name="], "name", ""),
    (["--name=None"], "name", None),
    (["--name='None'"], "name", "None"),
    (["--name", "true"], "name", "true"),
    (["--flag"], "flag", True),
    (["--flag", "--flag"], "flag", True),
    (["--flag", "false"], "flag", False),
    (["--on=False"], "on", False),
    (["--betas=(0.5, 0.6)"], "betas", (0.5, 0.6)),
    (["--betas=[1,2,3]"], "betas", (1, 2, 3)),
    (["--betas=()"], "betas", ()),
    (["--limit=7"], "limit", 7),
    (["--limit=some text"], "limit", "some text"),
    (["--limit=None"], "limit", None),
    (["--steps=1", "--steps=2"], "steps", 2),
])
def test_flags(argv, key, value):
    got = conf(*argv)
    assert got[key] == value and type(got[key]) is type(value)
    assert {k: v for k, v in got.items() if k != key} == {k: v for k, v in settings().items()
                                                          if k not in (key, "_private", "__doc__")}


def test_globals_are_overridden_in_place():
    g = settings()
    configure(g, ["--steps=3"])
    assert g["steps"] == 3 and g["_private"] == 1


def test_files_apply_in_order_and_flags_last(tmp_path):
    a, b = tmp_path / "a.py", tmp_path / "b.py"
    a.write_text("import math\nsteps = 5\nrate = 1\nbetas = [0.1, 0.2]\nlimit = int(math.pi)\n")
    b.write_text("_half = steps // 2\nfor _i in range(2):\n    pass\ndef helper():\n    pass\nsteps = steps + _half\n")
    got = conf(str(a), "--name=n", str(b), "--rate=0.5")
    assert (got["steps"], got["rate"], got["betas"], got["limit"], got["name"]) == (7, 0.5, (0.1, 0.2), 3, "n")
    assert conf("--steps=1", str(a))["steps"] == 1  # a flag wins wherever it stands


def test_refusals(tmp_path, capsys):
    assert "'stepz'" in (err := refused(capsys, "--stepz=3")) and "'steps'" in err
    assert "steps must be int, got 1.5" in refused(capsys, "--steps=1.5")
    assert "steps must be int, got True" in refused(capsys, "--steps=True")
    assert "flag must be bool" in refused(capsys, "--flag=1")
    assert "rate must be float, got 'fast'" in refused(capsys, "--rate=fast")
    assert "--steps needs a value" in refused(capsys, "--steps")
    assert "nowhere.py" in refused(capsys, str(tmp_path / "nowhere.py"))
    for text, line, word in (("steps = 3\nlearning = 1\n", 2, "'learning'"), ("steps = (\n", 1, "never closed"),
                             ("\nsteps = 'many'\n", 2, "steps must be int"), ("\n\nx = 1 / 0\n", 3, "ZeroDivisionError")):
        (tmp_path / "bad.py").write_text(text)
        err = refused(capsys, str(tmp_path / "bad.py"))
        assert f"bad.py, line {line}" in err and word in err


def test_only_rank_0_prints(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    conf("--steps=3")
    with pytest.raises(SystemExit):
        conf("--stepz=3")
    out, err = capsys.readouterr()
    assert out == err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")  # of another machine: what is wrong may be wrong there alone
    assert "'stepz'" in refused(capsys, "--stepz=3")


@pytest.mark.parametrize("changed, words", [
    (dict(rate=math.nan), "rate: nan"), (dict(rate=math.inf), "rate: inf"), (dict(rate=0.0), "rate: 0.0 is too small"),
    (dict(bound=math.nan), "bound: nan"), (dict(steps=-1), "steps: -1 is negative"), (dict(seed=2**32), "seed: 4294967296"),
    (dict(eta="q"), "eta: 'q' is none of None, p, a number"), (dict(eta=True), "eta: True"), (dict(eta=(0.5,)), "eta: (0.5,)"), (dict(count=0), "count: 0"), (dict(count="x"), "count: 'x'"),
    (dict(count=1.5), "count: 1.5"), (dict(data_dir="nowhere"), "data_dir: nowhere"), (dict(eta=math.nan), "eta: nan"),
    (dict(kinds=("a", "c")), "kinds: 'c' is none of a, b"), (dict(name=None), "name: None is not a text"),
    (dict(other=3), "other: 3 is not a text"), (dict(adam_betas=(0.9, 1.0)), "adam_betas"), (dict(adam_betas=("a", "b")), "adam_betas"),
    ({}, None), (dict(bound=math.inf), None), (dict(eta=3), None), (dict(eta="p"), None), (dict(other="x", steps=0), None)])
def test_check(capsys, changed, words):
    settings = dict(rate=0.1, bound=1.0, steps=1, seed=0, eta=None, kinds=("a",), name="x", other=None, count=None, adam_betas=(0, 0.9)) | changed
    args = dict(known=dict(eta=(None, "p", float), kinds=["a", "b"]), above_zero=("rate",), not_negative=("steps", "seed"), whole=("count",),
                infinite=("bound",), text=("name",), text_or_none=("other",))
    if words is None:
        return check(settings, **args)
    with pytest.raises(SystemExit) as e:
        check(settings, **args)
    assert e.value.code == 2 and f"error: {words}" in capsys.readouterr().err


def test_a_folder_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "x", ""):
        with pytest.raises(SystemExit) as e:
            check_folder(str(path))
        assert e.value.code == 2 and "error: out_dir: " in capsys.readouterr().err
    check_folder(str(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir()


def test_help(capsys):
    with pytest.raises(SystemExit) as e:
        conf("--help")
    assert e.value.code == 0 and "--rate=0.001" in capsys.readouterr().out


@pytest.mark.parametrize("config", sorted(p.name for p in (ROOT / "config").glob("*.py")))
def test_every_config_is_one_its_script_takes(run, config):
    """Refused for the data set alone, which is looked at after the settings."""
    done = run("lld.py" if config.startswith("lld") else "train.py", f"config/{config}", "--dataset=nowhere", check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: dataset: 'nowhere' is neither"), done.stderr


def test_configs_hold_what_the_papers_state():
    """tests/configs.py, the README's table: hyperparameters, and that each run fits the GPUs it is meant for."""
    import configs
    for name, wrong, memory, cards, _ in configs.check():
        assert not wrong, (name, wrong)
        assert cards["80 GB"] and memory["held"] < memory["peak"]
    assert {f"{name}.py" for name in configs.PAPER} == {p.name for p in (ROOT / "config").glob("*.py")
                                                        if "quickstart" not in p.name and not p.name.startswith("lld")}


def test_a_setting_that_is_empty_by_default_takes_all_words_up_to_the_next_flag():
    script = dict(files=(), n=1)
    assert configure(script, ["--files", "a.jsonl", "b.jsonl", "--n", "2"]) == dict(files=("a.jsonl", "b.jsonl"), n=2)
    assert configure(dict(files=(), n=1), ["--files=('a',)"])["files"] == ("a",)
