"""What experiments conclude from made-up results."""

from htv.experiments.experiment import Records, load


def agreement(name: str, results: dict[str, dict], classes: int = 10) -> list[bool]:
    """Which findings agree with the paper, by a result for each variant of the full experiment."""
    experiment = load(name)
    assert set(results) == set(experiment.variants(experiment.full))
    runs = [
        {"variant": v, "seed": s, "seconds": 1.0, "result": results[v]}
        for s in range(2)
        for v in results
    ]
    summary = experiment.summarise(Records(experiment.full, runs, classes))
    assert all(len(row) == len(table.head) for table in summary.tables for row in table.rows)
    return [finding.agrees for finding in summary.findings]
