"""A GGUF file inside an installed package as an ordinary Hugging Face folder, made once.

    python bench/get_model.py PACKAGE FILE OUT_DIR
"""
import importlib.util
import os
import shutil
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def convert_gguf(package, file, out_dir):
    """Write the folder whole or not at all, unless it is there."""
    if os.path.exists(os.path.join(out_dir, "config.json")):
        return
    source = importlib.util.find_spec(package).submodule_search_locations[0]
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True))
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    tmp = out_dir + ".tmp"
    shutil.rmtree(tmp, ignore_errors=True)  # of a conversion that was cut off
    model.save_pretrained(tmp)
    tokenizer.save_pretrained(tmp)
    os.rename(tmp, out_dir)


if __name__ == "__main__":
    convert_gguf(*sys.argv[1:])
