"""Config files and command-line flags override a script's globals.

    python train.py config/quickstart.py --learning_rate=2e-5 --resume

A script assigns its settings as plain globals and then calls `configure(globals())`. Arguments
without `--` are config files, Python, later ones win. `--key=value` and `--key value` win over
files; a bare `--key` turns a boolean on, a setting that is `()` takes all words up to the next
flag. A setting's type is its default's; None takes anything. A function is "FILE.py:NAME"."""
import ast
import contextlib
import difflib
import inspect
import math
import operator
import os
import runpy
import signal
import sys
import traceback

RANKS = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))   # of this machine
CORES = max(1, len(os.sched_getaffinity(0)) // RANKS)  # a rank's share of the machine's
FUNCTIONS = ("dataset", "eval_dataset", "prompt", "reward")  # settings that may be functions


def is_rank0():
    """True in the process that prints and writes: the only one, or torchrun's rank 0."""
    return os.environ.get("RANK", "0") == "0"


def print0(text):
    if is_rank0():
        print(text, flush=True)


def die(message, code=2):
    """End the program, because of bad input if with 2: one line on stderr, no traceback.
    On several machines each one's first rank says so: it may lack what another has."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(code)


@contextlib.contextmanager
def blame(what, file=None):
    """Whatever its body raises ends the program as bad input: `what`, the line that `file`, the
    user's, was at, the error."""
    try:
        yield
    except (Exception, SystemExit) as e:  # sys.exit() in the user's file is an error, too
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == file]
        line = f", line {lines[-1]}" if lines else ""
        die(f"{what}{line}: {type(e).__name__}: {e}")


def _checked(key, value, default, where):
    """`value` in the type of `default`. int -> float and list -> tuple are conversions."""
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(default, float) and type(value) is int:
        value = float(str(value))  # of 400 digits: inf
    if default is not None and type(value) is not type(default):
        die(f"{where}: {key} must be {type(default).__name__}, got {value!r}")
    return value


def _parse(text, default):
    """The value of a command-line word. It stays text for a str setting: `--out_dir=2024`."""
    if isinstance(default, str):
        return text
    if text.lower() in ("true", "false", "none"):
        text = text.title()
    try:
        return float(text) if text.lstrip("+-") in ("inf", "nan") else ast.literal_eval(text)
    except Exception:  # literal_eval raises many
        return text


def _unknown(key, known, where):
    [near] = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    die(f"{where}: unknown key {key!r}, did you mean {near!r}?")


def _run_file(path, settings, defaults):
    """Override settings by those of a config file, which sees them as they are so far."""
    scope = dict(settings, __file__=path)
    with blame(f"config file {path}", path), open(path, encoding="utf-8-sig") as f:
        tree = ast.parse(f.read(), path)
        exec(compile(tree, path, "exec"), scope)
    lines = {n.id: n.lineno for n in ast.walk(tree)
             if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for key, value in scope.items():
        where = f"config file {path}, line {lines.get(key, '?')}"
        if inspect.isfunction(value) and key in FUNCTIONS:
            value = f"{value.__code__.co_filename}:{value.__name__}"
        if key in settings:
            settings[key] = _checked(key, value, defaults[key], where)
        elif key in lines and not key.startswith("_"):  # imports and _helpers are its own business
            _unknown(key, settings, where)


def load_function(name, key):
    """The function "FILE.py:NAME", the value of the setting `key`; ends the program without it."""
    file, _, function = name.rpartition(":")
    with blame(f"{key}: it takes FILE.py:NAME; {name}", file):
        return runpy.run_path(file)[function]


def configure(script_globals, argv=None):
    """Override `script_globals` in place from config files and flags; returns the settings.
    Settings are the globals so far whose names begin with a small letter and whose values are bool,
    int, float, str, tuple or None. argv: list of str, default sys.argv[1:]."""
    if argv is None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a script without a traceback
        argv = sys.argv[1:]
    defaults = {key: value for key, value in script_globals.items() if key[0].islower()
                and isinstance(value, int | float | str | tuple | None)}  # a bool is an int
    if {"-h", "--help"} & {*argv}:
        print0(script_globals.get("__doc__") or "")
        print0("\n".join(f"  --{key}={value!r}" for key, value in defaults.items()))
        sys.exit(0)
    settings, flags = dict(defaults), {}
    while argv:
        word, *argv = argv
        if not word.startswith("--"):
            if not word.endswith(".py"):
                die(f"command line: {word!r} is neither a --flag nor a config file, NAME.py")
            _run_file(word, settings, defaults)
            continue
        key, has_value, text = word[2:].partition("=")
        key = key.replace("-", "_")
        if key not in defaults:
            _unknown(key, defaults, "command line")
        default = defaults[key]
        if has_value:
            value = _parse(text, default)
        elif isinstance(default, bool) and (not argv or argv[0].lower() not in ("true", "false")):
            value = True  # bare, not `--key false`
        elif not argv or argv[0].startswith("--"):
            die(f"command line: --{key} needs a value")
        elif default == ():  # `--key a b`: all words up to the next flag
            value = ()
            while argv and not argv[0].startswith("--"):
                value += (argv.pop(0),)
        else:
            value = _parse(argv.pop(0), default)
        flags[key] = _checked(key, value, default, "command line")
    settings |= flags
    changed = [f"{key}={value!r}" for key, value in settings.items() if value != defaults[key]]
    print0("config: " + (", ".join(changed) or "all defaults"))
    script_globals.update(settings)
    return settings


def settings_for(function, config):
    """The settings that a function has a parameter of the same name for."""
    return {key: config[key] for key in inspect.signature(function).parameters if key in config}


def check(settings, known, ranges, infinite="", optional={}):
    """End the program if a setting has a value that no run can use.
    known: {key: a tuple of its allowed values and types (float admits int), or a list: what each
    item of a setting that is a tuple may be}. ranges: {"> 0": keys with spaces between, ...}, of
    numbers. infinite: keys that may be. optional: {type: keys that may be None or of that type
    (float admits int), ...}."""
    for kind, keys in optional.items():
        known = known | dict.fromkeys(keys.split(), (None, kind))
    for key in known.keys() & settings.keys():
        values = known[key]
        for value in settings[key] if isinstance(values, list) else (settings[key],):
            kind = type(value)  # a whole number is a number, too
            if not (value in values or kind in values or kind is int and float in values):
                names = ", ".join(getattr(v, "__name__", str(v)) for v in values)
                die(f"{key}: {value!r} is none of {names}")
    for key, value in settings.items():
        if isinstance(value, float) and (math.isnan(value) or
                                         math.isinf(value) and key not in infinite.split()):
            die(f"{key}: {value} is not a finite number")
    if reward := settings.get("reward"):
        function = load_function(reward, "reward")
        with blame(f"reward: {reward} does not take (text, row)"):
            inspect.signature(function).bind("", {})
    holds = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
    for bound, keys in (*ranges.items(), (">= 0", "seed"), ("< 4294967296", "seed"), ("> 0", "tp")):
        sign, limit = bound.split()
        for key in keys.split():
            value = settings.get(key)
            if isinstance(value, (int, float)) and not holds[sign](value, float(limit)):
                die(f"{key}: {value!r} is not {bound}")
    if RANKS % settings.get("tp", 1):
        die(f"tp: {settings['tp']} is not a divisor of {RANKS}, the ranks of a machine")
