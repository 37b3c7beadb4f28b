"""The benchmark behind bench/gpu.sh: what a GPU machine says about the kernels, as one record.

run.py           the steps, each in a process of its own, within a deadline; imports nothing but
                 Python's library
step.py          what a step is given, and processes that answer questions
build.py         the CUDA kernels for this GPU
facts.py         which GPU, which versions
correctness.py   tests/device_suite, many cases at once; a crash or a hang costs one case
sanitizer.py     compute-sanitizer on one small call per CUDA kernel
kernels.py       ceilings, and kernels beside them
training.py      whole steps beside plain ones: time and peak memory
clock.py         time by CUDA events, or by the wall in a dry run
targets.py       what the numbers should be on an H200
report.py        the record as Markdown
"""
