# NTHR, Qwen2.5-3B on MATH levels 3 to 5
#   torchrun --nproc_per_node=4 train.py config/nthr_3b.py
from config.nthr_math import *

model = "Qwen/Qwen2.5-3B"
out_dir = "out/nthr_3b"
max_response_tokens = 4000
parallel = "fsdp"
