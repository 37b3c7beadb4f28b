"""Papers' results, each reproduced by one command: `htv experiment NAME`.

experiment.py   what an experiment is: variants, one run, a summary, a plot
records.py      every finished run is kept at once, so that an interrupted experiment goes on where it was
run.py          all runs in order or side by side, with a progress bar
report.py       tables, the paper's claims beside what was found here, a picture, every number as JSON
NAME.py         one module per experiment, which defines EXPERIMENT
"""

NAMES = {
    "linear": "four environments, one mechanism: what the geometric mean of gradients finds and the mean does not",
}
