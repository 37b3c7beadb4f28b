"""The demo: train on images of which a quarter carry wrong labels, and see which rules learn those by heart.

variants.py      the rules that compete
training.py      one network trained by one rule, observed after every epoch
materialised.py  the same gradients the usual way, by torch.func, with all examples' gradients in memory
cost.py          time per step, interleaved; peak memory, one process each
machine.py       versions, build and hardware, which `htv info` shows too
report.py        the table, the curves and the JSON
run.py           all of it in order
"""
