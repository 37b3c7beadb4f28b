"""Papers' results, each reproduced by one command: `htv experiment NAME`.

experiment.py   what an experiment is: variants, one run, a summary, a plot
records.py      every finished run is kept at once, so that an interrupted experiment goes on where
                it was
run.py          all runs in order or side by side, with a progress bar
report.py       tables, the paper's claims beside what was found here, a picture, every number as
                JSON
images.py       what experiments on images share
cues.py         what those on images with cues share
NAME.py         one module per experiment, which defines EXPERIMENT
"""

NAMES = {
    "linear": "four environments, one mechanism: what the geometric mean of gradients finds and "
    "the mean does not",
    "spirals": "spirals beside an easier shortcut in every environment: the AND-mask and its "
    "competitors",
    "correlation": "how the masked gradient correlates with that of mechanism and shortcut alone, "
    "against tau",
    "memorisation": "real and random labels, and 25% noise, under AND-masks over single examples",
    "winsorized": "winsorized gradient descent: overfit over percentiles and label noise",
    "rolling": "SGD, M3, RM3 and RA3 on a convnet, half the labels random",
    "attribution": "label noise: whom the gradients serve through training, and who is learnt "
    "first",
    "coherence": "m-coherence through training, for real and for random labels",
    "difficulty": "do easy examples generalise among themselves, and hard ones?",
    "cbft": "fine-tuning a model out of a shortcut: connectivity-based, ablations, and what keeps "
    "the shortcut",
    "paths": "linear and quadratic paths between models with and without a cue, before and after "
    "matching",
    "mat-toy": "a shortcut that fails a minority: learnt by heart, or not, with memorization-aware "
    "training",
    "good-bad-ugly": "a curve through noisy points, learnt by heart in three ways",
    "worst-group": "images by day and by night: how well MAT, XRM and others serve the minorities",
    "memorisation-scores": "who is learnt by heart: scores from many networks, and gradient norms "
    "in their place",
}
