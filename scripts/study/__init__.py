"""The papers' claims, each measured and judged: what scripts/reproduce.sh runs and docs/results.md
shows.

    experiment.py  what an experiment is, its raw numbers on disk, and what is measured already
    verdict.py     the rules by which numbers become verdicts
    gates.py       GrAP against a dense gate: time, orthogonality
    training.py    short runs of every router: perplexity, unused experts, alikeness of an expert's tokens
    capacity.py    loss and time against the capacity factor, and where the theorem's floor lands
    load.py        states and forecasts of the recorded load traces
    recorded.py    what longer scripts have measured: time against the other routers, placement
    page.py        the table and its page

A verdict is computed from the numbers and never written by hand.
"""
