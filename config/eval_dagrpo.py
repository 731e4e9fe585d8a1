# [DaGRPO]: temperature 0.6, avg@32 on the small sets, one response on the others; the last three
# are averaged by themselves (OOD). Length: the longest that was trained with
as_trained = False
data = "aime24,aime25,amc83,math500,minerva_math,olympiadbench,arc_c,gpqa_diamond,mmlu_pro"
n_of = (("aime24", 32), ("aime25", 32), ("amc83", 32))
temperature = 0.6
max_response_tokens = 8192
