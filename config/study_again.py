# bench/study.py: 32 sums of three, each met four times, for demos="self": a right answer of before
# can be a demonstration only where a problem comes again
from config.dagrpo_quickstart import *

out_dir = "out/study_again"
dataset = "sums_again"
