"""The demo: train on images of which a quarter carry wrong labels, and see which rules learn those
by heart.

variants.py   the rules that compete
training.py   one network trained by one rule, observed after every epoch
cost.py       time per step, interleaved, beside torch.func; peak memory, one process each
report.py     the table, the curves and the JSON
run.py        all of it in order
"""
