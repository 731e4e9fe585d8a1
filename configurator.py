"""Config files and command-line flags override a script's globals.

    python train.py config/quickstart.py --learning_rate=2e-5 --resume

A script assigns its settings as plain module globals and then calls `configure(globals())`. Arguments that do not
start with `--` are config files: Python, executed in order, later ones win. `--key=value` and `--key value` win over
every file; a bare `--key` turns a boolean on, and a setting that is `()` by default takes all words up to the next flag.
The type of a setting is the type of its default (a default of None takes anything), an int is accepted for a float,
and a name the script does not have is refused with the nearest one it has. Any mistake is one line on stderr and exit
code 2: see `die`.
"""
import ast
import builtins
import difflib
import math
import os
import sys

SETTING_TYPES = (bool, int, float, str, tuple, type(None))


def is_rank0():
    """True in the process that prints and writes: the only one, or torchrun's rank 0."""
    return int(os.environ.get("RANK", "0")) == 0


def print0(*args, **kwargs):
    if is_rank0():
        print(*args, **kwargs, flush=True)


def die(message):
    """End the program because of bad input: one line on stderr (of a machine's first rank), exit code 2, no traceback."""
    if os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0":  # another machine may lack what rank 0's has
        print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def _is_setting(key, value):
    return not key.startswith("_") and isinstance(value, SETTING_TYPES + (list,))


def _checked(key, value, default, where):
    """`value` in the type of `default`, or the end of the program. int -> float and list -> tuple are conversions."""
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    none_is_fine = value is None and isinstance(default, str)  # a str setting may be switched off
    if default is not None and type(value) is not type(default) and not none_is_fine:
        die(f"{where}: {key} must be {type(default).__name__}, got {value!r}")
    return value


def _parse(text, default):
    """The value of a command-line word. Text stays text for a str setting, so `--out_dir=2024` is a folder."""
    if isinstance(default, str) and text != "None":
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return text[1:-1] if quoted else text
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return float(text) if text.lstrip("+-") in ("inf", "nan") else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _unknown(key, known, where):
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    die(f"{where}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))


def _run_file(path, settings):
    """Execute one config file and return its settings. The file sees the values in force so far under their names."""
    try:
        with open(path, encoding="utf-8") as f:
            source = f.read()
    except (OSError, UnicodeDecodeError) as e:
        die(f"config file {path}: {getattr(e, 'strerror', None) or e}")
    scope = dict(settings, __file__=path, __builtins__=builtins)
    try:
        tree = ast.parse(source, path)
        exec(compile(tree, path, "exec"), scope)
    except SyntaxError as e:
        die(f"config file {path}, line {e.lineno}: {e.msg}")
    except Exception as e:  # whatever the user's file raised, its own line is what helps
        tb, line = e.__traceback__, "?"
        while tb is not None:
            line = tb.tb_lineno if tb.tb_frame.f_code.co_filename == path else line
            tb = tb.tb_next
        die(f"config file {path}, line {line}: {type(e).__name__}: {e}")
    lines = {n.id: n.lineno for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    found = {}
    for key, value in scope.items():
        where = f"config file {path}, line {lines.get(key, '?')}"
        if key in settings:
            found[key] = (value, where)
        elif key in lines and not key.startswith("_"):  # imports, functions and _helpers are the file's own business
            _unknown(key, settings, where)
    return found


def configure(script_globals, argv=None):
    """Override `script_globals` in place from config files and flags and return the settings as a dict.

    Settings are the globals assigned before the call whose names have no leading underscore and whose values are
    bool, int, float, str, tuple or None. argv: list of str, default sys.argv[1:]. Bad input ends the program (`die`).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    defaults = {k: v for k, v in script_globals.items() if _is_setting(k, v)}
    if any(a in ("-h", "--help") for a in argv):
        print0(script_globals.get("__doc__") or "")
        print0("\n".join(f"  --{k}={v!r}" for k, v in defaults.items()))
        sys.exit(0)
    settings, flags = dict(defaults), []
    while argv:
        arg = argv.pop(0)
        if not arg.startswith("--"):  # a config file
            for key, (value, where) in _run_file(arg, settings).items():
                settings[key] = _checked(key, value, defaults[key], where)
            continue
        key, has_value, text = arg[2:].partition("=")
        key = key.replace("-", "_")
        if key not in defaults:
            _unknown(key, defaults, "command line")
        if not has_value and defaults[key] == ():  # `--key a b`: all words up to the next flag
            words = [argv.pop(0) for _ in range(next((i for i, a in enumerate(argv) if a.startswith("--")), len(argv)))]
            flags.append((key, tuple(words)))
            continue
        if not has_value:  # `--key value`, or a bare boolean
            is_bool = isinstance(defaults[key], bool)
            if argv and not argv[0].startswith("--") and (not is_bool or isinstance(_parse(argv[0], True), bool)):
                text = argv.pop(0)
            elif is_bool:
                text = "True"
            else:
                die(f"command line: --{key} needs a value")
        flags.append((key, _parse(text, defaults[key])))
    for key, value in flags:
        settings[key] = _checked(key, value, defaults[key], "command line")
    changed = {k: v for k, v in settings.items() if v != defaults[k] or type(v) is not type(defaults[k])}
    print0("config: " + (", ".join(f"{k}={v!r}" for k, v in changed.items()) or "all defaults"))
    script_globals.update(settings)
    return settings


def check(settings, known, above_zero=(), not_negative=(), whole=(), infinite=(), text=(), text_or_none=()):
    """End the program if a setting has a value that no run can use.

    known: {key: a tuple of the values it may have, or a list of those that the setting, a tuple, may hold}; the type float
    among them stands for any number. above_zero, not_negative: keys of numbers; whole: of counts or None; infinite: of
    numbers that may be so, nan none may be.
    """
    for key, values in known.items():
        for value in settings[key] if isinstance(values, list) else (settings[key],):
            number = float in values and isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number and value not in values:
                die(f"{key}: {value!r} is none of {', '.join('a number' if v is float else str(v) for v in values)}")
    for key, value in settings.items():
        if isinstance(value, float) and not (math.isfinite(value) or key in infinite and not math.isnan(value)):
            die(f"{key}: {value} is not a finite number")
        if key in above_zero and not value > 0:
            die(f"{key}: {value} is too small")
        if key in not_negative and value < 0:
            die(f"{key}: {value} is negative")
        if key in whole and value is not None and not (type(value) is int and value > 0):
            die(f"{key}: {value!r} is not a positive whole number")
        if (key in text or key in text_or_none and value is not None) and not isinstance(value, str):
            die(f"{key}: {value!r} is not a text")
        if key == "data_dir" and value is not None and not os.path.isdir(value):
            die(f"data_dir: {value} is not a folder")
        if key == "seed" and value >= 2**32:
            die(f"seed: {value} is not below 2**32, the most that numpy takes")
        if key == "adam_betas" and not (len(value) == 2 and all(isinstance(b, (int, float)) and 0 <= b < 1 for b in value)):
            die(f"adam_betas: {value!r} is not two numbers in [0, 1)")


def check_folder(path, key="out_dir"):
    """Make a folder to write to, or end the program."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        die(f"{key}: {path!r} cannot be a folder: {e.strerror}")
    if not os.access(path, os.W_OK | os.X_OK):
        die(f"{key}: {path} cannot be written to")


def check_tp(tp):
    """End the program unless `tp` ranks of a machine can share an engine."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks % tp:
        die(f"tp: {tp} does not divide the {ranks} ranks of a machine")
