"""The benchmark behind `htv bench`; installed as htv.bench.

models.py      models of the kinds people train
workloads.py   what is measured: each workload with its variants
baselines.py   the same gradients as others compute them: all examples' gradients in memory, then
               reduced
run.py         everything measured, as one record
rows.py        what the record holds of one variant
peak.py        the process in which one variant's memory is measured
targets.py     what the numbers should be
report.py      the record as Markdown
plots.py       the record as pictures
gpu.sh, gpu/   everything about a GPU in one command: builds, checks, measures
pytest/        pytest-benchmark files, one per op; not installed
results/       the committed record
"""
