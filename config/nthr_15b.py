# NTHR, Qwen2.5-1.5B-Instruct on MATH levels 3 to 5
#   torchrun --nproc_per_node=4 train.py config/nthr_15b.py
from config.nthr_math import *

model = "Qwen/Qwen2.5-1.5B-Instruct"
out_dir = "out/nthr_15b"
max_response_tokens = 4000
